"""The CAM classifier: trunk, global average pooling, bias-free 1x1 convolution (Ahn & Kwak, CVPR 2018, Sec. 3.1)."""
import torch
from torch import nn
from torch.nn import functional as F

from models import avc
from models.common import CommonObject
from models.trunk import Network


class Classifier(Network):
    """Multi-label image classifier whose last convolution applied before pooling is the class activation map.

    trunk: see `models.trunk.build_trunk`.  classes: number of foreground classes K.  dropout: of whole channels (in
    [0, 1]), before the head.  affinity_dims: of the unit features of AVC; 0 builds no such head.  affinity_steps,
    affinity_colour: `power` and `colour` of that head, see `models.avc.AffinityHead`.
    """

    def __init__(self, trunk, classes, dropout=0.5, affinity_dims=0, affinity_steps=4, affinity_colour=0.0):
        super().__init__(trunk)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(trunk.channels[trunk.stages[-1]], classes, 1, bias=False)
        nn.init.normal_(self.head.weight, std=0.01)
        self.common = CommonObject(trunk.channels[trunk.stages[1]])
        self.avc = None
        if affinity_dims:
            self.avc = avc.AffinityHead(trunk.channels[trunk.stages[1]], affinity_dims, affinity_steps, affinity_colour)

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
        return logits, cam if self.avc is None else self.refined(cam, features, images), self.common(features)

    def refined(self, cam, features, images):
        """What the affinities make of the ReLU of a CAM: (B, K, h', w') on their grid.

        cam: (B, K, h, w).  features: of the last stage but one.  images: (B, 3, H, W)."""
        unit, matrix = self.avc.affinity(self.avc.describe(features, images))
        grid, valid = unit.shape[-2:], torch.ones(matrix.shape[:2], dtype=torch.bool, device=matrix.device)
        maps = avc.resized(cam.relu(), grid).flatten(2)
        return self.avc.refined(maps, avc.affinity_vectors(matrix, valid), valid).unflatten(2, grid)

    def affinities(self, images):
        """Affinities of all pairs of cells (B, N, N) and their grid (h, w): the affinity head's, or, without one, those
        of the plain features.  images: (B, 3, H, W)."""
        features = self.trunk(images)[self.trunk.stages[1]]
        if self.avc is None:
            unit = F.normalize(avc.pooled(features), dim=1)
            return avc.affinity(unit), unit.shape[-2:]
        unit, matrix = self.avc.affinity(self.avc.describe(features, images))
        return matrix, unit.shape[-2:]

    def training_maps(self, images):
        """As `forward`, and what AVC is computed from: (logits (B, K), cam (B, K, h, w), what its head's `describe` says)."""
        maps = self.trunk(images)
        last = maps[self.trunk.stages[-1]]
        logits = self.head(F.adaptive_avg_pool2d(self.dropout(last), 1)).flatten(1)
        described = self.avc.describe(maps[self.trunk.stages[1]], images, avc.TRAINING_GRID)
        return logits, self.head(last.detach()).float().detach(), described


def classification_loss(logits, labels):
    """Multi-label soft margin loss (PSA).  logits: (B, K).  labels: (B, K) in {0, 1}.  Returns a scalar, float32."""
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())
