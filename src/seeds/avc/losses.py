"""The terms that train AVC's affinities, and their confident pseudo-labels: pure functions of tensors, in float32.

No function synchronises a device: nothing that is computed decides a shape or a branch.
"""
import torch
from torch.nn import functional as F

from src.seeds.avc.head import EPS

IGNORE = -1      # label of a cell that is not confident, or padding
PAIR_CAP = 4096  # cells of either side whose pairs are separated; their product is what memory holds


def equivariance(first: torch.Tensor, second: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over valid cells of 1 - cos(a_i, b_i), each side in turn the target, whose gradient is stopped.

    first, second: (B, N, N) affinities of two views in one frame.  valid: (B, N) bool: cells that both views show; the
    vectors are compared over valid columns alone.  Returns a scalar >= 0, 0 without valid cells.
    """
    both = valid[:, :, None] & valid[:, None]
    first, second = first * both, second * both
    there = 1 - F.cosine_similarity(first, second.detach(), dim=2, eps=EPS)
    back = 1 - F.cosine_similarity(second, first.detach(), dim=2, eps=EPS)
    return masked_mean((there + back) / 2, valid)


def agreement(vectors: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Mean over confident cells of 1 - cos(a_i, mean a of its label), the mean's gradient stopped.

    vectors: (B, N, N) affinity vectors.  labels: (B, N) int, 0 background, 1..`classes`, IGNORE.
    Returns a scalar >= 0: half of the mean over the background's cells, half of that over the objects'.
    """
    hot = F.one_hot(labels.clamp(min=0), classes + 1) * (labels != IGNORE)[..., None]  # (B, N, C)
    hot = hot.to(vectors.dtype)
    means = hot.transpose(1, 2) @ vectors.detach() / hot.sum(dim=1)[..., None].clamp(min=1)  # (B, C, N)
    distance = 1 - F.cosine_similarity(vectors, hot @ means, dim=2, eps=EPS)
    return (masked_mean(distance, labels == 0) + masked_mean(distance, labels > 0)) / 2


def separation(unit: torch.Tensor, labels: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Mean of max(0, A_ij - margin) over pairs of different confident labels.

    Objects against the background of the whole batch, and different classes within an image; each is a mean over its
    own pairs. Objects of two images are not pushed apart: two breeds may well look alike.
    unit: (B, d, h, w).  labels: (B, N), see `agreement`.  Returns a scalar >= 0, 0 without such pairs.
    """
    flat = unit.float().flatten(2)
    cells = flat.transpose(1, 2)  # (B, N, d)
    objects, is_object = _chosen(cells, labels > 0)
    ground, is_ground = _chosen(cells, labels == 0)
    apart = masked_mean(torch.relu(objects @ ground.T - margin), is_object[:, None] & is_ground)
    differ = (labels[:, :, None] != labels[:, None]) & (labels > 0)[:, :, None] & (labels > 0)[:, None]
    return apart + masked_mean(torch.relu(cells @ flat - margin), differ)


def _chosen(cells: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At most PAIR_CAP of the cells (B, N, d) where a mask (B, N) holds, evenly taken: (cells (n, d), which are real).

    n does not depend on the mask, whose count stays on the device: places beyond it are filled with other cells.
    """
    mask = mask.flatten()
    most = min(PAIR_CAP, len(mask))
    order = mask.int().argsort(descending=True, stable=True)  # those of the mask first, in their order
    count = mask.sum()
    step = ((count + most - 1) // most).clamp(min=1)
    place = torch.arange(most, device=mask.device) * step
    return cells.flatten(0, 1)[order[place.clamp(max=len(mask) - 1)]], place < count


def cam_consistency(first: torch.Tensor, second: torch.Tensor, present: torch.Tensor, valid: torch.Tensor
                    ) -> torch.Tensor:
    """Mean |difference| of two views' refined maps in one frame, over valid cells and the classes of each image.

    first, second: (B, K, N) in [0, 1].  present: (B, K) bool.  valid: (B, N) bool.  Each side is in turn the target.
    """
    mask = present[:, :, None] & valid[:, None]
    return masked_mean((first - second.detach()).abs() / 2 + (second - first.detach()).abs() / 2, mask)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values where the mask holds; 0, with a gradient of 0, where it holds nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def unit_range(cam: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Each map moved and scaled so that its values over valid cells span [0, 1]; padding is 0.

    Averages with affinity vectors leave a floor under a map, which no division takes away.  cam: (B, K, N).
    valid: (B, N) bool.
    """
    inside = valid[:, None].expand_as(cam)
    low = cam.masked_fill(~inside, torch.inf).amin(dim=2, keepdim=True)
    high = cam.masked_fill(~inside, -torch.inf).amax(dim=2, keepdim=True)
    return torch.where(inside, (cam - low) / (high - low).clamp(min=EPS), 0)


def confident_labels(cam: torch.Tensor, present: torch.Tensor, valid: torch.Tensor, low: float, high: float
                     ) -> torch.Tensor:
    """A class where its map is >= `high`, background where all maps are <= `low`; IGNORE elsewhere and in the padding.

    cam: (B, K, N) in [0, 1].  present: (B, K) bool, the images' labels.  valid: (B, N) bool.  Returns (B, N) int64.
    """
    best, which = torch.where(present[:, :, None], cam, -1.0).max(dim=1)
    labels = torch.where((best <= low) & present.any(dim=1)[:, None], 0, IGNORE)
    labels = torch.where(best >= high, which + 1, labels)
    return torch.where(valid, labels, IGNORE)


def anchored(refined: torch.Tensor, seeds: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Refined maps, clipped, on a scale where their mean over own seeds is 1 and that over the background's is 0.

    refined: (B, K, N).  seeds: (B, N) labels of `confident_labels` from the plain CAM.  present: (B, K) bool.
    A map whose seeds do not stand out from the background, or that has none, comes back as 0.5: confident nowhere.
    """
    classes = torch.arange(1, refined.shape[1] + 1, device=refined.device)
    own = (seeds[:, None] == classes[None, :, None]).to(refined.dtype)  # (B, K, N)
    ground = (seeds == 0)[:, None].to(refined.dtype)
    object_mean = (refined * own).sum(dim=2) / own.sum(dim=2).clamp(min=1)
    ground_mean = (refined * ground).sum(dim=2) / ground.sum(dim=2).clamp(min=1)
    span = (object_mean - ground_mean)[..., None]
    scaled = ((refined - ground_mean[..., None]) / span.clamp(min=EPS)).clamp(0, 1)
    usable = (span > EPS) & own.any(dim=2)[..., None] & ground.any(dim=2)[..., None] & present[..., None]
    return torch.where(usable, scaled, 0.5)
