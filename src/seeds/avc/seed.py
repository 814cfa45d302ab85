"""Affinity vector consistency (AVC) as a seed: its schedule, its weighted terms, its refined CAMs (docs/avc.md)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from models.classifier import Classifier, classification_loss
from src.seeds.avc import losses, views
from src.seeds.avc.head import EPS, TRAINING_GRID, AffinityHead, affinity_vectors
from src.seeds.cam import CamConfig, Plan, Seed, sum_views, unit_maximum
from src.seeds.common import SHARPNESS
from utils.errors import UserError
from utils.grids import Size, resize_tensor

if TYPE_CHECKING:
    from src.training.loop import MicroBatch

TERMS = ("equivariance", "agreement", "separation", "consistency")
DIMS, POWER = 32, 4  # of the unit features; of A, which refines the CAM
RAMP = 0.1           # of the training, over which the terms reach their weights
RELABEL = 0.5        # of the training, from which on labels come from the refined CAM
# Low and high thresholds of confident cells: of the CAM; of the refined one; with colours, of the refined ratios.
PLAIN, REFINED, RATIOS = (0.1, 0.4), (0.5, 0.8), (0.3, 0.6)


@dataclass(frozen=True)
class AvcConfig(CamConfig):
    """The flags of src/seeds/avc/flags.py."""
    avc_equivariance: float = 2.0
    avc_agreement: float = 0.2
    avc_separation: float = 1.0
    avc_consistency: float = 0.0
    avc_colour: float = 0.0
    avc_start: float = 0.2

    def weights(self) -> dict[str, float]:
        """Of each of TERMS."""
        return {name: getattr(self, f"avc_{name}") for name in TERMS}


class AffinityConsistency(Seed):
    """A CAM refined along affinities that two views of an image agree on."""
    name = "avc"
    Settings = AvcConfig
    keeps_last = True
    sparse = True

    def __init__(self, channels: int, dims: int, power: int, colour: float):
        super().__init__()
        self.head = AffinityHead(channels, dims, power, colour)

    @classmethod
    def check(cls, plan: Plan) -> None:
        if plan.head_only:
            raise UserError("--method avc trains its affinities, and --head_only trains nothing; leave --head_only out")
        if plan.settings.cutmix:
            raise UserError("--cutmix pastes images together, and --method avc compares the parts of one object; "
                            "leave one of them out")
        if plan.accumulate > 1:
            raise UserError("--method avc compares all images of a step, which --accumulate takes apart; leave one of "
                            "them out")

    @classmethod
    def default_freeze(cls, blocks: int) -> int:
        return blocks - 1

    @classmethod
    def record(cls, settings: AvcConfig) -> dict[str, object]:
        return {"name": cls.name, "dims": DIMS, "power": POWER, "colour": settings.avc_colour}

    @classmethod
    def build(cls, classifier: Classifier, dims: int = DIMS, power: int = POWER, colour: float = 0.0) -> Self:
        return cls(classifier.backbone.channels[classifier.backbone.stages[1]], dims, power, colour)

    def loss(self, classifier: Classifier, batch: Mapping[str, torch.Tensor], micro: MicroBatch, settings: AvcConfig
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Both views are classified; the terms set in as the training goes on.

        In several processes each term is the mean of their own means, weighted by their images, and the background that
        objects are separated from is that of the process's images.
        """
        images, labels = batch["image"], batch["labels"]
        view = views.draw_view(images.shape[-2:])
        other, other_pixels = views.cut(images, view)
        pair = Pair(images.shape[-2:], view, views.valid_pixels(images), other_pixels,
                    self._look(classifier, images), self._look(classifier, other))
        value = (classification_loss(pair.first.logits, labels) + classification_loss(pair.second.logits, labels)) / 2
        terms = {"classification": value.detach()}
        described = pair.first.described
        self.head.observe(described, views.valid_cells(pair.pixels, described.shape[-2:]))
        factor = min(1.0, max(0.0, (micro.progress - settings.avc_start) / RAMP))
        weights = settings.weights()
        found = affinity_terms(self.head, pair, labels > 0, weights, micro.progress >= RELABEL) if factor else {}
        for name in TERMS:
            terms[name] = found[name].detach() if name in found else value.new_zeros(())
            value = value + factor * weights[name] * found[name] if name in found else value
        return value * micro.weight, {name: term * micro.weight for name, term in terms.items()}

    def _look(self, classifier: Classifier, images: torch.Tensor) -> Look:
        features, last = classifier.backbone(images), classifier.last
        logits = classifier.classify(features)
        cam = classifier.cam({last: features[last].detach()}).detach()
        return Look(logits, cam, self.head.describe(features[classifier.backbone.stages[1]], images, TRAINING_GRID))

    def maps(self, classifier: Classifier, features: Mapping[str, torch.Tensor], cam: torch.Tensor,
             images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The ReLU of the CAM, propagated along the affinities: (B, K, h', w') on their grid."""
        matrix, grid = self._affinities(features[classifier.backbone.stages[1]], images)
        valid = torch.ones(matrix.shape[:2], dtype=torch.bool, device=matrix.device)
        cam = resize_tensor(cam.relu(), grid).flatten(2)
        return (self.head.refined(cam, affinity_vectors(matrix, valid), valid).unflatten(2, grid),)

    def merge(self, views: Sequence[tuple[torch.Tensor, ...]], keys: np.ndarray, size: Size) -> np.ndarray:
        cam = sum_views([one[:, keys] for one, *_ in views], size)
        if self.head.colour:
            return unit_maximum(sharpened(cam / sum(len(one) for one, *_ in views)))
        # Averages with affinity vectors leave a floor under a map: it is taken away, and the map sharpened so that what
        # is halfway from it to the maximum meets the background score of the default alpha.
        return unit_maximum(unit_maximum(cam - cam.min(axis=(1, 2), keepdims=True)) ** SHARPNESS)

    def affinities(self, classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """As `Seed.affinities`, but those of the affinity head."""
        return self._affinities(classifier.backbone(images)[classifier.backbone.stages[1]], images)

    def _affinities(self, features: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, Size]:
        unit, matrix = self.head.affinity(self.head.describe(features, images))
        return matrix, tuple(unit.shape[-2:])


def sharpened(ratios: np.ndarray) -> np.ndarray:
    """`refined_ratios` (K, h, w), of which 0.5 is undecided, as maps: 0.5, once divided by its map's maximum, meets the
    background score of the default alpha.  In a map up to 0.55 that is nine tenths of the maximum."""
    highest = np.maximum(ratios.max(axis=(1, 2), keepdims=True), 1e-8)
    undecided = np.minimum(0.5 / highest, 0.9)
    return (ratios / highest) ** (SHARPNESS * np.log(0.5) / np.log(undecided))


@dataclass
class Look:
    """One view: logits (B, K), cam (B, K, h, w) before ReLU, what the head's `describe` says."""
    logits: torch.Tensor
    cam: torch.Tensor
    described: torch.Tensor


@dataclass
class Pair:
    """Two views of a batch.  size: of the images.  pixels, other_pixels: that are no padding (B, 1, H, W) bool."""
    size: Size
    view: views.View
    pixels: torch.Tensor
    other_pixels: torch.Tensor
    first: Look
    second: Look


def affinity_terms(head: AffinityHead, pair: Pair, present: torch.Tensor, weights: Mapping[str, float], relabel: bool
                   ) -> dict[str, torch.Tensor]:
    """{name: scalar} of the terms whose weight is not 0.

    present: (B, K) bool.  relabel: whether refined CAMs give the confident labels (with colours they always do).
    """
    with torch.autocast(pair.pixels.device.type, enabled=False):
        unit, matrix = head.affinity(pair.first.described)
        _, other_matrix = head.affinity(pair.second.described)
        grid, source = pair.first.described.shape[-2:], pair.second.described.shape[-2:]
        back = views.carrier(source, grid, pair.size, pair.view, unit.device)
        valid, other_valid = views.valid_cells(pair.pixels, grid), views.valid_cells(pair.other_pixels, source)
        both = (other_valid.float() @ back.T > 0.999) & valid
        vectors = affinity_vectors(matrix, valid)
        cam = resize_tensor(pair.first.cam.relu(), grid).flatten(2)  # (B, K, N)
        other_cam = resize_tensor(pair.second.cam.relu(), source).flatten(2)
        found = {}
        if weights["equivariance"]:
            found["equivariance"] = losses.equivariance(matrix, back @ other_matrix @ back.T, both)
        if weights["consistency"]:
            other_vectors = affinity_vectors(other_matrix, other_valid)
            maps = head.refined(cam, vectors, valid), head.refined(other_cam, other_vectors, other_valid) @ back.T
            if not head.colour:  # ratios are in [0, 1] as they are
                maps = [losses.unit_range(part, both) for part in maps]
            found["consistency"] = losses.cam_consistency(*maps, present, both)
        if weights["agreement"] or weights["separation"]:
            mean_cam = torch.where(both[:, None], (cam + other_cam @ back.T) / 2, cam)
            labels = _labels(head, mean_cam, vectors.detach(), present, valid, relabel)
        if weights["agreement"]:
            found["agreement"] = losses.agreement(vectors, labels, present.shape[1])
        if weights["separation"]:
            found["separation"] = losses.separation(unit, labels)
    return found


@torch.no_grad()
def _labels(head: AffinityHead, cam: torch.Tensor, vectors: torch.Tensor, present: torch.Tensor, valid: torch.Tensor,
            relabel: bool) -> torch.Tensor:
    """Confident labels (B, N) from CAMs (B, K, N), at least 0: from the refined ones with colours or if `relabel`."""
    if head.colour:
        return losses.confident_labels(head.refined(cam, vectors, valid), present, valid, *RATIOS)
    cam = cam / torch.where(valid[:, None], cam, 0).amax(dim=2, keepdim=True).clamp(min=EPS)
    seeds = losses.confident_labels(cam, present, valid, *PLAIN)
    if not relabel:
        return seeds
    refined = losses.anchored(head.refined(cam, vectors, valid), seeds, present)
    return losses.confident_labels(refined, present, valid, *REFINED)
