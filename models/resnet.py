"""ResNet-18/34/50/101 as a dilated backbone with named feature maps, built from torchvision's blocks and names."""
import pickle
from collections.abc import Iterator

import torch
import torchvision
from torch import nn
from torch.hub import load_state_dict_from_url

from utils.errors import UserError
from utils.transforms import IMAGENET

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101")


class ResNet(nn.Module):
    """He et al., CVPR 2016, without pooling and classifier, dilated to a finer output stride.

    name: one of DEPTHS.  output_stride: 16 (layer4 keeps the grid of layer3) or 8 (layer3 and layer4 keep layer2's).
    dilated: whether what comes after a stride that was taken out is dilated, so that each weight meets the neighbours
    it was trained for; IRN (Ahn et al., CVPR 2019) goes without.
    Parameter names are torchvision's, so that its checkpoints load as they are.
    """
    stages = ("layer2", "layer3", "layer4")
    reentrant = True
    normalise = IMAGENET

    def __init__(self, name: str, output_stride: int = 16, dilated: bool = True):
        super().__init__()
        if name not in DEPTHS:
            raise ValueError(f"unknown ResNet {name!r}; choose from {', '.join(DEPTHS)}")
        if output_stride not in (8, 16):
            raise ValueError(f"output stride must be 8 or 16, not {output_stride}")
        net = getattr(torchvision.models, name)(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        unstrided = [(self.layer3, 1, 2), (self.layer4, 2, 4)] if output_stride == 8 else [(self.layer4, 1, 2)]
        for layer, first, rest in unstrided:
            unstride(layer, *((first, rest) if dilated else (1, 1)))
        self.stride = output_stride
        self.channels = {stage: _out_channels(getattr(self, stage)) for stage in self.stages}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: (B, 3, H, W) normalised RGB.  Returns {"layer2": stride 8, "layer3", "layer4": at most `stride`}."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        maps = {}
        for stage in self.stages:
            x = getattr(self, stage)(x)
            maps[stage] = x
        return maps

    def blocks(self) -> list[list[nn.Module]]:
        """Modules in order of depth, for freezing the first n."""
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def pairs(self) -> Iterator[tuple[nn.Module, str, str]]:
        """See `models.backbone.Backbone.pairs`: every batch normalisation of a ResNet follows a convolution."""
        yield self, "conv1", "bn1"
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            yield from ((block, f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}"))
            if block.downsample is not None:
                yield block.downsample, "0", "1"


def imagenet_weights(name: str) -> tuple[str, dict[str, torch.Tensor]]:
    """(address, state dict) of torchvision's first ImageNet weights, downloaded or found in its cache.

    Raises UserError, with what to do instead, if they cannot be had.
    """
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    try:
        return url, load_state_dict_from_url(url, progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot download the ImageNet weights of {name} ({error}); fetch {url} elsewhere and pass "
                        "--pretrained PATH, or pass --pretrained none") from None


def unstride(layer: nn.Sequential, first: int, rest: int) -> None:
    """Take the stride out of a ResNet layer: its first block's 3x3 gets dilation `first`, the others `rest`.

    The first block sees the undilated grid of the layer before, so it keeps that layer's dilation (as in torchvision's
    own `replace_stride_with_dilation`, which exists for bottleneck blocks only).
    """
    for index, block in enumerate(layer):
        dilation = first if index == 0 else rest
        for module in block.modules():
            if not isinstance(module, nn.Conv2d):
                continue
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def _out_channels(layer: nn.Sequential) -> int:
    return [module for module in layer[-1].modules() if isinstance(module, nn.Conv2d)][-1].out_channels
