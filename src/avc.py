"""Training glue of AVC: the second view of a batch, the schedule, and the weighted sum of the terms (docs/avc.md)."""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models import avc
from models.classifier import classification_loss
from utils.loader import EpochBatches

TERMS = ("equivariance", "agreement", "separation", "consistency")
DIMS, STEPS = 32, 4        # of the unit features; the power of A that refines the CAM
CELL = 16                  # crops are CELL * k + 1 pixels wide, so are the windows and the views
SHARE, ZOOM = 0.6, (0.75, 1.25)  # least side of a window in crops, and how much it is scaled
COLOUR = (0.2, 0.2)        # how far contrast and brightness go, in standard deviations of ImageNet
RAMP = 0.1                 # of the training, over which the terms reach their weights
RELABEL = 0.5              # of the training, from which on labels come from the refined CAM
# Low and high thresholds of reliable cells: of the CAM; of the refined one; with colours, of the refined shares.
PLAIN, REFINED, SHARES = (0.1, 0.4), (0.5, 0.8), (0.3, 0.6)


def record_of(options):
    """How `build_network` is told to build the affinity head of a run."""
    return {"affinity_dims": DIMS, "affinity_steps": STEPS, "affinity_colour": options["avc_colour"]}


@dataclass(frozen=True)
class View:
    """How a second view is cut from images.  window: (top, left, height, width) in pixels.  size: after scaling."""
    window: tuple
    size: tuple
    flip: bool


