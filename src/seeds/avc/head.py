"""The affinity head of AVC: unit features, the affinities they span, and the CAMs refined along them.

The idea and its name are of the AVC system (docs/avc.md): the rows of the pixel-to-pixel affinity map (the affinity
vectors) of one object's pixels are equal, and affinity across the object's border is zero. Its losses were not
published; those here are this project's. The ReLU of cosine similarities as affinity is SEAM's (Wang et al., CVPR 2020,
Sec. 3.3), rows of it as affinity vectors are SIPE's (Chen et al., CVPR 2022).

Grids are flattened: N = h * w cells, row by row. All is computed in float32.
"""
import torch
from torch import nn
from torch.nn import functional as F

from src.seeds.cam import FINEST_GRID
from utils import distributed
from utils.grids import Size, resize_tensor

CELL = 8            # pixels of a cell with colours, unless the grid is at its limit
TRAINING_GRID = 20  # cells a side at most with colours while training, where carrying A between views costs N^3
COLOURS = 3         # channels of colour, the last ones of a description
COMPLEMENT = 4      # power of the complement of a map: cells of half its maximum say little about the background
MOMENTUM = 0.1      # of the running statistics, as batch normalisation's
ROW_SCALE = 0.03    # norm of the projection's rows at the start: only directions count, so short rows learn fast
EPS = 1e-6
TINY = 1e-12        # of ratios, which are about 1 / N


