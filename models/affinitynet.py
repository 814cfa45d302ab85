"""AffinityNet (Ahn & Kwak, CVPR 2018, Sec. 3.2): pixel features whose L1 distance is affinity, and its loss."""
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from models.backbone import Network
from utils.grids import resize_tensor
from utils.labels import IGNORE

BRANCHES = (64, 128, 256)  # output channels of the heads on the last three stages (PSA, Sec. 4.1)
STRIDE = 8  # pixels per cell of the features
Offset = tuple[int, int]  # (dy, dx) from a cell to its partner, dy >= 0


class AffinityNet(Network):
    """Backbone + affinity head: 1x1 convolutions on the last three stages, ELU, concatenated, 1x1, ELU (PSA, Sec. 3.2).

    Features always lie on the stride-8 grid, to which the stages of any other stride are resampled.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__(backbone)
        self.heads = nn.ModuleList(nn.Conv2d(backbone.channels[stage], width, 1, bias=False)
                                   for stage, width in zip(backbone.stages, BRANCHES))
        self.fuse = nn.Conv2d(sum(BRANCHES), sum(BRANCHES), 1, bias=False)
        for head in self.heads:
            nn.init.kaiming_normal_(head.weight)
        # An orthogonal map of gain 4 spreads the distances at the start, so that exp(-d) is not 1 everywhere.
        nn.init.orthogonal_(self.fuse.weight.view(self.fuse.out_channels, -1), gain=4.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, H, W) normalised RGB.  Returns features (B, 448, ceil(H/8), ceil(W/8))."""
        maps = self.backbone(images)
        grid = tuple(-(-side // STRIDE) for side in images.shape[-2:])
        branches = [resize_tensor(F.elu(head(maps[stage])), grid)
                    for head, stage in zip(self.heads, self.backbone.stages)]
        return F.elu(self.fuse(torch.cat(branches, dim=1)))  # (B, 448, h, w)


def pair_views(x: torch.Tensor, offset: Offset) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of x (..., h, w) such that the same entry of both is a pixel and its partner at (dy, dx), dy >= 0."""
    dy, dx = offset
    h, w = x.shape[-2:]
    left, right = max(0, -dx), max(0, dx)
    # A grid narrower than the offset has no pairs: a negative end would count from the other side.
    return x[..., :max(0, h - dy), left:max(0, w - right)], x[..., dy:, right:max(0, w - left)]


def pair_affinity(features: torch.Tensor, offset: Offset) -> torch.Tensor:
    """exp(-mean_d |f_i(d) - f_j(d)|) of all pairs at one offset (PSA, Eq. 1).

    features: (B, D, h, w) float32.  offset: (dy, dx), dy >= 0.  Returns (B, h - dy, w - |dx|) in (0, 1].
    """
    first, second = pair_views(features, offset)
    return torch.exp(-(first - second).abs_().mean(dim=1))


def affinity_stencil(features: torch.Tensor, offsets: Sequence[Offset]) -> torch.Tensor:
    """Affinities of every pixel with its partners, as `utils.random_walk` takes them.

    features: (D, h, w) of one image.  Returns (P, h, w) float32 in [0, 1]: entry [p, y, x] pairs (y, x) with
    (y + dy_p, x + dx_p), and is 0 where the partner lies outside the grid.
    """
    features = features.float()
    stencil = features.new_zeros(len(offsets), *features.shape[-2:])
    for plane, offset in zip(stencil, offsets):
        pair_views(plane, offset)[0].copy_(pair_affinity(features[None], offset)[0])
    return stencil


KINDS = ("bg", "fg", "neg")  # background-positive, foreground-positive and negative pairs
WEIGHTS = (0.25, 0.25, 0.5)  # their weights in the loss (PSA, Eq. 5)
EPS = 1e-5  # keeps log(1 - a) finite for identical features, as in PSA's code


def affinity_loss(features: torch.Tensor, labels: torch.Tensor, offsets: Sequence[Offset],
                  counts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced binary cross-entropy over pixel pairs (PSA, Eqs. 3 to 5).

    features: (B, D, h, w).  labels: (B, h, w) integer; 0 background, 1.. classes, 255 not counted.
    offsets: pairs, from `utils.random_walk.half_disc`.
    counts: (3,) pairs of each of KINDS in the whole batch where these images are a micro-batch of it: the losses of all
    micro-batches then add up to that of the batch.  Left out, those of these images (`pair_counts`).
    Returns (loss, terms): 1/4 background-positive + 1/4 foreground-positive + 1/2 negative, each a mean over its own
    pairs of the batch, and the three means as a detached (3,) tensor in the order of KINDS.  A kind without pairs is 0.
    Raises ValueError if labels and features lie on different grids.

    Nothing here waits for a GPU: no tensor's size depends on values, and no Python number becomes a tensor there.
    """
    if features.shape[-2:] != labels.shape[-2:]:
        raise ValueError(f"labels are on a {tuple(labels.shape[-2:])} grid, features on {tuple(features.shape[-2:])}")
    counts = pair_counts(labels, offsets) if counts is None else counts
    terms = _PairSums.apply(features.float(), labels, offsets) / counts.clamp(min=1)
    return sum(weight * term for weight, term in zip(WEIGHTS, terms)), terms.detach()


def pair_counts(labels: torch.Tensor, offsets: Sequence[Offset]) -> torch.Tensor:
    """Pairs of each of KINDS over all offsets: (3,) float32.  Arguments as of `affinity_loss`."""
    counts = torch.zeros(3, device=labels.device)
    for offset in offsets:
        counts += torch.stack([mask.sum() for mask in _kind_masks(labels, offset)])
    return counts


class _PairSums(torch.autograd.Function):
    """Sum of -log-likelihoods of pairs, by kind, over all offsets: (3,).

    Autograd would keep |f_i - f_j| for every offset, 34 x the features; here the backward pass computes it again, so
    that memory holds one offset at a time.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, features: torch.Tensor, labels: torch.Tensor,
                offsets: Sequence[Offset]) -> torch.Tensor:
        ctx.save_for_backward(features, labels)
        ctx.offsets = offsets
        sums, zero = features.new_zeros(3), features.new_zeros(())
        for offset in offsets:
            affinity = pair_affinity(features, offset)  # (B, h', w')
            positive, negative = -torch.log(affinity + EPS), -torch.log1p(EPS - affinity)
            masks = _kind_masks(labels, offset)
            sums += torch.stack([torch.where(mask, values, zero).sum()
                                 for mask, values in zip(masks, (positive, positive, negative))])
        return sums

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        features, labels = ctx.saved_tensors
        out = torch.zeros_like(features)
        for offset in ctx.offsets:
            first, second = pair_views(features, offset)
            difference = first - second  # (B, D, h', w')
            affinity = torch.exp(-difference.abs().mean(dim=1))
            masks = _kind_masks(labels, offset)
            background, foreground, negative = (mask * weight for mask, weight in zip(masks, grad))
            slope = (background + foreground) * affinity / (affinity + EPS) - negative * affinity / (1 + EPS - affinity)
            step = difference.sign_().mul_(slope[:, None] / features.shape[1])
            for view, sign in zip(pair_views(out, offset), (1, -1)):
                view.add_(step, alpha=sign)
        return out, None, None


def _kind_masks(labels, offset):
    """Which pairs at an offset are of which of KINDS: three bool masks (B, h - dy, w - |dx|)."""
    first, second = pair_views(labels, offset)
    valid, same = (first != IGNORE) & (second != IGNORE), first == second
    return valid & same & (first == 0), valid & same & (first != 0), valid & ~same
