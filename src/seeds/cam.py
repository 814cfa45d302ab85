"""The plain CAM as a seed, and the hooks by which other seed methods depart from it."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.classifier import Classifier, classification_loss
from utils.config import Config
from utils.errors import UserError
from utils.grids import Size, resize_tensor

if TYPE_CHECKING:
    from src.training.loop import MicroBatch

# (positions in a split) -> of each image: its feature maps, its CAM (1, K, h, w) before ReLU, its zero-based classes
Reader = Callable[[Sequence[int]], Iterable[tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]]]
FINEST_GRID = 28  # cells a side at most of an affinity map, which has their fourth power of entries


@dataclass(frozen=True)
class CamConfig(Config):
    """cutmix: probability that a step mixes its images, see `cutmix`."""
    cutmix: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How stage 1 is going to run, for `Seed.check`.

    settings: of the seed method.  pretrained: whether the backbone starts from pretrained weights.  blocks: that the
    backbone has.  freeze: of them, None if the method is to choose.  accumulate: micro-batches a step.  head_only:
    whether the head is fitted and nothing is trained.
    """
    settings: Config
    pretrained: bool
    blocks: int
    freeze: int | None
    accumulate: int
    head_only: bool = False


class Seed(nn.Module):
    """The plain CAM: ReLU of the class activation maps, summed over views, divided by their maximum.

    An instance is attached to the classifier as `seed`; its tensors are saved with the classifier's, and `record` says
    how `build` makes it again.  Subclasses override what differs.
    """
    name = "cam"
    Settings: type[Config] = CamConfig
    closed_form = False  # whether `fit` is to be called once the classifier is trained
    keeps_last = False   # whether model_best is the last epoch's: validation by labels says nothing about the method
    sparse = False       # whether a training step may leave some parameters without a gradient
    depths: Sequence[str] = ()  # names of the backbone's feature maps that `fit` reads

    @classmethod
    def check(cls, plan: Plan) -> None:
        """UserError, before any work, if stage 1 cannot run as planned."""

    @classmethod
    def default_freeze(cls, blocks: int) -> int:
        """How many of the backbone's blocks stay as loaded, if --freeze is left out."""
        return 2

    @classmethod
    def build(cls, classifier: Classifier) -> Self:
        """A new seed for a classifier.  Subclasses take what their `record` returns besides."""
        return cls()

    @classmethod
    def record(cls, settings: Config) -> dict[str, object]:
        """Plain values by which `build` makes the seed of a run with these settings again."""
        return {"name": cls.name}

    def loss(self, classifier: Classifier, batch: Mapping[str, torch.Tensor], micro: MicroBatch,
             settings: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What a micro-batch adds to the loss of its batch, and its terms, detached.

        batch: "image" (B, 3, H, W), "labels" (B, K) in {0, 1}.
        """
        images, labels = batch["image"], batch["labels"]
        if settings.cutmix and torch.rand(()) < settings.cutmix:
            images, labels = cutmix(images, labels)
        return classification_loss(classifier(images), labels) * micro.weight, {}

    def wanted(self, labels: np.ndarray, seed: int) -> Sequence[int]:
        """Positions of the images that `fit` will read: an earlier pass keeps their `depths`.  Arguments as of `fit`.
        """
        return ()

    @classmethod
    def is_fitted(cls, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether `fit` was called, if `closed_form`: until then the seed's `weight` is zeros.

        state: of the classifier, "seed." before the seed's tensors.  Tensors that are missing are not judged here.
        """
        weight = state.get("seed.weight") if cls.closed_form else None
        return weight is None or bool(weight.any())

    def fit(self, classifier: Classifier, read: Reader, labels: np.ndarray, seed: int) -> None:
        """Fit the seed's own tensors in closed form (only if `closed_form`).

        read: see `Reader`, one pass over chosen images.  labels: (N, K) of the split.  seed: of what is drawn.
        """

    def maps(self, classifier: Classifier, features: Mapping[str, torch.Tensor], cam: torch.Tensor,
             images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What one view says: tensors (B, C, h, w), float32, each on a grid of its own; the first has a map a class.

        features: maps of the backbone.  cam: (B, K, h, w) before ReLU.  images: (B, 3, H, W) normalised.
        """
        return (cam,)

    def merge(self, views: Sequence[tuple[torch.Tensor, ...]], keys: np.ndarray, size: Size) -> np.ndarray:
        """One map for each of an image's classes from all its views: (K, *size) float32 in [0, 1].

        views: for each scale what `maps` returned of its V views, (V, C, h, w); those of flipped ones are flipped back.
        keys: (K,) zero-based classes.
        """
        return unit_maximum(sum_views([cam[:, keys].relu() for cam, *_ in views], size))

    def affinities(self, classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """Affinities of all pairs of cells (B, N, N) in [0, 1] and their grid (h, w), for pictures.

        For a plain CAM the ReLU of the cosines of its features.  images: (B, 3, H, W) normalised.
        """
        features = classifier.backbone(images)[classifier.backbone.stages[1]].float()
        grid = tuple(min(side, FINEST_GRID) for side in features.shape[-2:])
        flat = F.normalize(resize_tensor(features, grid), dim=1).flatten(2)  # (B, D, N)
        return torch.relu(flat.transpose(1, 2) @ flat), grid


def sum_views(scales: Sequence[torch.Tensor], size: Size) -> np.ndarray:
    """Sum of the maps (V, K, h, w) of several scales, resized.  Returns (K, *size)."""
    total = np.zeros((scales[0].shape[1], *size), np.float32)
    if not len(total):  # an image without a class
        return total
    for maps in scales:
        total += resize_tensor(maps.sum(dim=0, keepdim=True), size)[0].cpu().numpy()
    return total


def unit_maximum(cam: np.ndarray) -> np.ndarray:
    """Divide each of the maps (K, h, w), at least 0, by its own maximum."""
    return cam / np.maximum(cam.max(axis=(1, 2), keepdims=True, initial=0.0), 1e-8)


def cutmix(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste a rectangle of the image before it in the batch into each image; its labels count by the area (CutMix).

    Yun et al., ICCV 2019. Keeps the classifier from inferring a class from the absence of the others.
    images: (B, 3, H, W).  labels: (B, K) in [0, 1].  Draws from torch's global generator.
    Returns (images, labels float32), both new; the area is uniform in [0, 1], the rectangle shaped like the image.
    """
    labels = labels.float()
    height, width = images.shape[-2:]
    side = torch.rand(()).sqrt()
    h, w = int(height * side), int(width * side)
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    mixed, ratio = images.clone(), h * w / (height * width)
    mixed[..., top:top + h, left:left + w] = images[..., top:top + h, left:left + w].roll(1, 0)
    return mixed, (1 - ratio) * labels + ratio * labels.roll(1, 0)


def needs_pretrained(plan: Plan, name: str) -> None:
    """UserError unless the features that a method reads are pretrained and stay frozen."""
    needed = plan.blocks - 1
    if not plan.pretrained:
        raise UserError(f"--method {name} reads pretrained features; pass --pretrained PATH, or --method cam")
    if plan.freeze is not None and plan.freeze < needed:
        raise UserError(f"--method {name} needs the features of the pretrained backbone: pass --freeze {needed} or "
                        "more, or --method cam")