class AffinityHead(nn.Module):
    """Description of a cell -> unit features, whose products are affinities, weighted by similarity of colour if asked.

    Unit features: each channel standardised, a bias-free 1x1 projection, normalised to length 1.
    channels: D of the feature map.  dims: d of the unit features.  power: k, of the affinities that refine a CAM.
    colour: standard deviation of the Gaussian of colour differences, in standard deviations of ImageNet's colours; 0
    leaves colours out.  With them, cells are smaller, their mean colours count among the features, and refined CAMs are
    `refined_ratios`.
    Statistics come from valid cells and run along while training; the running ones are used in training too, so that
    a cell's feature does not depend on its batch.
    """

    def __init__(self, channels: int, dims: int = 32, power: int = 4, colour: float = 0.0):
        super().__init__()
        self.power, self.colour = power, colour
        channels += COLOURS if colour else 0
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of training so far: see `observe`
        self.project = nn.Conv2d(channels, dims, 1, bias=False)
        nn.init.orthogonal_(self.project.weight.view(dims, -1), gain=ROW_SCALE)

    def describe(self, features: torch.Tensor, images: torch.Tensor, most: int = FINEST_GRID) -> torch.Tensor:
        """What A is computed from: (B, D, h, w) float32, or (B, D + 3, h, w) with colours.

        features: (B, D, h', w').  images: (B, 3, H, W) that they are of, normalised.  most: cells a side at most, with
        colours; without them the grid is that of the features, at most 28x28.
        """
        if not self.colour:
            return resize_tensor(features.float(), tuple(min(side, FINEST_GRID) for side in features.shape[-2:]))
        grid = tuple(min(most, (side - 1) // CELL + 1) for side in images.shape[-2:])
        return torch.cat([resize_tensor(features.float(), grid), mean_colours(images.float(), grid)], dim=1)

    def forward(self, described: torch.Tensor) -> torch.Tensor:
        """described: see `describe`.  Returns unit features (B, d, h, w), float32."""
        with torch.autocast(described.device.type, enabled=False):
            x = (described - self.mean[:, None, None]) * (self.variance[:, None, None] + 1e-5).rsqrt()
            return F.normalize(self.project(x), dim=1)

    def affinity(self, described: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(unit features (B, d, h, w), A (B, N, N)): A = ReLU(F^T F), weighted by similarity of colour if asked."""
        unit = self(described)
        matrix = affinity(unit)
        return unit, matrix * similarity(described[:, -COLOURS:], self.colour) if self.colour else matrix

    def refined(self, cam: torch.Tensor, vectors: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The refined maps (B, K, N).  cam: (B, K, N), at least 0.  vectors, valid: see `affinity_vectors`."""
        if self.colour:
            return refined_ratios(cam, vectors, valid, self.power)
        return refine(cam, vectors, self.power)

    @torch.no_grad()
    def observe(self, described: torch.Tensor, valid: torch.Tensor) -> None:
        """Count a step, and move the statistics towards those of its valid cells in all processes.

        described: see `describe`.  valid: (B, N) bool on its grid.
        """
        cells = described.flatten(2).transpose(1, 2)  # (B, N, D)
        weight = valid[..., None].to(described.dtype)  # (B, N, 1)
        sums = distributed.all_reduce(torch.cat([(cells * weight).sum(dim=(0, 1)), weight.sum()[None]]))
        count = sums[-1]
        mean = sums[:-1] / count.clamp(min=1)
        squares = distributed.all_reduce((((cells - mean) * weight) ** 2).sum(dim=(0, 1)))
        variance = squares / (count - 1).clamp(min=1)
        # A single cell has no variance: the statistics then stay. `steps` and `count` stay on the device.
        speed = torch.where(self.steps > 0, MOMENTUM, 1.0).to(mean) * (count > 1)
        self.mean.lerp_(mean, speed)
        self.variance.lerp_(variance, speed)
        self.steps += 1


def mean_colours(images: torch.Tensor, grid: Size) -> torch.Tensor:
    """Means of images (B, 3, H, W) over windows as large as a cell (h, w), corners on corners: (B, 3, h, w).

    PyTorch's `antialias` is no help: with corners on corners it is off by half a cell.
    """
    for axis in (0, 1):
        cell = (images.shape[2 + axis] - 1) / max(1, grid[axis] - 1)
        window = 2 * int(cell // 2) + 1  # odd, so that its middle is a pixel
        kernel = (window, 1) if axis == 0 else (1, window)
        images = F.avg_pool2d(images, kernel, 1, [side // 2 for side in kernel], count_include_pad=False)
    return resize_tensor(images, grid)


def affinity(unit: torch.Tensor) -> torch.Tensor:
    """A = ReLU(F^T F).  unit: (B, d, h, w) of length 1.  Returns (B, N, N) float32 in [0, 1], symmetric."""
    with torch.autocast(unit.device.type, enabled=False):
        flat = unit.float().flatten(2)
        return torch.relu(flat.transpose(1, 2) @ flat)


def similarity(colours: torch.Tensor, deviation: float) -> torch.Tensor:
    """exp(-|c_i - c_j|^2 / 2 deviation^2) of all pairs of cells: (B, N, N) in [0, 1].  colours: (B, 3, h, w)."""
    cells = colours.float().flatten(2).transpose(1, 2) / deviation
    return torch.exp(torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist").square() / -2)


def affinity_vectors(matrix: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows that sum to 1 over the valid columns; rows of padding, and its columns, are 0.

    matrix: (B, N, N), at least 0.  valid: (B, N) bool.  Returns (B, N, N).
    """
    matrix = matrix * (valid[:, :, None] & valid[:, None])
    return matrix / matrix.sum(dim=2, keepdim=True).clamp(min=EPS)


def refine(cam: torch.Tensor, vectors: torch.Tensor, steps: int) -> torch.Tensor:
    """CAM . A^k: each cell takes the average of the maps, weighted by its affinity vector, k = `steps` times.

    cam: (B, K, N).  vectors: (B, N, N), see `affinity_vectors`.  Returns (B, K, N).
    """
    cells = cam.float().transpose(1, 2)  # (B, N, K)
    for _ in range(steps):
        cells = vectors @ cells
    return cells.transpose(1, 2)


def refined_ratios(cam: torch.Tensor, vectors: torch.Tensor, valid: torch.Tensor, steps: int) -> torch.Tensor:
    """The refined CAM: the map's ratio of what each class's map and its complement send to a cell along A^k.

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
