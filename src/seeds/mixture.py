"""A Gaussian mixture of frozen features as a seed, fitted to image labels by EM in closed form (docs/mixture.md).

All cells of the training images come from one mixture whose components share a covariance. A component belongs to the
background or to a class, and a cell may use those of the background and of its own image's classes only. CAMs, spread
along the affinities of features within the image, say which is which at the start, and stay as a prior.

Such a mixture is linear in the features (mixture discriminant analysis: Hastie & Tibshirani, JRSS B 1996): at inference
it is one 1x1 convolution, and the map of a class is the posterior of its components.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch.nn import functional as F

from models.backbone import settle_depths
from models.classifier import Classifier
from src.seeds.cam import CamConfig, Plan, Reader, Seed, needs_pretrained, sum_views, unit_maximum
from utils.errors import UserError
from utils.grids import Size, resize_tensor
from utils.log import say
from utils.runtime import release_memory

BACKGROUND, PER_CLASS = 12, 2  # components, of all classes together and of each
FITS = 6           # from different starts; their posteriors are averaged, as EM ends where it began
CELLS = 96         # of an image, drawn at random
EDGE = 6           # cells from the edge that are not drawn: the network's padding bends them, and most are background
IMAGES = 1400      # at most, which bounds the memory of the fit: 0.3 GB at 416 channels
RIDGE = 0.03       # of the mean variance, added to the covariance's diagonal
ROUNDS = 15        # of EM
REFITS = 1         # times that the prior is taken from the fitted mixture and the mixture is fitted again
PRIOR = 3.0        # weight of the prior's logarithm: features of one image agree more than independent ones would
CERTAIN = 0.95     # the prior never says more than this
BACK, FRONT = 0.2, 0.5  # of the spread CAM: cells that start as background below, as their class above
POWER = 4          # of the affinities that spread a CAM; one spreads the mixture's own posterior
GRID = 32          # cells a side at most of the affinities, which have their fourth power of entries
CHUNK = 16_384     # cells at once in an E step
KMEANS = 8_192     # cells to which a start is fitted
SHARPNESS = 2.2    # an undecided cell then meets the background score of the default alpha: 0.5^2.2 = (1 - 0.5^2.2)^6
NEVER = -1e4       # log density of a component without cells


@dataclass(frozen=True)
class MixtureConfig(CamConfig):
    """mixture_depths: names of the backbone's feature maps to read; none: its own choice."""
    mixture_depths: tuple[str, ...] | None = None


