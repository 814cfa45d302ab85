"""Resolved options in the groups that functions take: frozen, typed, by name.  A run's record stays one flat dict."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch


class Config:
    """A group of options; its fields are names of flags."""

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Pick the group's fields from a flat dict of options; a field with a default may be missing there."""
        return cls(**{field.name: _frozen(options[field.name]) for field in fields(cls) if field.name in options})


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class DataConfig(Config):
    """Which images: see `utils.datasets.open_dataset`."""
    dataset: str
    data_root: str
    split: str | None = None
    ids: str | None = None
    limit: int | None = None
    difficult: bool = True
    download: bool = False


@dataclass(frozen=True)
class BackboneConfig(Config):
    """How a backbone is built: see `models.backbone.build_backbone`."""
    backbone: str
    width: float = 1.0
    output_stride: int = 16
    dilated: bool = True


@dataclass(frozen=True)
class TrainConfig(Config):
    """How a network is trained: see `src.training.loop`."""
    batch_size: int
    epochs: int
    lr: float
    head_lr: float
    momentum: float
    weight_decay: float
    crop_size: int
    max_size: int
    seed: int
    val_fraction: float = 0.1
    bn: str = "auto"
    freeze: int = 0
    accumulate: int = 1
    clip_grad: float = 0.0
    compile: bool = False
    save_every: float = 0.0
    resume: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class MapConfig(Config):
    """How a network looks at an image: scales (of the image capped at `max_size` pixels), flip, and which classes.

    alternate: whether --flip shows every second scale flipped only, and the others unflipped only.
    """
    scales: tuple[float, ...] = (0.5, 1.0, 1.5)
    flip: bool = True
    labels: str = "predicted"
    max_size: int = 1024
    alternate: bool = False

    def plain(self) -> list[bool]:
        """For each scale, whether its only view is the image at scale 1, unflipped."""
        return [scale == 1 and flips == (False,) for scale, flips in zip(self.scales, self.flips())]

    def flips(self) -> list[tuple[bool, ...]]:
        """For each scale, whether its views are flipped horizontally."""
        if self.flip and self.alternate and len(self.scales) > 1:
            return [(bool(i % 2),) for i in range(len(self.scales))]
        return [(False, True) if self.flip else (False,)] * len(self.scales)


@dataclass(frozen=True)
class WalkConfig(Config):
    """The random walk: see `utils.random_walk.random_walk`; bg_alpha: exponent of the background score."""
    bg_alpha: float = 6.0
    beta: float = 8.0
    walk_steps: int = 256
    walk_eps: float = 1e-3
    radius: int = 5


@dataclass(frozen=True)
class Machine:
    """What the work runs on.  workers: processes that read images, processes or threads that run the CRF.
    skip_bad: leave out images that cannot be decoded, instead of stopping."""
    device: torch.device
    precision: str = "fp32"
    workers: int = 0
    skip_bad: bool = False

    def autocast(self) -> torch.autocast:
        """bf16 autocast of the networks, or nothing for fp32."""
        import torch
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
