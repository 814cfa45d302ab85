"""DeepLabV1 with a large field of view (Chen et al. 2015) on any backbone, and its loss."""
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from models.backbone import Network, Pair
from utils.grids import resize_tensor

HIDDEN = 512


class DeepLab(Network):
    """A backbone and a LargeFOV head.

    backbone: see `models.backbone.Backbone`.  classes: number of classes, background counted.  head: a key of HEADS.
    dropout: before the last convolution of the seamv1 head, in [0, 1].  dilation: of the head's 3x3; 12 is published
    for output stride 8, 6 sees as far at 16.  The head is as wide as the backbone's last map, at most 512; it is the
    part to train at 10 x the rate.
    """

    def __init__(self, backbone: nn.Module, classes: int, head: str = "seamv1", dropout: float = 0.5,
                 dilation: int = 12):
        super().__init__(backbone)
        inputs = backbone.channels[backbone.stages[-1]]
        if head not in HEADS:
            raise ValueError(f"unknown DeepLab head {head!r}; choose from {', '.join(HEADS)}")
        self.head = HEADS[head](inputs, min(HIDDEN, inputs), classes, dropout, dilation)
        # Published code draws the classifier from He's distribution too: logits of deviation 5, a first loss far above
        # log(classes). Near zero, all classes start alike.
        nn.init.normal_(self.head.cls_conv.weight, std=0.01)
        nn.init.zeros_(self.head.cls_conv.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, H, W) normalised RGB.  Returns logits (B, classes, h, w) at the backbone's stride."""
        return self.head(self.backbone(images)[self.backbone.stages[-1]])

    def pairs(self) -> Iterator[Pair]:
        """The backbone's pairs and those of the seamv1 head."""
        yield from super().pairs()
        if hasattr(self.head, "bn_fov"):
            yield from ((self.head, "conv_fov", "bn_fov"), (self.head, "conv_fov2", "bn_fov2"))


def seamv1_head(inputs: int, hidden: int, classes: int, dropout: float, dilation: int) -> nn.Sequential:
    """The head of SEAM's segmentation code, which AVC uses too: dilated 3x3, 1x1 and the classifier, with its names."""
    head = nn.Sequential(OrderedDict(
        conv_fov=nn.Conv2d(inputs, hidden, 3, padding=dilation, dilation=dilation, bias=False),
        # Published momentum is 3e-4, for runs of 20,000 iterations; shorter ones need statistics that follow sooner.
        bn_fov=nn.BatchNorm2d(hidden),
        relu_fov=nn.ReLU(inplace=True),
        conv_fov2=nn.Conv2d(hidden, hidden, 1, bias=False),
        bn_fov2=nn.BatchNorm2d(hidden),
        relu_fov2=nn.ReLU(inplace=True),
        dropout1=nn.Dropout(dropout),
        cls_conv=nn.Conv2d(hidden, classes, 1),
    ))
    for conv in (head.conv_fov, head.conv_fov2):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return head


def mctformer_head(inputs: int, hidden: int, classes: int, _: float, dilation: int) -> nn.Sequential:
    """The head of MCTformer's segmentation code: two dilated 3x3 with biases, no normalisation, no dropout."""
    head = nn.Sequential(OrderedDict(
        conv_fov=nn.Conv2d(inputs, hidden, 3, padding=dilation, dilation=dilation),
        relu_fov=nn.ReLU(inplace=True),
        cls_conv=nn.Conv2d(hidden, classes, 3, padding=dilation, dilation=dilation),
    ))
    nn.init.xavier_uniform_(head.conv_fov.weight)
    nn.init.zeros_(head.conv_fov.bias)
    return head


HEADS = {"seamv1": seamv1_head, "mctformer": mctformer_head}


def segmentation_loss(logits: torch.Tensor, target: torch.Tensor, ignore_index: int = 255,
                      pixels: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy at the target's resolution, averaged over the pixels that have a label.

    logits: (B, C, h, w), any float dtype; upsampled bilinearly in float32. Corners are aligned: crops measure
    stride * k + 1 pixels, so the corners of the grid lie on corner pixels.
    target: (B, H, W) int64, values in [0, C) or `ignore_index`.
    pixels: int64 scalar, the labelled pixels of the whole batch where these images are a micro-batch of it: the losses
    of all micro-batches then add up to that of the batch.  Left out, those of these images (`labelled_pixels`).
    Returns a float32 scalar; 0, with a gradient of zeros, if no pixel has a label.
    Raises ValueError if the shapes do not belong together.
    """
    if logits.dim() != 4 or target.dim() != 3 or len(logits) != len(target):
        raise ValueError(f"logits must be (B, C, h, w) and target (B, H, W) with the same B, "
                         f"not {tuple(logits.shape)} and {tuple(target.shape)}")
    logits = resize_tensor(logits.float(), target.shape[-2:])  # (B, C, H, W)
    total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / (labelled_pixels(target, ignore_index) if pixels is None else pixels).clamp(min=1)


def labelled_pixels(target: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """How many pixels have a label, int64 scalar.  target: (B, H, W)."""
    return (target != ignore_index).sum()
