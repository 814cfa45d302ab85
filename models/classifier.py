"""The CAM classifier: trunk, global average pooling, bias-free 1x1 convolution (Ahn & Kwak, CVPR 2018, Sec. 3.1)."""
import torch
from torch import nn
from torch.nn import functional as F

from models.avc import AffinityHead, affinity, affinity_vectors, pooled, refine, resized
from models.common import CommonObject
from models.trunk import Network


class Classifier(Network):
    """Multi-label image classifier whose last convolution applied before pooling is the class activation map.

    trunk: see `models.trunk.build_trunk`.  classes: number of foreground classes K.  dropout: of whole channels (in
    [0, 1]), before the head.  affinity_dims: of the unit features of AVC; 0 builds no such head.  affinity_steps: the
    power k of the affinities that refine its maps.
    """

    def __init__(self, trunk, classes, dropout=0.5, affinity_dims=0, affinity_steps=4):
        super().__init__(trunk)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(trunk.channels[trunk.stages[-1]], classes, 1, bias=False)
        nn.init.normal_(self.head.weight, std=0.01)
        self.common = CommonObject(trunk.channels[trunk.stages[1]])
        self.avc = AffinityHead(trunk.channels[trunk.stages[1]], affinity_dims) if affinity_dims else None
        self.affinity_steps = affinity_steps

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
        """As `cam`, and the common object's log-odds (B, h', w') on the grid of the last stage but one.

        With an affinity head, the map is refined, and then at least 0.
        """
        maps = self.trunk(images)
        cam = self.head(maps[self.trunk.stages[-1]]).float()
        logits, features = cam.mean(dim=(2, 3)), maps[self.trunk.stages[1]]
        return logits, cam if self.avc is None else self.refined(cam, features), self.common(features)

    def refined(self, cam, features):
        """ReLU(CAM) . A^k.  cam: (B, K, h, w).  features: of the last stage but one.  Returns it on the pooled grid."""
        unit = self.unit_features(features)
        vectors = affinity_vectors(affinity(unit), unit.new_ones(len(unit), unit[0, 0].numel(), dtype=torch.bool))
        return refine(resized(cam.float().relu(), unit.shape[-2:]), vectors, self.affinity_steps)

    def unit_features(self, features):
        """Features of length 1 (B, d, h', w') whose products are affinities: the affinity head's, or the plain ones."""
        return F.normalize(pooled(features), dim=1) if self.avc is None else self.avc(features)

    def training_maps(self, images):
        """As `forward`, and what AVC is computed from: (logits (B, K), cam (B, K, h, w), features (B, D, h', w'))."""
        maps = self.trunk(images)
        last = maps[self.trunk.stages[-1]]
        logits = self.head(F.adaptive_avg_pool2d(self.dropout(last), 1)).flatten(1)
        return logits, self.head(last.detach()).float().detach(), maps[self.trunk.stages[1]]


def classification_loss(logits, labels):
    """Multi-label soft margin loss (PSA).  logits: (B, K).  labels: (B, K) in {0, 1}.  Returns a scalar, float32."""
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())
