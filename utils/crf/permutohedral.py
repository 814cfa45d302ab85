"""Gaussian filter in a space of a few dimensions on the permutohedral lattice (Adams, Baek & Davis 2010), in torch.

The values of all pixels are splatted onto the vertices of the simplices around them, blurred along each axis of the
lattice and sliced back: sums over all pairs of pixels in time linear in their number. Every step is a sparse matrix
product or a sum of neighbours, so that the same code runs on CPU and CUDA, for many values and several images at once.
"""
import warnings

import numpy as np
import torch
from scipy.sparse import csr_array

FEW = 3  # columns up to which, on a CPU, products by scipy one at a time are faster than PyTorch's (MKL's) of all
LAST_KEY = 2**62  # keys of vertices are packed into int64
FAR = 2**20  # standard deviations: beyond, float32 cannot resolve where in its simplex a pixel lies


class Lattice:
    """The lattice of the features of N pixels; call it to filter their values.

    features: (N, d) float32, d at least 1, in standard deviations of the Gaussian exp(-|f_i - f_j|^2 / 2).
    groups: (N,) int64 from 0, or None: pixels of different groups (images) do not see each other.
    Memory: (d + 1) (16 N + 16 M) bytes for M vertices, of which there are N / 40 to 1.2 N on photos; at the peak of
    building 70 to 110 (d + 1) N.
    Raises ValueError for features beyond 2^20 or not finite, or if they span more than 2^62 cells of the lattice.
    """

    @torch.no_grad()
    def __init__(self, features: torch.Tensor, groups: torch.Tensor | None = None):
        if not features.abs().max() < FAR:
            raise ValueError(f"the features reach {features.abs().max():.1e} standard deviations; give larger widths")
        weights, keys, strides, span = _corners(features, groups)
        # (d + 1, N) each: a row holds the vertices of one remainder. Rows alone are sorted by digits, twice as fast.
        keys, order = map(torch.stack, zip(*(row.sort(stable=True) for row in keys)))
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[:, 1:], keys[:, :-1], out=first[:, 1:])
        remainder = torch.arange(len(keys), dtype=keys.dtype, device=keys.device)[:, None]
        vertices = keys.add_(remainder * span)[first]  # (M,), ascending
        del keys
        vertex = (first.flatten().cumsum(0, dtype=torch.int32) - 1).view_as(order)
        starts = torch.cat([first.flatten().nonzero()[:, 0], order.new_full((1,), order.numel())])
        size = (len(vertices), len(features))
        self.splat = Sparse(starts, order, weights.gather(1, order), size)
        corners = torch.empty_like(vertex).scatter_(1, order, vertex)
        del order, vertex, first
        rows = torch.arange(0, corners.numel() + 1, len(corners), device=corners.device)
        self.slice = Sparse(rows, corners.T, weights.T, size[::-1])
        self.neighbours = [_neighbours(vertices, stride, strides, span) for stride in strides]

    @torch.no_grad()
    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Filter values (N, K) float32.  Returns (N, K): weighted sums over all pixels, up to one constant factor."""
        if values.device.type == "cpu" and 0 < values.shape[1] <= FEW:
            return torch.from_numpy(np.stack([self._column(column) for column in values.T.contiguous().numpy()])).T
        lattice = self.splat.tensor @ values
        for neighbours in self.neighbours:
            beside = torch.cat([lattice, lattice.new_zeros(1, lattice.shape[1])])
            beside = beside.index_select(0, neighbours[0]).add_(beside.index_select(0, neighbours[1]))
            lattice = lattice.add_(beside, alpha=0.5)
        return self.slice.tensor @ lattice

    def _column(self, values: np.ndarray) -> np.ndarray:
        """The filter for a single column (N,), on a CPU."""
        lattice = self.splat.array @ values
        for neighbours in self.neighbours:
            before, after = neighbours.numpy()
            beside = np.append(lattice, np.float32(0))
            total = beside.take(before)
            total += beside.take(after)
            total *= 0.5
            lattice += total
        return self.slice.array @ lattice


class Sparse:
    """A sparse matrix in CSR, as a `tensor` and, on a CPU, as scipy's `array` over the same memory.

    starts: (rows + 1,) where each row begins.  columns, values: of its entries, row by row.  size: (rows, columns).
    """

    def __init__(self, starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, size: tuple[int, int]):
        # 32-bit indices: MKL and cuSPARSE would convert longer ones, or run slower with them.
        parts = starts.int(), columns.int().flatten(), values.flatten()
        self.tensor = torch.sparse_csr_tensor(*parts, size, check_invariants=False)
        if values.device.type == "cpu":
            starts, columns, values = (part.numpy() for part in parts)
            self.array = csr_array((values, columns, starts), shape=size)


def _corners(features, groups):
    # A function of its own, so that the intermediate tensors, as large as the keys, are freed before the sort.
    cells, rank, weights = _simplices(features)
    return weights, *_vertex_keys(cells, rank, groups)


def _simplices(features):
    """The simplex around each pixel (Sec. 3.1, Alg. 1): of the d + 1 coordinates in the hyperplane of sum 0,

    cells (d + 1, N) int32, those of the remainder-0 vertex divided by d + 1; rank (d + 1, N) int64, a permutation of
    0..d for each pixel; weights (d + 1, N) float32, barycentric, of the vertices of remainder 0..d.
    """
    d = features.shape[1]
    elevated = _embedding(d, features.device).T @ features.T  # (d + 1, N)
    cells = (elevated / (d + 1)).round_()
    offset = elevated.sub_(cells, alpha=d + 1)
    excess = cells.sum(dim=0).to(torch.int8)
    cells = cells.int()
    rank = torch.arange(d + 1, dtype=torch.int8, device=cells.device)[:, None].repeat(1, cells.shape[1])
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            less = (offset[i] < offset[j]).view(torch.int8)
            rank[i] += less
            rank[j] -= less
    # Rounded coordinates sum to `excess`, not 0; those that were rounded furthest are corrected.
    rank += excess
    step = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    cells += step
    offset.sub_(step, alpha=d + 1)
    rank = rank.add_(step, alpha=d + 1).long()
    ranked = torch.empty_like(offset).scatter_(0, rank, offset).div_(d + 1).flip(0)  # the largest first
    weights = torch.empty_like(ranked)
    torch.sub(ranked[0], ranked[-1], out=weights[0]).add_(1)
    torch.sub(ranked[1:], ranked[:-1], out=weights[1:])
    return cells, rank, weights


def _embedding(d, device):
    """(d, d + 1): the map into the hyperplane (Sec. 3.1), scaled so that the blur below has a deviation of 1."""
    matrix = torch.zeros(d, d + 1)
    for k in range(d):
        matrix[k, :k + 1], matrix[k, k + 1] = 1, -(k + 1)
        matrix[k] *= (2 / 3) ** 0.5 * (d + 1) / ((k + 1) * (k + 2)) ** 0.5
    return matrix.to(device)


def _vertex_keys(cells, rank, groups):
    """A number for each vertex of each pixel's simplex, unique among the vertices of one remainder.

    The vertex of remainder k has coordinates (d + 1) (cell - [rank > d - k]) + k: the cells, without the last, which
    the others determine, are the digits of the key.
    Returns (keys (d + 1, N), strides: list of d + 1 ints by which a step along an axis changes the key, span: int).
    """
    d = len(cells) - 1
    low, high = torch.aminmax(cells[:d], dim=1)
    strides, span = [], 1
    for width in (high - low + 4).tolist():  # below: 1 for the corners, 1 for their neighbours; above: 1
        strides.append(span)
        span *= width
    images = 1 if groups is None else int(groups.max()) + 1
    if span * images * (d + 1) >= LAST_KEY:
        raise ValueError(f"the features span {span * images:.1e} lattice cells; give larger widths, or fewer images")
    # int32 is sorted in half the time.
    dtype = torch.int32 if span * images * (d + 1) < 2**31 else torch.int64
    base = torch.zeros_like(rank[0], dtype=dtype) if groups is None else (groups * span).to(dtype)
    for cell, lowest, stride in zip(cells, low.tolist(), strides):
        base += (cell - (lowest - 2)).to(dtype) * stride
    strides.append(0)
    stride = torch.tensor(strides, dtype=dtype, device=cells.device)[:, None].expand_as(rank)
    ranked = torch.empty_like(stride, memory_format=torch.contiguous_format).scatter_(0, rank, stride)
    keys = torch.cat([base[None], -ranked.flip(0)[:-1]]).cumsum(0, dtype=dtype)
    return keys, strides, span * images


def _neighbours(vertices, stride, strides, span):
    """The vertices before and after each of M along one axis, whose halves the blur (1/2, 1, 1/2) adds (Sec. 3.2):
    (2, M) int64, M where there is none.

    The next vertex has one coordinate d larger and the others 1 smaller: of remainder k - 1 with one cell stepped up,
    or from remainder 0 of remainder d with all other cells stepped down.
    """
    count = len(vertices)
    to_last = (len(strides) - 1) * span - sum(strides) + stride
    target = vertices + torch.where(vertices < span, to_last, stride - span).to(vertices.dtype)
    if vertices.is_cuda:
        after = torch.searchsorted(vertices, target)
    else:  # numpy makes use of it that the targets ascend, but for one jump
        after = torch.from_numpy(np.searchsorted(vertices.numpy(), target.numpy()))
    after = torch.where(vertices[after.clamp(max=count - 1)] == target, after, count)
    here = torch.arange(count, device=vertices.device)
    before = here.new_full((count + 1,), count).scatter_(0, after, here)[:count]
    return torch.stack([before, after])


# PyTorch warns once per process that such tensors are in beta; done here, since lattices may be built in threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    Sparse(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
