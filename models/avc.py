"""Affinity vector consistency (AVC): unit features, the affinities they span, the terms that train them, refined CAMs.

The idea and its name are of the AVC readme: in its figure, the rows of the pixel-to-pixel affinity map (the affinity
vectors) of one object's pixels are equal, and affinity across the object's border is zero. Its losses were not
published; those here are this project's (docs/avc.md). What they lean on: the ReLU of cosine similarities as affinity
is SEAM's (Wang et al., CVPR 2020, Sec. 3.3), rows of it as affinity vectors are SIPE's (Chen et al., CVPR 2022).

All but the head are pure functions of tensors, in float32. Grids are flattened: N = h * w cells, row by row.
"""
import torch
from torch import nn
from torch.nn import functional as F

from utils import distributed

GRID = 28            # cells a side at most: A has 28^4 = 0.6 million entries
CELL = 8             # pixels of a cell with colours, unless the grid is at its limit
TRAINING_GRID = 20   # cells a side at most with colours while training, where carrying A between views costs N^3
COLOURS = 3          # channels of colour, the last ones of a description
COMPLEMENT = 4       # power of the complement of a map: cells of half its maximum say little about the background
IGNORE = -1          # label of a cell that is not reliable, or padding
PAIR_CAP = 4096      # cells of either side whose pairs are separated; their product is what memory holds
MOMENTUM = 0.1       # of the running statistics, as batch normalisation's
ROW_SCALE = 0.03     # norm of the projection's rows at the start: only directions count, so short rows learn fast
EPS = 1e-6
TINY = 1e-12         # of shares, which are about 1 / N


class AffinityHead(nn.Module):
    """What a cell looks like -> unit features, whose products are affinities, weighed by likeness of colour if asked.

    Unit features: each channel standardised, a bias-free 1x1 projection, normalised to length 1.
    channels: D of the feature map.  dims: d of the unit features.  power: k, of the affinities that refine a CAM.
    colour: standard deviation of the Gaussian of colour differences, in standard deviations of ImageNet's colours; 0
    leaves colours out.  With them, cells are smaller, their mean colours count among the features, and refined CAMs are
    `refined_shares`.
    Statistics come from valid cells and run along while training; the running ones are used in training too, so that
    a cell's feature does not depend on its batch.
    """

    def __init__(self, channels, dims=32, power=4, colour=0.0):
        super().__init__()
        self.power, self.colour = power, colour
        channels += COLOURS if colour else 0
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of training so far: see `observe`
        self.project = nn.Conv2d(channels, dims, 1, bias=False)
        nn.init.orthogonal_(self.project.weight.view(dims, -1), gain=ROW_SCALE)

    def describe(self, features, images, most=GRID):
        """What A is computed from: (B, D, h, w) float32, or (B, D + 3, h, w) with colours.

        features: (B, D, h', w').  images: (B, 3, H, W) that they are of, normalised.  most: cells a side at most, with
        colours; without them the grid is that of the features.
        """
        if not self.colour:
            return pooled(features)
        grid = grid_of(images.shape[-2:], most)
        return torch.cat([resized(features.float(), grid), mean_colours(images.float(), grid)], dim=1)

    def forward(self, described):
        """described: see `describe`.  Returns unit features (B, d, h, w), float32."""
        with torch.autocast(described.device.type, enabled=False):
            x = (described - self.mean[:, None, None]) * (self.variance[:, None, None] + 1e-5).rsqrt()
            return F.normalize(self.project(x), dim=1)

    def affinity(self, described):
        """(unit features (B, d, h, w), A (B, N, N)): A = ReLU(F^T F), weighed by likeness of colour if asked."""
        unit = self(described)
        matrix = affinity(unit)
        return unit, matrix * likeness(described[:, -COLOURS:], self.colour) if self.colour else matrix

    def refined(self, cam, vectors, valid):
        """The refined maps (B, K, N).  cam: (B, K, N), at least 0.  vectors, valid: see `affinity_vectors`."""
        if self.colour:
            return refined_shares(cam, vectors, valid, self.power)
        return refine(cam, vectors, self.power)

    @torch.no_grad()
    def observe(self, described, valid):
        """Count a step, and move the statistics towards those of its valid cells.

        described: see `describe`.  valid: (B, N) bool on its grid.
        """
        count, mean, variance = _moments(described.flatten(2).transpose(1, 2)[valid])
        if count > 1:
            share = MOMENTUM if self.steps > 0 else 1.0
            self.mean.lerp_(mean, share)
            self.variance.lerp_(variance, share)
        self.steps += 1


