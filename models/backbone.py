"""Backbones by name, what stays frozen of a network, and batch normalisation folded for inference."""
import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # of any dimension, synchronised or not
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import resnet38
from utils.errors import UserError
from utils.transforms import Normalise

BN_POLICIES = ("auto", "frozen", "train")
State = dict[str, torch.Tensor]
Pair = tuple[nn.Module, str, str]  # (module, name of a convolution in it, name of the normalisation of its output)


class Backbone(Protocol):
    """What a network asks of its backbone, an nn.Module.

    stages: names of the last three feature maps, shallow to deep.  channels: of each.  stride: pixels per cell of the
    last.  normalise: the mean and deviation of the pixels that it takes.
    It may have more depths than its stages: see `settle_depths`.  It may set `reentrant`: several threads may then run
    it at once, as it keeps nothing between images.
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
    and their state dict, or raises UserError where they cannot be had; None: there are none to fetch.  hint: where else
    they are to be had.  own_names: a published state dict of it -> the same under its own names.  widths: whether there
    are others than 1.
    """
    build: Callable[..., nn.Module]
    imagenet: Callable[[], tuple[str, State]] | None = None
    hint: str = ""
    own_names: Callable[[State], State] = dict
    widths: bool = False


# torchvision and timm take seconds to import: only a network that is theirs imports them.

def _resnet(name: str) -> BackbonePlug:
    def build(output_stride: int, width: float, dilated: bool) -> nn.Module:
        from models.resnet import ResNet
        return ResNet(name, output_stride, dilated)

    def imagenet() -> tuple[str, State]:
        from models.resnet import imagenet_weights
        return imagenet_weights(name)
    return BackbonePlug(build, imagenet)


def _lite(name: str) -> BackbonePlug:
    def build(output_stride: int, width: float, dilated: bool) -> nn.Module:
        from models import efficientnet_lite
        return efficientnet_lite.build(name, output_stride, dilated)

    def imagenet() -> tuple[str, State]:
        from models import efficientnet_lite
        return efficientnet_lite.imagenet_weights(name)

    def own_names(state: State) -> State:
        from models import efficientnet_lite
        return efficientnet_lite.own_names(state)
    return BackbonePlug(build, imagenet, own_names=own_names)


BACKBONES: dict[str, BackbonePlug] = {
    **{name: _resnet(name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
    "resnet38": BackbonePlug(lambda output_stride, width, dilated: resnet38.ResNet38(width), widths=True,
                             hint=" (published as ilsvrc-cls_rna-a1_cls1000_ep-0001.params)"),
    **{name: _lite(name) for name in ("efficientnet_lite0", "efficientnet_lite2")},
}


def find_backbone(name: str) -> BackbonePlug:
    """The plug of a backbone: one of BACKBONES, or a model of timm; UserError for another name."""
    if name in BACKBONES:
        return BACKBONES[name]
    from models import timm_nets
    if not timm_nets.is_known(name):
        near = [*difflib.get_close_matches(name, BACKBONES, n=3), *timm_nets.similar(name)]
        raise UserError(f"unknown backbone {name!r}; pass --backbone with one of {', '.join(BACKBONES)}, or a model of "
                        f"timm{f', such as {near[0]}' if near else ''}")
    return BackbonePlug(lambda output_stride, width, dilated: timm_nets.TimmNet(name, output_stride, dilated),
                        partial(timm_nets.imagenet_weights, name) if timm_nets.has_weights(name) else None,
                        own_names=timm_nets.own_names)


def build_backbone(name: str, output_stride: int = 16, width: float = 1.0, dilated: bool = True) -> nn.Module:
    """A `Backbone` with random weights.

    name: see `find_backbone`.  output_stride: 8 or 16; resnet38 is published at 8 and stays there, and a network of
    timm that cannot be dilated keeps its own.  width: channel multiplier of resnet38; 1.0 is the published network.
    dilated: whether layers that lost their stride are dilated instead; IRN's are not.
    Raises UserError for an unknown name, and for a width of a backbone that has but one.
    """
    plug = find_backbone(name)
    if width != 1 and not plug.widths:
        raise UserError(f"{name} has no other width than its own, not {width:g} times it; pass --width 1, or "
                        "--backbone resnet38")
    return plug.build(output_stride=output_stride, width=width, dilated=dilated)


def settle_depths(backbone: nn.Module, names: Iterable[str] = ()) -> tuple[str, ...]:
    """The feature maps that a seed reads of a frozen backbone, which its `forward` then returns.

    names: of them; none: the backbone's own choice, `backbone.depths`, else its first two stages. The very last is not
    among these: the classes of the pretraining have bent it.
    Raises UserError for a name that the backbone does not have; more than its stages has one with a method `tap`.
    """
    names = tuple(names) or getattr(backbone, "depths", backbone.stages[:2])
    if hasattr(backbone, "tap"):
        backbone.tap(names)
    for name in names:
        if name not in backbone.channels:
            raise UserError(f"the backbone has no depth {name!r}; it has {', '.join(backbone.channels)}")
    return names


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


def training_format(network: Network, device: torch.device, precision: str) -> torch.memory_format:
    """The memory format in which a network trains fastest: channels last, but for the backbones that say otherwise of
    float32 on a CPU (`trains_contiguous`)."""
    contiguous = device.type == "cpu" and precision == "fp32" and getattr(network.backbone, "trains_contiguous", False)
    return torch.contiguous_format if contiguous else torch.channels_last


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
            folded = getattr(module, norm)
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), folded))
            setattr(module, norm, getattr(folded, "act", nn.Identity()))  # timm's hold the activation too
    return network.requires_grad_(False).to(device, memory_format=torch.channels_last)