def draw_view(size):
    """A View of images of `size`, both sides CELL * k + 1, from torch's global generator."""
    cells = [(side - 1) // CELL for side in size]
    shown = [max(1, round(count * (SHARE + (1 - SHARE) * float(torch.rand(()))))) for count in cells]
    start = [int(torch.randint(count - part + 1, ())) for count, part in zip(cells, shown)]
    zoom = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * float(torch.rand(()))
    scaled = [min(count, max(1, round(part * zoom))) for count, part in zip(cells, shown)]
    return View((start[0] * CELL, start[1] * CELL, shown[0] * CELL + 1, shown[1] * CELL + 1),
                tuple(part * CELL + 1 for part in scaled), bool(torch.rand(()) < 0.5))


def shown_pixels(images):
    """(B, 1, H, W) bool: pixels that are no padding, which is exactly 0; no 8-bit colour is, once normalised."""
    return (images != 0).any(dim=1, keepdim=True)


def cut(images, view, start=0, of=None):
    """The second view of images (B, 3, H, W): window, scale, flip and other colours; padding stays 0.

    start, of: where the images begin in a batch of `of` images, for all of which colours are drawn; left out, they are
    the batch.
    Returns (images, pixels that are no padding (B, 1, h, w) bool).
    """
    top, left, height, width = view.window
    part = images[:, :, top:top + height, left:left + width]
    shown = shown_pixels(part)
    if part.shape[-2:] != view.size:
        part = F.interpolate(part, size=view.size, mode="bilinear", align_corners=True, antialias=True)
        # A pixel that padding has been mixed into is neither.
        shown = F.interpolate(shown.float(), size=view.size, mode="bilinear", align_corners=True) > 0.999
    if view.flip:
        part, shown = part.flip(-1), shown.flip(-1)
    drawn = torch.rand(2, of or len(part), 3, 1, 1, device="cpu")[:, start:start + len(part)]
    draws = drawn.to(part) * 2 - 1
    part = part * (1 + COLOUR[0] * draws[0, :, :1]) + COLOUR[1] * draws[1]
    return (part * shown).contiguous(memory_format=torch.channels_last), shown


def valid_cells(shown, grid):
    """(B, N) bool: cells of a grid whose own pixel is shown.  shown: (B, 1, H, W) bool.  grid: (h, w)."""
    rows, columns = (torch.linspace(0, side - 1, count).round().long()
                     for side, count in zip(shown.shape[-2:], grid))
    return shown[:, 0][:, rows][:, :, columns].flatten(1)


def ramp(progress, start):
    """Factor in [0, 1] of all terms.  progress: share of the training that is done."""
    return min(1.0, max(0.0, (progress - start) / RAMP))


def last_epoch_counts(validate):
    """Validation of AVC: its score is how far the affinities were trained, as labels say nothing about them."""
    def score(network):
        found = {} if validate is None else {"mean_average_precision": validate(network)["score"]}
        return {"score": float(network.avc.steps), **found}
    return score


def avc_loss(options, count):
    """The loss of stage 1 with --method avc, as `src.engine.Task` takes it.  count: of training images.

    Both views are classified. The schedule follows the head's own count of steps, which is saved with it.
    In several processes each term is the mean of their own means, weighed by their images, and the background that
    objects are separated from is that of the process's images.
    """
    weights = {name: options[f"avc_{name}"] for name in TERMS}
    total = len(EpochBatches(count, options["batch_size"], options["seed"], 0)) * options["epochs"]

    def loss(network, batch, part):
        images, labels = batch["image"], batch["labels"]
        shown, view = shown_pixels(images), draw_view(images.shape[-2:])
        other, other_shown = cut(images, view, part.start, part.of)
        first, second = network.training_maps(images), network.training_maps(other)
        progress = network.avc.steps.item() / total
        value = (classification_loss(first[0], labels) + classification_loss(second[0], labels)) / 2
        terms = {"classification": value.item()}
        network.avc.observe(first[2], valid_cells(shown, first[2].shape[-2:]))
        factor = ramp(progress, options["avc_start"])
        pair = Pair(images.shape[-2:], view, shown, other_shown, first, second)
        found = affinity_terms(network.avc, pair, labels > 0, weights, progress >= RELABEL) if factor else {}
        for name in TERMS:
            terms[name] = found[name].item() if name in found else 0.0
            value = value + factor * weights[name] * found[name] if name in found else value
        return value * part.share, {name: term * part.share for name, term in terms.items()}
    return loss


@dataclass
class Pair:
    """Two views of a batch.  first, second: what `Classifier.training_maps` gives.  shown, other_shown: no padding."""
    size: tuple
    view: View
    shown: torch.Tensor
    other_shown: torch.Tensor
    first: tuple
    second: tuple


def affinity_terms(head, pair, present, weights, relabel):
    """{name: scalar} of the terms whose weight is not 0.

    head: `models.avc.AffinityHead`.  present: (B, K) bool.  relabel: whether refined CAMs give the reliable labels
    (with colours they always do).
    """
    with torch.autocast(pair.shown.device.type, enabled=False):
        (unit, matrix), (_, other_matrix) = head.affinity(pair.first[2]), head.affinity(pair.second[2])
        grid, source = pair.first[2].shape[-2:], pair.second[2].shape[-2:]
        back = avc.carrier(source, grid, pair.size, pair.view.window, pair.view.flip).to(unit.device)
        valid, other_valid = valid_cells(pair.shown, grid), valid_cells(pair.other_shown, source)
        both = (other_valid.float() @ back.T > 0.999) & valid
        vectors = avc.affinity_vectors(matrix, valid)
        cam = avc.resized(pair.first[1].relu(), grid).flatten(2)  # (B, K, N)
        other_cam = avc.resized(pair.second[1].relu(), source).flatten(2)
        found = {}
        if weights["equivariance"]:
            found["equivariance"] = avc.equivariance(matrix, back @ other_matrix @ back.T, both)
        if weights["consistency"]:
            other_vectors = avc.affinity_vectors(other_matrix, other_valid)
            maps = head.refined(cam, vectors, valid), head.refined(other_cam, other_vectors, other_valid) @ back.T
            if not head.colour:  # shares are in [0, 1] as they are
                maps = [avc.unit_range(part, both) for part in maps]
            found["consistency"] = avc.cam_consistency(*maps, present, both)
        if weights["agreement"] or weights["separation"]:
            mean_cam = torch.where(both[:, None], (cam + other_cam @ back.T) / 2, cam)
            labels = _labels(head, mean_cam, vectors.detach(), present, valid, relabel)
        if weights["agreement"]:
            found["agreement"] = avc.agreement(vectors, labels)
        if weights["separation"]:
            found["separation"] = avc.separation(unit, labels)
    return found


@torch.no_grad()
def _labels(head, cam, vectors, present, valid, relabel):
    """Reliable labels (B, N) from CAMs (B, K, N), at least 0: from the refined ones with colours or if `relabel`."""
    if head.colour:
        return avc.reliable_labels(head.refined(cam, vectors, valid), present, valid, *SHARES)
    cam = cam / torch.where(valid[:, None], cam, 0).amax(dim=2, keepdim=True).clamp(min=avc.EPS)
    seeds = avc.reliable_labels(cam, present, valid, *PLAIN)
    if not relabel:
        return seeds
    return avc.reliable_labels(avc.anchored(head.refined(cam, vectors, valid), seeds, present), present, valid, *REFINED)