class Mixture(Seed):
    """The posterior probability of a class, given the features of two or more depths and the image's labels."""
    name = "mixture"
    sharpness = SHARPNESS
    Settings = MixtureConfig
    closed_form = True

    def __init__(self, classifier: Classifier, depths: Sequence[str], background: int, fits: int):
        super().__init__()
        self.depths, self.background, self.fits = settle_depths(classifier.backbone, depths), background, fits
        self.classes = classifier.head.out_channels
        *finer, last = (classifier.backbone.channels[depth] for depth in self.depths)
        # Channels whose cosines are affinities: of the depth before the last, of a single one all.
        self.shallow = slice(sum(finer[:-1]), sum(finer)) if finer else slice(None)
        count = background + PER_CLASS * self.classes
        self.register_buffer("weight", torch.zeros(fits, count, sum(finer) + last))
        self.register_buffer("bias", torch.full((fits, count), NEVER))

    @classmethod
    def check(cls, plan: Plan) -> None:
        needs_pretrained(plan, cls.name)

    @classmethod
    def default_freeze(cls, blocks: int) -> int:
        return blocks - 1

    @classmethod
    def record(cls, settings: MixtureConfig) -> dict[str, object]:
        return {"name": cls.name, "depths": list(settings.mixture_depths or ()), "background": BACKGROUND, "fits": FITS}

    @classmethod
    def build(cls, classifier: Classifier, depths: Sequence[str] = (), background: int = 6, fits: int = 3) -> Self:
        """background, fits: of a record without them, the numbers of the time when records did not hold them."""
        return cls(classifier, depths, background, fits)

    # --- maps of an image --------------------------------------------------------------------------------------------

    def maps(self, classifier: Classifier, features: Mapping[str, torch.Tensor], cam: torch.Tensor,
             images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log densities of the classes (B, F * K, h, w) and of the background (B, F, h, w), and the classes' prior
        (B, F * K, h, w), by each of F fits.

        The prior comes from the CAM first, then `REFITS` times from the mixture's own posterior, as in the fit.
        """
        with torch.autocast(images.device.type, enabled=False):
            cells = self._cells(features)
            size = cells.shape[-2:]
            grid = affinity_grid(size)
            affinity = affinities(resize_tensor(cells[:, self.shallow], grid).flatten(2))
            prior = spread(resize_tensor(cam.float().relu(), grid).flatten(2), affinity, POWER)
            coarse, found = resize_tensor(cells, grid).flatten(2), []
            for fit in range(self.fits):
                own = prior
                for _ in range(REFITS):
                    own = spread(binary_posterior(*self._densities(coarse, fit), own), affinity)
                inner, outer = self._densities(cells.flatten(2), fit)
                found.append((inner.unflatten(2, size), outer.unflatten(2, size),
                              resize_tensor(own.unflatten(2, grid), size)))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found))

    def merge(self, views: Sequence[tuple[torch.Tensor, ...]], keys: np.ndarray, size: Size) -> np.ndarray:
        """The mean posterior of the fits and views, sharpened; its maximum is 1: a label is somewhere in its image."""
        scales = []
        for view in views:
            parts = zip(*(part.chunk(self.fits, dim=1) for part in view))
            found = [posteriors(inner[:, keys], outer, prior[:, keys]) for inner, outer, prior in parts]
            scales.append(sum(found) / self.fits)
        return unit_maximum((sum_views(scales, size) / sum(map(len, scales))) ** SHARPNESS)

    def view_maps(self, classifier: Classifier, features: Mapping[str, torch.Tensor], cam: torch.Tensor,
                  images: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """What `merge` averages over the views, for one view and all classes at once: (B, K, h, w) in [0, 1].

        shown: (B, K) bool, the classes of each image; the maps of others are 0.  Without a step in Python that depends
        on which these are: this is what is exported to ONNX.
        """
        absent = ~shown[:, :, None, None]
        parts = zip(*(part.chunk(self.fits, dim=1) for part in self.maps(classifier, features, cam, images)))
        found = [posteriors(inner.masked_fill(absent, -torch.inf), outer, prior.masked_fill(absent, 0))
                 for inner, outer, prior in parts]
        return sum(found) / self.fits

    def _cells(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features of all depths on the grid of the last: (B, D, h, w) float32."""
        size = features[self.depths[-1]].shape[-2:]
        return torch.cat([resize_tensor(features[depth].float(), size) for depth in self.depths], dim=1)

    def _densities(self, cells: torch.Tensor, fit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cells: (B, D, n).  Returns log densities up to a constant of a cell: classes (B, K, n), background (B, 1, n).
        """
        logs = torch.einsum("cd,bdn->bcn", self.weight[fit], cells) + self.bias[fit, :, None]
        inner = logs[:, self.background:].unflatten(1, (self.classes, PER_CLASS)).logsumexp(dim=2)
        return inner, logs[:, :self.background].logsumexp(dim=1, keepdim=True)

    # --- the fit -----------------------------------------------------------------------------------------------------

    def wanted(self, labels: np.ndarray, seed: int) -> Sequence[int]:
        return drawn_images(labels, IMAGES, np.random.default_rng(seed))

    @torch.no_grad()
    def fit(self, classifier: Classifier, read: Reader, labels: np.ndarray, seed: int) -> None:
        """Fit the mixture to cells drawn from the images (see the module's text); says what it found.

        Memory does not grow with the split: at most IMAGES images are read, of every class some.
        """
        if not labels.any():
            raise UserError("no image has a label; --method mixture needs labelled images, use --method cam")
        rng = np.random.default_rng(seed)
        draw = torch.Generator().manual_seed(seed)
        samples = [self._sample(features, cam, keys, draw)
                   for features, cam, keys in read(drawn_images(labels, IMAGES, rng))]
        links = [affinities(one.T[None, self.shallow]) for one, *_ in samples]
        cells, prior, own = (torch.cat(parts) for parts in zip(*samples))
        del samples
        release_memory()  # of the network, for the tensors of the fit
        home = self.weight.device
        self.cpu()  # as the samples are
        mean = cells.mean(dim=0)
        cells -= mean
        scatter, shares = cells.T @ cells, []
        for fit in range(self.fits):
            before = prior
            for refit in range(REFITS + 1):
                if refit:
                    before = self._own_prior(cells, mean, before, own, links, fit)
                share = self._maximise(cells, mean, scatter, before, own, rng, fit)
            shares.append(f"{share:.0%}")
        self.to(home)
        say(f"Mixture: fitted to {len(cells)} cells of {len(links)} images; foreground by each of {self.fits} fits: "
            f"{', '.join(shares)}")

    def _sample(self, features: Mapping[str, torch.Tensor], cam: torch.Tensor, keys: np.ndarray,
                draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Up to CELLS random cells of an image, none near its edge: features (n, D), the spread CAM (n, K), its classes
        (n, K) bool.
        """
        cells = self._cells(features)
        size = cells.shape[-2:]
        grid = affinity_grid(size)
        cam = resize_tensor(cam.float().relu(), grid).flatten(2)
        prior = spread(cam, affinities(resize_tensor(cells[:, self.shallow], grid).flatten(2)), POWER)
        prior = resize_tensor(prior.unflatten(2, grid), size).flatten(2)
        middle = inner_cells(size)
        chosen = middle[torch.randperm(len(middle), generator=draw)[:CELLS]].to(cells.device)
        own = torch.zeros(len(chosen), self.classes, dtype=torch.bool)
        own[:, torch.from_numpy(keys)] = True
        return cells.flatten(2)[0].T[chosen].cpu(), prior[0].T[chosen].cpu() * own, own

    def _own_prior(self, cells: torch.Tensor, mean: torch.Tensor, prior: torch.Tensor, own: torch.Tensor,
                   links: Sequence[torch.Tensor], fit: int) -> torch.Tensor:
        """The prior (n, K) of the sampled cells from a fit's posterior, spread among an image's sampled cells.

        cells: (n, D) less their mean (D,).  links: the affinities (1, n_i, n_i) of each image's n_i cells.
        """
        found = [binary_posterior(*self._densities((x + mean).T[None], fit), before.T[None])
                 for x, before in zip(cells.split(CHUNK), prior.split(CHUNK))]
        parts = torch.cat(found, dim=2).split([len(link[0]) for link in links], dim=2)
        return torch.cat([spread(part, link) for part, link in zip(parts, links)], dim=2)[0].T * own

    def _maximise(self, cells: torch.Tensor, mean: torch.Tensor, scatter: torch.Tensor, prior: torch.Tensor,
                  own: torch.Tensor, rng: np.random.Generator, fit: int) -> float:
        """EM from the prior: sets `weight` and `bias` of a fit.  Returns the share of foreground.

        cells: (n, D) less their mean (D,).  scatter: (D, D), the sum of their outer products.
        """
        counts, sums, scatter_used = start(cells, prior, own, scatter, self.background, rng)
        before = log_priors(prior, own)
        for _ in range(ROUNDS):
            means = sums / counts.clamp(min=1e-6)[:, None]  # (C, D)
            root = torch.linalg.cholesky(ridged((scatter_used - sums.T @ means) / counts.sum()))
            weight = torch.cholesky_solve(means.T, root).T
            bias = torch.log(counts / counts.sum()) - 0.5 * (weight * means).sum(dim=1)
            bias = torch.where(counts > 1e-3, bias, NEVER)
            counts, sums = self._expect(cells, before, weight, bias)
            scatter_used = scatter
        self.weight[fit] = weight
        self.bias[fit] = (bias - weight @ mean).clamp(min=NEVER)
        return (counts[self.background:].sum() / len(cells)).item()

    def _expect(self, cells: torch.Tensor, prior: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """The E step: (cells of each component (C,), sums of their features (C, D)), each cell shared by posterior.

        prior: what it adds to log densities, see `log_priors`.
        """
        counts, sums = torch.zeros(len(weight)), torch.zeros_like(weight)
        for x, before in zip(cells.split(CHUNK), prior.split(CHUNK)):
            logs = x @ weight.T + bias
            logs[:, :self.background] += before[:, :1]
            logs[:, self.background:].unflatten(1, (-1, PER_CLASS)).add_(before[:, 1:, None])
            share = logs.softmax(dim=1)
            counts += share.sum(dim=0)
            sums += share.T @ x
        return counts, sums


def drawn_images(labels: np.ndarray, most: int, rng: np.random.Generator) -> list[int]:
    """Up to `most` positions in a split, ascending: random ones, after an equal part for every class.

    labels: (N, K) in {0, 1}.  Half of what is drawn is shared out among the classes, so that a rare one is there.
    """
    order = rng.permutation(len(labels))
    part = most // (2 * labels.shape[1])
    kept = {int(i) for k in range(labels.shape[1]) for i in order[labels[order, k] > 0][:part]}
    for position in order:
        if len(kept) >= min(most, len(labels)):
            break
        kept.add(int(position))
    return sorted(kept)


def inner_cells(size: Size) -> torch.Tensor:
    """Flat positions of the cells EDGE or more from the edge of a grid; less where CELLS would not be left."""
    margin = EDGE
    while margin and (2 * margin >= min(size) or (size[0] - 2 * margin) * (size[1] - 2 * margin) < CELLS):
        margin -= 1
    rows, columns = (slice(margin, side - margin) for side in size)
    return torch.arange(size[0] * size[1]).view(*size)[rows, columns].flatten()


def affinity_grid(size: Size) -> Size:
    """The grid of affinities for a grid of cells; in a traced graph, whose sizes are tensors, too."""
    return tuple(min(side, GRID) if isinstance(side, int) else side.clamp(max=GRID) for side in size)


def affinities(cells: torch.Tensor) -> torch.Tensor:
    """The squared ReLU of the cosines of an image's centred features, each row divided by its sum: (B, n, n).

    cells: (B, D, n).  Rows as in SEAM's refinement of CAMs (Wang et al., CVPR 2020), squared.
    """
    cells = F.normalize(cells - cells.mean(dim=2, keepdim=True), dim=1)
    matrix = (cells.transpose(1, 2) @ cells).relu_().square_()
    return matrix / matrix.sum(dim=2, keepdim=True).clamp(min=1e-8)


def spread(maps: torch.Tensor, affinity: torch.Tensor, power: int = 1) -> torch.Tensor:
    """maps (B, K, n) along affinities (B, n, n), then each map from its minimum to its maximum, in [0, 1]."""
    for _ in range(power):
        maps = maps @ affinity.transpose(1, 2)
    maps = maps - maps.amin(dim=2, keepdim=True)
    return maps / maps.amax(dim=2, keepdim=True).clamp(min=1e-8)


def log_prior(prior: torch.Tensor) -> torch.Tensor:
    """prior in [0, 1] -> what it adds to a log density."""
    return PRIOR * prior.clamp(1 - CERTAIN, CERTAIN).log()


def log_priors(prior: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What a prior (n, K) adds to the log densities of background and classes, (n, 1 + K); -inf for classes not `own`.
    """
    inside = torch.where(own, log_prior(prior), -torch.inf)
    return torch.cat([log_prior(1 - prior.amax(dim=1, keepdim=True)), inside], dim=1)


def binary_posterior(inner: torch.Tensor, outer: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Posterior (B, K, n) of each class against the background alone.  Arguments as of `posteriors`."""
    odds = inner + log_prior(prior) - outer - log_prior(1 - prior)
    if torch.onnx.is_in_onnx_export():  # onnxruntime's sigmoid is never below 1e-8, and `spread` would show that
        return 1 / (1 + torch.exp(-odds))
    return torch.sigmoid(odds)


def posteriors(inner: torch.Tensor, outer: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Posteriors (B, K, h, w) of an image's classes, which with the background's sum to 1.

    inner: log densities of the classes (B, K, h, w).  outer: of the background (B, 1, h, w).  prior: (B, K, h, w).
    """
    if not inner.shape[1]:
        return inner
    highest = prior.amax(dim=1, keepdim=True)
    logs = torch.cat([outer + log_prior(1 - highest), inner + log_prior(prior)], dim=1)
    return logs.softmax(dim=1)[:, 1:]


def ridged(covariance: torch.Tensor) -> torch.Tensor:
    """A covariance (D, D) with RIDGE of its mean variance added to its diagonal."""
    covariance = covariance.clone()
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp(min=1e-12))
    return covariance


def start(cells: torch.Tensor, prior: torch.Tensor, own: torch.Tensor, scatter: torch.Tensor, background: int,
          rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where EM begins: counts (C,), sums (C, D) and scatter (D, D) of the cells that the prior is sure of.

    Cells below BACK are split into the background's components, those above FRONT into their class's, by k-means of
    whitened features; a class without such cells begins with the likeliest ones of its images.
    """
    whitening = torch.linalg.cholesky(torch.linalg.inv(ridged(scatter / len(cells))))
    components = background + PER_CLASS * own.shape[1]
    counts, sums = torch.zeros(components), torch.zeros(components, cells.shape[1])
    highest, times = prior.amax(dim=1), torch.zeros(len(cells))
    lowest = highest.sort().values[min(len(cells), 4 * background) - 1]  # background there must be
    groups = [(highest <= max(BACK, lowest.item()), 0, background)]
    for k in range(own.shape[1]):
        if own[:, k].any():
            ours = prior[own[:, k], k]
            sure = min(FRONT, ours.sort(descending=True).values[min(len(ours), 4 * PER_CLASS) - 1].item())
            groups.append((own[:, k] & (prior[:, k] >= sure), background + PER_CLASS * k, PER_CLASS))
    for chosen, first, number in groups:
        points = cells[chosen]
        which = first + clusters(points, whitening, number, rng)
        counts.index_add_(0, which, torch.ones(len(points)))
        sums.index_add_(0, which, points)
        times[chosen] += 1
    other = times != 1  # the fewest: their part is taken off, or added for cells that begin in two classes
    return counts, sums, scatter + (cells[other] * (times[other, None] - 1)).T @ cells[other]


def clusters(points: torch.Tensor, whitening: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """k-means of points (n, D) times whitening (D, D): the cluster of each, (n,) int64 in [0, count)."""
    if len(points) <= count:
        return torch.arange(len(points))
    part = (points[torch.from_numpy(rng.permutation(len(points))[:KMEANS])] @ whitening).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster without points, or of equal ones: its component stays empty
        centres, _ = kmeans2(part, count, minit="++", rng=rng)
    centres = torch.from_numpy(centres)
    # The nearest centre, by what distances to all have not in common: no need to whiten every point.
    return (points @ (whitening @ centres.T) - centres.square().sum(dim=1) / 2).argmax(dim=1)
