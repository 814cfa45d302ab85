"""The common-object head: which pixels show what the images of a class have in common, in closed form.

A CAM finds the part that tells classes apart, often only the head of an animal. What all images of a class share is the
whole object. Two linear steps on features that classification has not bent towards such parts (those of the frozen,
pretrained trunk) find it without any pixel label:

1. The first principal component of the features of each class's images separates object from background (deep
   descriptor transforming: Wei et al., Pattern Recognition 2019). Its sign is the one that agrees with the CAM.
2. Taking its two sides as labels, Fisher's linear discriminant of all classes together relabels the pixels; repeated
   until no label changes (discriminative clustering). The pooled within-side covariance whitens textures and lighting.

The result is one 1x1 convolution. The combination is this project's own; it is not part of PSA.
"""
import torch
from torch import nn

from utils.errors import UserError

RIDGE = 0.3  # of the mean variance, added to the covariance's diagonal
ITERATIONS = 100


class CommonObject(nn.Module):
    """Log-odds of object against background for each cell of a feature map; does nothing until it is fitted.

    channels: D of the feature map.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.zeros(channels))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("fitted", torch.tensor(False))

    def forward(self, features):
        """features: (B, D, h, w).  Returns log-odds (B, h, w), float32."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("bdhw,d->bhw", features.float(), self.weight) + self.bias

    def fit(self, descriptors, classes, cam):
        """Fit to descriptors sampled from the training images (see the module's text).

        descriptors: (N, D) float32.  classes: (N,) int, a class of the image each came from.  cam: (N,) float, that
        class's CAM there.  Returns the share of descriptors called object.
        """
        side = _principal_sides(descriptors, classes, cam)
        for _ in range(ITERATIONS):
            weight, bias = _discriminant(descriptors, side)
            previous, side = side, descriptors @ weight + bias > 0
            if torch.equal(side, previous):
                break
        share = side.float().mean()
        self.weight.copy_(weight)
        self.bias.copy_(bias + torch.logit(share, eps=1e-3))
        self.fitted.fill_(True)
        return share.item()


def _principal_sides(descriptors, classes, cam):
    """(N,) bool: the positive side of the first principal component of each class, signed by the CAM."""
    side = torch.zeros(len(descriptors), dtype=torch.bool)
    for label in classes.unique():
        chosen = classes == label
        centred = descriptors[chosen] - descriptors[chosen].mean(dim=0)
        component = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        agrees = component @ (cam[chosen] - cam[chosen].mean()) > 0
        side[chosen] = component > 0 if agrees else component < 0
    return side


def _discriminant(descriptors, side):
    """Fisher's linear discriminant between the two sides, of equal priors: weight (D,) and bias."""
    if side.all() or not side.any():
        raise UserError("the features of the training images have no two sides; use --method cam")
    means = torch.stack([descriptors[~side].mean(dim=0), descriptors[side].mean(dim=0)])  # (2, D)
    residual = descriptors - means[side.long()]
    covariance = residual.T @ residual / len(descriptors)  # (D, D)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, means[1] - means[0])
    return weight, -weight @ means.mean(dim=0)
