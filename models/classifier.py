"""The CAM classifier: backbone, global average pooling, 1x1 convolution (Ahn & Kwak, CVPR 2018, Sec. 3.1)."""
import torch
from torch import nn
from torch.nn import functional as F

from models.backbone import Network


class Classifier(Network):
    """Multi-label image classifier whose last convolution, applied before pooling, is the class activation map.

    backbone: see `models.backbone.Backbone`.  classes: number of foreground classes K.  dropout: of whole channels, in
    [0, 1], before the head.  bias: of the head, as one fitted to stored features has; PSA's has none.
    last: the backbone's stage that the head reads, by default its last.
    A seed method (src/seeds) attaches its module as `seed`.
    """

    def __init__(self, backbone: nn.Module, classes: int, dropout: float = 0.5, bias: bool = False,
                 last: str | None = None):
        super().__init__(backbone)
        self.last = last or backbone.stages[-1]
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(backbone.channels[self.last], classes, 1, bias=bias)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, H, W) normalised RGB.  Returns logits (B, K)."""
        return self.classify(self.backbone(images))

    def classify(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Feature maps of the backbone -> logits (B, K)."""
        pooled = F.adaptive_avg_pool2d(self.dropout(maps[self.last]), 1)  # (B, D, 1, 1)
        return self.head(pooled).flatten(1)

    def cam(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Feature maps -> class activation maps (B, K, h, w), float32, before ReLU, at the backbone's stride.

        The mean of a map over (h, w) is the logit of its class; a bias is part of it.
        """
        return self.head(maps[self.last]).float()


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Multi-label soft margin loss (PSA).  logits: (B, K).  labels: (B, K) in {0, 1}.  Returns a scalar, float32."""
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())
