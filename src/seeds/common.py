"""The common object as a seed: which pixels show what the images of a class have in common, in closed form.

A CAM finds the part that tells classes apart, often only the head of an animal. What all images of a class share is the
whole object. Two linear steps on features that classification has not bent towards such parts (those of the frozen,
pretrained backbone) find it without any pixel label:

1. The first principal component of the features of each class's images separates object from background (deep
   descriptor transforming: Wei et al., Pattern Recognition 2019). Its sign is the one that agrees with the CAM.
2. Taking its two sides as labels, Fisher's linear discriminant of all classes together relabels the pixels; repeated
   until no label changes (discriminative clustering). The pooled within-side covariance whitens textures and lighting.

The result is one 1x1 convolution. The combination is this project's own; it is not part of PSA.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch

from models.classifier import Classifier
from src.seeds.cam import Plan, Reader, Seed, needs_pretrained, sum_views, unit_maximum
from utils.errors import UserError
from utils.grids import Size, resize_tensor
from utils.log import say

RIDGE = 0.3  # of the mean variance, added to the covariance's diagonal
ITERATIONS = 100
DESCRIPTORS = 65_536  # to which the discriminant is fitted: 0.27 GB at 1024 channels
LEAST = 4  # descriptors of an image; of a split with too many images a part is drawn
SHARPNESS = 2.2  # an undecided pixel then meets the background score of the default alpha: 0.5^2.2 = (1 - 0.5^2.2)^6


class CommonObject(Seed):
    """Log-odds of object against background say where the object is, the CAM says which class it is."""
    name = "common"
    closed_form = True

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(channels))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def check(cls, plan: Plan) -> None:
        needs_pretrained(plan, cls.name)

    @classmethod
    def default_freeze(cls, blocks: int) -> int:
        return blocks - 1

    @classmethod
    def build(cls, classifier: Classifier) -> Self:
        return cls(classifier.backbone.channels[classifier.backbone.stages[1]])

    def log_odds(self, features: torch.Tensor) -> torch.Tensor:
        """features: (B, D, h, w).  Returns the log-odds of object against background (B, h, w), float32."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("bdhw,d->bhw", features.float(), self.weight) + self.bias

    def maps(self, classifier: Classifier, features: Mapping[str, torch.Tensor], cam: torch.Tensor,
             images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cam, self.log_odds(features[classifier.backbone.stages[1]])[:, None]

    def merge(self, views: Sequence[tuple[torch.Tensor, ...]], keys: np.ndarray, size: Size) -> np.ndarray:
        """The object's probability, sharpened, divided among the classes in proportion to their CAMs."""
        cam = sum_views([one[:, keys].relu() for one, _ in views], size)
        if not len(cam):
            return cam
        if len(cam) > 1 and not cam.any(axis=0).all():  # where no CAM fires, the one that falls short least
            raw = sum_views([one[:, keys] for one, _ in views], size)
            cam = np.where(cam.any(axis=0), cam, np.exp(raw - raw.max(axis=0)))
        odds = sum_views([one for _, one in views], size)[0] / sum(len(one) for _, one in views)
        ratio = (cam + 1e-6) / (cam.max(axis=0) + 1e-6)
        return unit_maximum(ratio / (1 + np.exp(-np.clip(odds, -30, 30))) ** SHARPNESS)

    @torch.no_grad()
    def fit(self, classifier: Classifier, read: Reader, labels: np.ndarray, seed: int) -> None:
        """Fit to descriptors sampled from the images (see the module's text); says what it found."""
        count = len(labels)
        per_image, positions = max(LEAST, DESCRIPTORS // count), range(count)
        if per_image * count > max(DESCRIPTORS, LEAST):
            positions = sorted(np.random.default_rng(seed).permutation(count)[:DESCRIPTORS // per_image].tolist())
        rng = torch.Generator().manual_seed(seed)
        stage = classifier.backbone.stages[1]
        samples = [_sample(features[stage], cam[:, torch.from_numpy(keys)], keys, per_image, rng)
                   for features, cam, keys in read(positions) if len(keys)]
        if not samples:
            raise UserError("no image has a label; --method common needs labelled images, use --method cam")
        descriptors, classes, cams = (torch.cat(parts) for parts in zip(*samples))
        ratio = self.fit_descriptors(descriptors, classes, cams)
        say(f"Common object: fitted to {len(descriptors)} descriptors, {ratio:.0%} of them object")

    def fit_descriptors(self, descriptors: torch.Tensor, classes: torch.Tensor, cam: torch.Tensor) -> float:
        """descriptors: (N, D) float32.  classes: (N,) int, a class of the image each came from.  cam: (N,) float, that
        class's CAM there.  Returns the ratio of descriptors called object.
        """
        side = _principal_sides(descriptors, classes, cam)
        for _ in range(ITERATIONS):
            weight, bias = _discriminant(descriptors, side)
            previous, side = side, descriptors @ weight + bias > 0
            if torch.equal(side, previous):
                break
        ratio = side.float().mean()
        self.weight.copy_(weight)
        self.bias.copy_(bias + torch.logit(ratio, eps=1e-3))
        return ratio.item()


def _sample(features: torch.Tensor, raw: torch.Tensor, keys: np.ndarray, count: int, rng: torch.Generator
            ) -> tuple[torch.Tensor, ...]:
    """Up to `count` random cells of an image: features (n, D), the one of its classes whose normalised CAM is highest
    there (n,), and that CAM (n,).  features: (1, D, h', w').  raw: (1, K, h, w), CAMs of the classes `keys`."""
    chosen = torch.randperm(features[0, 0].numel(), generator=rng)[:count].to(features.device)
    cam, raw = (resize_tensor(part, features.shape[-2:])[0].flatten(1) for part in (raw.relu(), raw))  # (K, N)
    cam = (cam / cam.amax(dim=1, keepdim=True).clamp(min=1e-8))[:, chosen]
    highest, which = cam.max(dim=0)  # (n,)
    which = torch.where(highest > 0, which, raw[:, chosen].argmax(dim=0))
    return features[0].flatten(1).T[chosen].float().cpu(), torch.from_numpy(keys)[which.cpu()], highest.cpu()


def _principal_sides(descriptors: torch.Tensor, classes: torch.Tensor, cam: torch.Tensor) -> torch.Tensor:
    """(N,) bool: the positive side of the first principal component of each class, signed by the CAM."""
    side = torch.zeros(len(descriptors), dtype=torch.bool)
    for label in classes.unique():
        chosen = classes == label
        centred = descriptors[chosen] - descriptors[chosen].mean(dim=0)
        component = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        agrees = component @ (cam[chosen] - cam[chosen].mean()) > 0
        side[chosen] = component > 0 if agrees else component < 0
    return side


def _discriminant(descriptors: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fisher's linear discriminant between the two sides, of equal priors: weight (D,) and bias."""
    if side.all() or not side.any():
        raise UserError("the features of the training images have no two sides; use --method cam")
    means = torch.stack([descriptors[~side].mean(dim=0), descriptors[side].mean(dim=0)])  # (2, D)
    residual = descriptors - means[side.long()]
    covariance = residual.T @ residual / len(descriptors)  # (D, D)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, means[1] - means[0])
    return weight, -weight @ means.mean(dim=0)
