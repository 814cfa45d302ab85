"""Backbones by name, what stays frozen of a network, and batch normalisation folded for inference."""
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # of any dimension, synchronised or not
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import resnet, resnet38
from utils.errors import UserError
from utils.transforms import Normalise

BN_POLICIES = ("auto", "frozen", "train")
Pair = tuple[nn.Module, str, str]  # (module, name of a convolution in it, name of the normalisation of its output)


class Backbone(Protocol):
    """What a network asks of its backbone, an nn.Module.

    stages: names of the last three feature maps, shallow to deep.  channels: of each.  stride: pixels per cell of the
    last.  normalise: the mean and deviation of the pixels that it takes.
    """
    stages: tuple[str, str, str]
    channels: dict[str, int]
    stride: int
    normalise: Normalise

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: (B, 3, H, W), normalised.  Returns {stage: (B, channels, h, w)}."""

    def blocks(self) -> list[list[nn.Module]]:
        """Modules in order of depth, for freezing the first n blocks."""

    def pairs(self) -> Iterable[Pair]:
        """The normalisations that may be folded: those that take exactly the output of one convolution, which nothing
        else takes.  Names cannot tell: a pre-activation block's bn1 comes before its conv1."""


@dataclass(frozen=True)
class BackbonePlug:
    """A backbone in BACKBONES.

    build: called with output_stride, width and dilated, by name.  imagenet: returns the address of its ImageNet weights
    and their state dict under the backbone's own names, or raises UserError where they cannot be had; None: there are
    none to fetch.  hint: where else they are to be had.
    """
    build: Callable[..., nn.Module]
    imagenet: Callable[[], tuple[str, dict[str, torch.Tensor]]] | None = None
    hint: str = ""


def _torchvision(name: str) -> BackbonePlug:
    return BackbonePlug(lambda output_stride, width, dilated: resnet.ResNet(name, output_stride, dilated),
                        partial(resnet.imagenet_weights, name))


BACKBONES: dict[str, BackbonePlug] = {
    "resnet18": _torchvision("resnet18"),
    "resnet34": _torchvision("resnet34"),
    "resnet50": _torchvision("resnet50"),
    "resnet101": _torchvision("resnet101"),
    "resnet38": BackbonePlug(lambda output_stride, width, dilated: resnet38.ResNet38(width),
                             hint=" (published as ilsvrc-cls_rna-a1_cls1000_ep-0001.params)"),
}


def build_backbone(name: str, output_stride: int = 16, width: float = 1.0, dilated: bool = True) -> nn.Module:
    """A `Backbone` with random weights.

    name: a key of BACKBONES; UserError for another.  output_stride: 8 or 16 (ResNet-18 to 101); resnet38 is published
    at 8 and stays there.  width: channel multiplier of resnet38; 1.0 is the published network.  dilated: whether a
    ResNet's layers that lost their stride are dilated instead; IRN's are not.
    """
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}; pass --backbone with one of {', '.join(BACKBONES)}")
    return BACKBONES[name].build(output_stride=output_stride, width=width, dilated=dilated)


class Network(nn.Module):
    """A network around a backbone whose frozen parts stay frozen whatever `train()` is told.

    Frozen batch normalisation uses its stored statistics and gets no gradient; published code that overrides `train()`
    by hand forgets one or the other. Other kinds of normalisation have no statistics and learn with their block.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self._frozen_norms = []

    def freeze(self, blocks: int = 0, bn: str = "frozen", loaded: Collection[str] = ()) -> Self:
        """Freeze the first `blocks` blocks of the backbone and batch normalisation by policy `bn`.

        bn: "frozen": all of the backbone's; "train": those outside the frozen blocks learn; "auto": a layer is frozen
        if its statistics came from a file, and learns if it is new.
        loaded: names of the modules that came from a file, relative to the backbone.
        """
        if bn not in BN_POLICIES:
            raise ValueError(f"unknown batch-normalisation policy {bn!r}; choose from {', '.join(BN_POLICIES)}")
        frozen = [module for block in self.backbone.blocks()[:blocks] for part in block for module in part.modules()]
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self._frozen_norms = [module for module in frozen if isinstance(module, _BatchNorm)]
        for name, module in self.backbone.named_modules():
            if isinstance(module, _BatchNorm) and (bn == "frozen" or bn == "auto" and name in loaded):
                module.requires_grad_(False)
                self._frozen_norms.append(module)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen_norms:
            module.eval()
        return self

    def pairs(self) -> Iterator[Pair]:
        """As `Backbone.pairs`; a head with batch normalisation adds its own."""
        yield from self.backbone.pairs()


def for_inference(network: Network, device: torch.device | str = "cpu") -> Network:
    """Fold batch normalisation into the convolutions before it, in place, and move the network to a device.

    The outputs stay the same up to rounding; the weights are no longer those of the network's record, so it is for
    inference only. Its memory format is channels last.
    Raises ValueError in training mode, where normalisation depends on the batch.
    """
    if network.training:
        raise ValueError("folding needs a network in eval mode")
    for module, conv, norm in list(network.pairs()):
        if isinstance(getattr(module, norm), _BatchNorm):  # not yet folded
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
    return network.requires_grad_(False).to(device, memory_format=torch.channels_last)