def _moments(cells):
    """(how many, mean (D,), unbiased variance (D,)) of the cells (n, D) of all processes."""
    if distributed.world() == 1:
        return len(cells), cells.mean(dim=0), cells.var(dim=0)
    found = distributed.total(torch.cat([cells.sum(dim=0), cells.new_full((1,), len(cells))]))
    count, mean = int(found[-1]), found[:-1] / found[-1].clamp(min=1)
    variance = distributed.total(((cells - mean) ** 2).sum(dim=0)) / max(1, count - 1)
    return count, mean, variance


def grid_of(size, most=GRID):
    """Cells (h, w) of an image of `size` pixels: one for 8 pixels, at most `most` a side."""
    return tuple(min(most, (side - 1) // CELL + 1) for side in size)


def mean_colours(images, grid):
    """Means of images (B, 3, H, W) over windows as large as a cell (h, w), corners on corners: (B, 3, h, w).

    PyTorch's `antialias` is no help: with corners on corners it is off by half a cell.
    """
    for axis in (0, 1):
        cell = (images.shape[2 + axis] - 1) / max(1, grid[axis] - 1)
        window = 2 * int(cell // 2) + 1  # odd, so that its middle is a pixel
        kernel = (window, 1) if axis == 0 else (1, window)
        images = F.avg_pool2d(images, kernel, 1, [side // 2 for side in kernel], count_include_pad=False)
    return resized(images, grid)


def pooled(maps):
    """Maps (B, C, h, w) in float32 on a grid of at most 28x28 cells, corners on corners."""
    size = tuple(min(side, GRID) for side in maps.shape[-2:])
    return resized(maps.float(), size)


def resized(maps, size):
    """Maps (B, C, h, w) on another grid, bilinear, corners on corners."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def affinity(unit):
    """A = ReLU(F^T F).  unit: (B, d, h, w) of length 1.  Returns (B, N, N) float32 in [0, 1], symmetric."""
    with torch.autocast(unit.device.type, enabled=False):
        flat = unit.float().flatten(2)
        return torch.relu(flat.transpose(1, 2) @ flat)


def likeness(colours, deviation):
    """exp(-|c_i - c_j|^2 / 2 deviation^2) of all pairs of cells: (B, N, N) in [0, 1].  colours: (B, 3, h, w)."""
    cells = colours.float().flatten(2).transpose(1, 2) / deviation
    return torch.exp(torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist").square() / -2)


def affinity_vectors(matrix, valid):
    """Rows that sum to 1 over the valid columns; rows of padding, and its columns, are 0.

    matrix: (B, N, N), at least 0.  valid: (B, N) bool.  Returns (B, N, N).
    """
    matrix = matrix * (valid[:, :, None] & valid[:, None])
    return matrix / matrix.sum(dim=2, keepdim=True).clamp(min=EPS)


def refine(cam, vectors, steps):
    """CAM . A^k: each cell takes the average of the maps, weighed by its affinity vector, k = `steps` times.

    cam: (B, K, N).  vectors: (B, N, N), see `affinity_vectors`.  Returns (B, K, N).
    """
    cells = cam.float().transpose(1, 2)  # (B, N, K)
    for _ in range(steps):
        cells = vectors @ cells
    return cells.transpose(1, 2)


def refined_shares(cam, vectors, valid, steps):
    """The refined CAM: of what each class's map and its complement send to a cell along A^k, the map's share.

    The map f is the CAM over its maximum, the complement (1 - f)^4; each is divided by its sum first, so that neither
    wins by its area, and what A^k smears over the whole image cancels out: 0.5 is undecided.
    cam: (B, K, N).  vectors: (B, N, N).  valid: (B, N) bool.  Returns (B, K, N) in [0, 1]; padding is 0.
    """
    inside = valid[:, None]
    own = torch.where(inside, cam.float().relu(), 0)
    own = own / own.amax(dim=2, keepdim=True).clamp(min=EPS)
    other = torch.where(inside, (1 - own) ** COMPLEMENT, 0)
    own, other = (refine(part / part.sum(dim=2, keepdim=True).clamp(min=EPS), vectors, steps) for part in (own, other))
    return own / (own + other).clamp(min=TINY)


def carrier(source, target, size, window, flip):
    """The matrix M that carries a view's cells back to its image's grid: maps x become x M^T, A becomes M A M^T.

    source: (h, w), the view's grid.  target: (H, W), the image's.  size: of the image in pixels.  window: (top, left,
    height, width) in pixels of the image that the view shows, scaled to whatever size.  flip: whether it is mirrored.
    Grids lie corners on corners. Returns M (H*W, h*w) float32: bilinear weights of sum 1, or 0 for a cell outside the
    window. Where cells meet cells each row is a single 1: such flips and crops are undone without loss.
    """
    rows = _weights(source[0], target[0], size[0], window[0], window[2])
    columns = _weights(source[1], target[1], size[1], window[1], window[3])
    if flip:
        columns = columns.flip(1)
    return torch.einsum("ab,cd->acbd", rows, columns).reshape(target[0] * target[1], -1)


def _weights(source, target, size, start, extent):
    """Bilinear weights (target, source) along one axis of `carrier`."""
    at = (torch.linspace(0, size - 1, target, dtype=torch.float64) - start) * (source - 1) / (extent - 1)
    at = torch.where((at - at.round()).abs() < 1e-6, at.round(), at)
    inside = (at >= 0) & (at <= source - 1)
    low = at.floor().long().clamp(0, source - 2)
    part = torch.where(inside, at - low, 0).float()
    weights = torch.zeros(target, source)
    rows = torch.arange(target)
    weights[rows, low] = 1 - part
    weights[rows, low + 1] = part
    return weights * inside[:, None]


def equivariance(first, second, valid):
    """Mean over valid cells of 1 - cos(a_i, b_i), each side in turn the target, whose gradient is stopped.

    first, second: (B, N, N) affinities of two views in one frame.  valid: (B, N) bool: cells that both views show; the
    vectors are compared over valid columns alone.  Returns a scalar >= 0, 0 without valid cells.
    """
    both = valid[:, :, None] & valid[:, None]
    first, second = first * both, second * both
    there = 1 - F.cosine_similarity(first, second.detach(), dim=2, eps=EPS)
    back = 1 - F.cosine_similarity(second, first.detach(), dim=2, eps=EPS)
    return masked_mean((there + back) / 2, valid)


def agreement(vectors, labels):
    """Mean over reliable cells of 1 - cos(a_i, mean a of its label), the mean's gradient stopped.

    vectors: (B, N, N) affinity vectors.  labels: (B, N) int, 0 background, 1.. classes, IGNORE.
    Returns a scalar >= 0: half of the mean over the background's cells, half of that over the objects'.
    """
    reliable = labels != IGNORE
    kinds = int(labels.max().clamp(min=0)) + 1
    hot = F.one_hot(labels.clamp(min=0), kinds) * reliable[..., None]  # (B, N, C)
    hot = hot.to(vectors.dtype)
    means = hot.transpose(1, 2) @ vectors.detach() / hot.sum(dim=1)[..., None].clamp(min=1)  # (B, C, N)
    distance = 1 - F.cosine_similarity(vectors, hot @ means, dim=2, eps=EPS)
    return (masked_mean(distance, labels == 0) + masked_mean(distance, labels > 0)) / 2


def separation(unit, labels, margin=0.0):
    """Mean of max(0, A_ij - margin) over pairs of different reliable labels.

    Objects against the background of the whole batch, and different classes within an image; each is a mean over its
    own pairs. Objects of two images are not pushed apart: two breeds may well look alike.
    unit: (B, d, h, w).  labels: (B, N), see `agreement`.  Returns a scalar >= 0, 0 without such pairs.
    """
    flat = unit.float().flatten(2)
    cells = flat.transpose(1, 2)  # (B, N, d)
    objects, ground = _thinned(cells[labels > 0]), _thinned(cells[labels == 0])
    total = unit.new_zeros((), dtype=torch.float32)
    if len(objects) and len(ground):
        total = total + torch.relu(objects @ ground.T - margin).mean()
    differ = (labels[:, :, None] != labels[:, None]) & (labels > 0)[:, :, None] & (labels > 0)[:, None]
    return total + masked_mean(torch.relu(cells @ flat - margin), differ) if differ.any() else total


def _thinned(cells):
    """At most PAIR_CAP of the cells (n, d), evenly taken."""
    return cells[::max(1, -(-len(cells) // PAIR_CAP))]


def cam_consistency(first, second, present, valid):
    """Mean |difference| of two views' refined maps in one frame, over valid cells and the classes of each image.

    first, second: (B, K, N) in [0, 1].  present: (B, K) bool.  valid: (B, N) bool.  Each side is in turn the target.
    """
    mask = present[:, :, None] & valid[:, None]
    return masked_mean((first - second.detach()).abs() / 2 + (second - first.detach()).abs() / 2, mask)


def masked_mean(values, mask):
    """Mean of the values where the mask holds; 0, with a gradient of 0, where it holds nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def unit_range(cam, valid):
    """Each map moved and scaled so that its values over valid cells span [0, 1]; padding is 0.

    Averages with affinity vectors leave a floor under a map, which no division takes away.  cam: (B, K, N).
    valid: (B, N) bool.
    """
    inside = valid[:, None].expand_as(cam)
    low = cam.masked_fill(~inside, torch.inf).amin(dim=2, keepdim=True)
    high = cam.masked_fill(~inside, -torch.inf).amax(dim=2, keepdim=True)
    return torch.where(inside, (cam - low) / (high - low).clamp(min=EPS), 0)


def reliable_labels(cam, present, valid, low, high):
    """Cells that are surely one class (map >= high) or background (all maps <= low); IGNORE the rest and the padding.

    cam: (B, K, N) in [0, 1].  present: (B, K) bool, the images' labels.  valid: (B, N) bool.  Returns (B, N) int64.
    """
    best, which = torch.where(present[:, :, None], cam, -1.0).max(dim=1)
    labels = torch.full_like(which, IGNORE)
    labels[(best <= low) & present.any(dim=1)[:, None]] = 0
    labels = torch.where(best >= high, which + 1, labels)
    return torch.where(valid, labels, IGNORE)


def anchored(refined, seeds, present):
    """Refined maps, clipped, on a scale where their mean over own seeds is 1 and that over the background's is 0.

    refined: (B, K, N).  seeds: (B, N) labels of `reliable_labels` from the plain CAM.  present: (B, K) bool.
    A map whose seeds do not stand out from the background, or that has none, comes back as 0.5: reliable nowhere.
    """
    classes = torch.arange(1, refined.shape[1] + 1, device=refined.device)
    own = (seeds[:, None] == classes[None, :, None]).to(refined.dtype)  # (B, K, N)
    ground = (seeds == 0)[:, None].to(refined.dtype)
    object_mean = (refined * own).sum(dim=2) / own.sum(dim=2).clamp(min=1)
    ground_mean = (refined * ground).sum(dim=2) / ground.sum(dim=2).clamp(min=1)
    span = (object_mean - ground_mean)[..., None]
    scaled = ((refined - ground_mean[..., None]) / span.clamp(min=EPS)).clamp(0, 1)
    usable = (span > EPS) & own.any(dim=2)[..., None] & ground.any(dim=2)[..., None] & present[..., None]
    return torch.where(usable, scaled, 0.5)
