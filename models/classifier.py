"""The CAM classifier: trunk, global average pooling, bias-free 1x1 convolution (Ahn & Kwak, CVPR 2018, Sec. 3.1)."""
from torch import nn
from torch.nn import functional as F

from models.common import CommonObject
from models.trunk import Network


class Classifier(Network):
    """Multi-label image classifier whose last convolution applied before pooling is the class activation map.

    trunk: see `models.trunk.build_trunk`.  classes: number of foreground classes K.  dropout: of whole channels (in
    [0, 1]), before the head.
    """

    def __init__(self, trunk, classes, dropout=0.5):
        super().__init__(trunk)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(trunk.channels[trunk.stages[-1]], classes, 1, bias=False)
        nn.init.normal_(self.head.weight, std=0.01)
        self.common = CommonObject(trunk.channels[trunk.stages[1]])

    def forward(self, images):
        """images: (B, 3, H, W) normalised RGB.  Returns logits (B, K)."""
        features = self.trunk(images)[self.trunk.stages[-1]]
        pooled = F.adaptive_avg_pool2d(self.dropout(features), 1)  # (B, D, 1, 1)
        return self.head(pooled).flatten(1)

    def cam(self, images):
        """images: (B, 3, H, W).  Returns (logits (B, K), cam (B, K, h, w)): the map before ReLU, at the trunk's stride.

        The mean of the map over (h, w) is the logit, as the head has no bias.
        """
        logits, cam, _ = self.localise(images)
        return logits, cam

    def localise(self, images):
        """As `cam`, and the common object's log-odds (B, h', w') on the grid of the last stage but one."""
        maps = self.trunk(images)
        cam = self.head(maps[self.trunk.stages[-1]]).float()
        return cam.mean(dim=(2, 3)), cam, self.common(maps[self.trunk.stages[1]])


def classification_loss(logits, labels):
    """Multi-label soft margin loss (PSA).  logits: (B, K).  labels: (B, K) in {0, 1}.  Returns a scalar, float32."""
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())
