"""Wide-ResNet38 as a dilated backbone: model A1 of Wu et al. (2016) at output stride 8, as in PSA (Ahn & Kwak 2018)."""
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from utils.transforms import IMAGENET

# PSA's names and sizes: name of the stage's first block, blocks, channels between the two convolutions, channels out,
# stride of the first block, dilation of the first block's first 3x3, dilation of every other 3x3.
BASIC_STAGES = (
    ("b2", 3, 128, 128, 2, 1, 1),
    ("b3", 3, 256, 256, 2, 1, 1),
    ("b4", 6, 512, 512, 2, 1, 1),
    ("b5", 3, 512, 1024, 1, 1, 2),
)
STEM_CHANNELS = 64
BOTTLENECK_DILATION = 4


def scale_channels(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, at least 8."""
    return max(8, 8 * round(channels * width / 8))


class PreActivationBlock(nn.Module):
    """Batch normalisation and ReLU, then a residual branch beside a shortcut (He et al. 2016, identity mappings).

    The first block of a stage projects its activated input; the others pass the input itself on. This is not read off
    the channel counts, which can coincide at small widths, where the names must not move.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W).  Returns relu(bn(x)), which two of the blocks also hand out as a named feature map."""
        return F.relu(self.bn_branch2a(x), inplace=True)

    def forward(self, x: torch.Tensor, activated: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, C, H, W); activated: `activate(x)` where the caller has it already.  Returns (B, C', H', W')."""
        activated = self.activate(x) if activated is None else activated
        shortcut = self.conv_branch1(activated) if hasattr(self, "conv_branch1") else x
        return shortcut + self.branch(activated)


class BasicBlock(PreActivationBlock):
    """Two 3x3 convolutions.  project: whether the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, mid: int, outputs: int, stride: int, dilations: tuple[int, int], project: bool):
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, mid, 3, stride, padding=first, dilation=first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid)
        self.conv_branch2b1 = nn.Conv2d(mid, outputs, 3, padding=second, dilation=second, bias=False)
        if project:
            self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_branch2b1(self.conv_branch2a(x)), inplace=True)
        return self.conv_branch2b1(x)


class BottleneckBlock(PreActivationBlock):
    """1x1, dilated 3x3, 1x1, with whole channels dropped before the last two.  mids: channels after the first two."""

    def __init__(self, inputs: int, mids: Sequence[int], outputs: int, dilation: int, dropout: float):
        super().__init__()
        narrow, middle = mids
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, narrow, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(narrow)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(narrow, middle, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(middle)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_branch2b1(self.conv_branch2a(x)), inplace=True)
        x = self.conv_branch2b1(self.dropout_2b1(x))
        x = F.relu(self.bn_branch2b2(x), inplace=True)
        return self.conv_branch2b2(self.dropout_2b2(x))


class ResNet38(nn.Module):
    """Wide-ResNet38, model A1 (Wu, Shen & van den Hengel, "Wider or Deeper", 2016), without its classifier.

    width: factor on every channel count, > 0; each is rounded to a multiple of 8 and is at least 8. 1.0 is the
    published network of 105 M parameters.  Raises ValueError for a width that is not positive.
    Parameter names are those of PSA's published checkpoints at every width. `channels` gives the sizes of the maps
    named in `stages`, `stride` is the output stride of all three.
    """
    stages = ("conv4", "conv5", "conv6")
    reentrant = True
    stride = 8
    normalise = IMAGENET
    # oneDNN's float32 kernels for wide dilated 3x3 convolutions: a step at 448 takes 21.2 s so, 24.9 in channels last,
    # on two AVX2 cores. ResNet-50 and EfficientNet-Lite are as fast or up to 1.5 times as fast in channels last.
    trains_contiguous = True

    def __init__(self, width: float = 1.0):
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be positive, not {width}; 1.0 is the published network")
        self._groups = [["conv1a"]]
        self.conv1a = nn.Conv2d(3, scale_channels(STEM_CHANNELS, width), 3, padding=1, bias=False)
        outputs = STEM_CHANNELS
        for name, count, *shape in BASIC_STAGES:
            outputs = self._add_stage(name, count, outputs, shape, width)
        sizes = [scale_channels(channels, width) for channels in (512, 1024, 2048, 4096)]
        self.b6 = BottleneckBlock(sizes[1], sizes[0:2], sizes[2], BOTTLENECK_DILATION, dropout=0.3)
        self.b7 = BottleneckBlock(sizes[2], sizes[1:3], sizes[3], BOTTLENECK_DILATION, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(sizes[3])
        self._groups += [["b6"], ["b7", "bn7"]]
        self.channels = dict(zip(self.stages, (sizes[0], sizes[1], sizes[3])))
        self._initialise()

    def _add_stage(self, name, count, inputs, shape, width):
        """Add blocks `name`, `name`_1, ...  shape: as in BASIC_STAGES.  Returns the unscaled channels coming out."""
        mid, outputs, stride, first_dilation, dilation = shape
        names = [name] + [f"{name}_{index}" for index in range(1, count)]
        for index, block_name in enumerate(names):
            sizes = [scale_channels(channels, width) for channels in (outputs if index else inputs, mid, outputs)]
            block = (BasicBlock(*sizes, 1, (dilation, dilation), project=False) if index
                     else BasicBlock(*sizes, stride, (first_dilation, dilation), project=True))
            self.add_module(block_name, block)
        self._groups.append(names)
        return outputs

    def _initialise(self):
        # He et al. 2015 by fan in: every branch and projection then emits variance 1 from its normalised input, so the
        # variance of a sum grows by 1 a block (at most 7, after b4_5) and not by a factor.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: (B, 3, H, W) normalised RGB.

        Returns {"conv4", "conv5", "conv6"}, each (B, channels, ceil(H / 8), ceil(W / 8)) and >= 0: the activated
        inputs of b5 and b6, and the activated output of b7 (PSA's `forward_as_dict`).
        """
        x = self.conv1a(x)
        for name in [name for group in self._groups[1:4] for name in group]:  # b2 to b4_5
            x = getattr(self, name)(x)
        conv4 = self.b5.activate(x)
        x = self.b5_2(self.b5_1(self.b5(x, conv4)))
        conv5 = self.b6.activate(x)
        x = self.b7(self.b6(x, conv5))
        return {"conv4": conv4, "conv5": conv5, "conv6": F.relu(self.bn7(x), inplace=True)}

    def blocks(self) -> list[list[nn.Module]]:
        """Modules in order of depth, for freezing the first n: seven lists, conv1a to b7 with bn7."""
        return [[getattr(self, name) for name in group] for group in self._groups]

    def pairs(self) -> Iterator[tuple[nn.Module, str, str]]:
        """See `models.backbone.Backbone.pairs`: the first normalisation of a block, and bn7, follow a sum instead."""
        for block in self.modules():
            if isinstance(block, PreActivationBlock):
                yield block, "conv_branch2a", "bn_branch2b1"
            if isinstance(block, BottleneckBlock):
                yield block, "conv_branch2b1", "bn_branch2b2"
