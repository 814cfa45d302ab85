"""What a stage hands to the training loop: its network, its loss, its samples."""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """The part of a step's batch that is computed at once: by one of several processes, or by one after another.

    start: place of its first image in the batch.  images: of the part.  of: images in the whole batch.
    totals: what `Task.totals` counts in the whole batch.
    """
    start: int
    images: int
    of: int
    totals: torch.Tensor

    @property
    def share(self):
        """By which a mean over the part's images is multiplied, so that the parts add up to the batch's mean."""
        return self.images / self.of


def no_totals(batch):
    """Nothing: the loss is a mean over images, and `Part.share` is all it needs."""
    return torch.zeros(0, device=batch["index"].device)


@dataclass
class Task:
    """What one stage trains.

    step: "stage1", "stage2" or "deeplab".  network: the module that learns.
    loss: function (network, batch on the device, Part) -> (scalar loss, {term: number or scalar tensor}): what the part
    adds to the loss of its batch, so that parts add up to what the whole batch would give.
    samples: addressed by (epoch, index).  count: how many there are.
    validate: function (network) -> {"score": higher is better, ...}, or None.
    contents: function () -> what a checkpoint holds besides the loop's own state: networks, classes.
    totals: function (batch without its images) -> tensor (n,): what the loss's means are over, if not over images.
    idle: whether a step may leave some parameters without a gradient.
    """
    step: str
    network: torch.nn.Module
    loss: object
    samples: object
    count: int
    validate: object
    contents: object
    totals: object = no_totals
    idle: bool = False
