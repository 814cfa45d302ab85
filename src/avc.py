"""Training glue of AVC: the second view of a batch, the schedule, and the weighted sum of the terms (docs/avc.md)."""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models import avc
from models.classifier import classification_loss
from utils.loader import EpochBatches

AVC_RECORD = {"affinity_dims": 32, "affinity_steps": 4}  # how `build_network` is told to build the head
TERMS = ("equivariance", "agreement", "separation", "consistency")
CELL = 16                  # crops are CELL * k + 1 pixels wide, so are the windows and the views
SHARE, ZOOM = 0.6, (0.75, 1.25)  # least side of a window in crops, and how much it is scaled
COLOUR = (0.2, 0.2)        # how far contrast and brightness go, in standard deviations of ImageNet
RAMP = 0.1                 # of the training, over which the terms reach their weights
RELABEL = 0.5              # of the training, from which on labels come from the refined CAM
PLAIN, REFINED = (0.1, 0.4), (0.5, 0.8)  # low and high thresholds of reliable cells: of the CAM; of the refined one


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
        grid = tuple(min(side, avc.GRID) for side in first[2].shape[-2:])
        network.avc.observe(first[2], valid_cells(shown, grid))
        factor = ramp(progress, options["avc_start"])
        found = affinity_terms(network, Pair(images.shape[-2:], view, shown, other_shown, first, second), labels > 0,
                       weights, progress >= RELABEL) if factor else {}
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


def affinity_terms(network, pair, present, weights, relabel):
    """{name: scalar} of the terms whose weight is not 0.  relabel: whether refined CAMs give the reliable labels."""
    with torch.autocast(pair.shown.device.type, enabled=False):
        unit, other = network.avc(pair.first[2]), network.avc(pair.second[2])  # (B, d, h, w)
        grid, source = unit.shape[-2:], other.shape[-2:]
        back = avc.carrier(source, grid, pair.size, pair.view.window, pair.view.flip).to(unit.device)
        valid, other_valid = valid_cells(pair.shown, grid), valid_cells(pair.other_shown, source)
        both = (other_valid.float() @ back.T > 0.999) & valid
        matrix, other_matrix = avc.affinity(unit), avc.affinity(other)
        vectors = avc.affinity_vectors(matrix, valid)
        cam = avc.resized(pair.first[1].relu(), grid).flatten(2)  # (B, K, N)
        other_cam = avc.resized(pair.second[1].relu(), source).flatten(2)
        found = {}
        if weights["equivariance"]:
            found["equivariance"] = avc.equivariance(matrix, back @ other_matrix @ back.T, both)
        if weights["consistency"]:
            found["consistency"] = avc.cam_consistency(
                _refined(cam, vectors, network, both),
                _refined(other_cam, avc.affinity_vectors(other_matrix, other_valid), network, both, back),
                present, both)
        if weights["agreement"] or weights["separation"]:
            labels = _labels(torch.where(both[:, None], (cam + other_cam @ back.T) / 2, cam), vectors.detach(), present,
                             valid, network.affinity_steps if relabel else 0)
        if weights["agreement"]:
            found["agreement"] = avc.agreement(vectors, labels)
        if weights["separation"]:
            found["separation"] = avc.separation(unit, labels)
    return found


def _refined(cam, vectors, network, valid, back=None):
    """Refined maps (B, K, N) in the first view's frame, on [0, 1] over its valid cells."""
    maps = avc.refine(cam[..., None], vectors, network.affinity_steps).flatten(2)
    return avc.unit_range(maps if back is None else maps @ back.T, valid)


@torch.no_grad()
def _labels(cam, vectors, present, valid, steps):
    """Reliable labels (B, N) from CAMs (B, K, N), or from those refined by `steps` steps if that is not 0."""
    cam = cam / torch.where(valid[:, None], cam, 0).amax(dim=2, keepdim=True).clamp(min=avc.EPS)
    seeds = avc.reliable_labels(cam, present, valid, *PLAIN)
    if not steps:
        return seeds
    maps = avc.anchored(avc.refine(cam[..., None], vectors, steps).flatten(2), seeds, present)
    return avc.reliable_labels(maps, present, valid, *REFINED)
