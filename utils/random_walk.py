"""Random walk of class scores along pixel affinities: pure torch functions, any device.

An affinity is a *stencil*: a tensor (P, h, w) in [0, 1] whose entry [p, y, x] is the affinity between the pixels
(y, x) and (y + dy_p, x + dx_p), where (dy_p, dx_p) = offsets[p], and 0 where the partner lies outside the grid. Each
pair is stored once, at its upper (or left) pixel. Pairs near the border are included; published code drops them.
"""
import functools
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

Offsets = Sequence[tuple[int, int]]  # (dy, dx) of each pair


def half_disc(radius: float) -> list[tuple[int, int]]:
    """List the pixel pairs within a radius, each pair once (Ahn & Kwak 2018, Sec. 3.2).

    radius: pixels, above 0.
    Returns a list of (dy, dx) with dy > 0, or dy == 0 and dx > 0, and dy^2 + dx^2 < radius^2, in raster order; radius 5
    gives 34, radius 1 none.  Raises ValueError if the radius is not above 0.
    """
    if not radius > 0:
        raise ValueError(f"radius is {radius}; give a number of pixels above 0")
    reach = math.ceil(radius) - 1
    disc = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1) if dy**2 + dx**2 < radius**2]
    return [(dy, dx) for dy, dx in disc if dy > 0 or dx > 0]


def transition(affinity: torch.Tensor, offsets: Offsets, beta: float = 8.0) -> torch.Tensor:
    """Build the transition matrix T = D^-1 A^beta of the walk (Ahn & Kwak 2018, Sec. 3.3).

    affinity: (P, h, w) float stencil, values in [0, 1]; values for partners outside the grid are not read.
    offsets: P pairs (dy, dx) in the half plane of `half_disc`.
    beta: element-wise power above 0 that suppresses weak affinities.
    Returns T, (N, N) sparse CSR float32 on the affinity's device, N = h * w, pixels in raster order: A is made
    symmetric, its diagonal is 1, and the rows of T sum to 1.
    Raises ValueError for a wrong shape or offset, a value outside [0, 1] or not finite, or a beta that is not above 0.
    """
    _check_affinity(affinity, offsets, beta)
    plane, column, inside = _neighbours(offsets, *affinity.shape[1:], affinity.device)  # (M,), (N, M), (N, M)
    pixel = torch.arange(len(column), device=affinity.device)[:, None]
    holder = torch.minimum(pixel, column).clamp_(min=0)  # a pair is stored at the earlier of its two pixels
    loops = affinity.new_ones(1, *affinity.shape[1:])
    stencil = torch.cat([affinity, loops]).float().flatten(1)  # (P + 1, N)
    weight = stencil[plane, holder].pow_(beta).mul_(inside)  # (N, M)
    weight /= weight.sum(dim=1, keepdim=True)  # at least 1: the self-affinity
    return _csr(inside, column, weight)


def walk_frames(scores: torch.Tensor, affinity: torch.Tensor, offsets: Offsets, beta: float = 8.0, steps: int = 256,
                every: int = 16) -> Iterator[tuple[int, torch.Tensor]]:
    """Walk as `random_walk` with eps = 0 and return intermediate scores, for an animation.

    scores, affinity, offsets, beta, steps: as in `random_walk`.  every: steps between two frames, at least 1.
    Returns an iterator over (step, scores (K, h, w)): step 0, then each multiple of `every`, and `steps` last.
    Raises ValueError at the call, before the first frame, as `random_walk` does.
    """
    _check_scores(scores, affinity)
    if steps < 0 or every < 1:
        raise ValueError(f"steps is {steps} and every is {every}; give steps >= 0 and every >= 1")
    return _walk(scores, transition(affinity.detach(), offsets, beta), steps, every)


def random_walk(scores: torch.Tensor, affinity: torch.Tensor, offsets: Offsets, beta: float = 8.0, steps: int = 256,
                eps: float = 1e-3) -> torch.Tensor:
    """Propagate class scores along pixel affinities: T^steps scores (Ahn & Kwak 2018, Sec. 3.3).

    scores: (K, h, w) float, any finite values, at the affinity's grid.
    affinity: (P, h, w) float stencil, values in [0, 1], on the scores' device.  offsets: its P pairs (dy, dx).
    beta: element-wise power above 0 that suppresses weak affinities.  steps: power of T; 0 leaves the scores unchanged.
    eps: bound of the relative error, in the norm below, of a polynomial that replaces T^steps; 0 for T^steps itself.
    Returns (K, h, w), same device and dtype, without gradient.
    Products are sparse and float32, where published code squares a dense (N, N) matrix: `steps` of them with eps = 0,
    else as many as the degree of `chebyshev`'s polynomial (56 for T^256 at 1e-3).
    ||walked - T^steps scores|| <= eps ||scores|| for ||v||^2 = sum_i d_i v_i^2, d_i the row sums of A^beta: in this
    inner product T is symmetric, with its spectrum in [-1, 1]. Constant scores stay constant.
    Raises ValueError if the grids or devices differ, steps or eps is negative, or a value is not finite.
    """
    return random_walks([scores], [affinity], offsets, beta, steps, eps)[0]


def random_walks(scores: Sequence[torch.Tensor], affinities: Sequence[torch.Tensor], offsets: Offsets,
                 beta: float = 8.0, steps: int = 256, eps: float = 1e-3) -> list[torch.Tensor]:
    """`random_walk` of several images at once: a block-diagonal T keeps a GPU busy with one product for all of them.

    scores, affinities: one tensor per image; grids and numbers of maps may differ.  Returns a list of (K, h, w).
    """
    for one, affinity in zip(scores, affinities, strict=True):
        _check_scores(one, affinity)
    if steps < 0 or not eps >= 0:
        raise ValueError(f"steps is {steps} and eps is {eps}; give steps >= 0, and eps = 0 for the exact power or "
                         "eps > 0 as a bound of the error")
    matrix = _block_diagonal([transition(affinity.detach(), offsets, beta) for affinity in affinities])
    most = max(map(len, scores))
    columns = torch.cat([_columns(one, most) for one in scores])  # (N of all images, most + padding)
    walked = _power(columns, matrix, steps, eps).split([one[0].numel() for one in scores])
    return [_maps(part, one) for part, one in zip(walked, scores)]


@functools.lru_cache(maxsize=32)
def chebyshev(steps: int, eps: float) -> tuple[float, ...]:
    """Coefficients c of a polynomial sum_k c_k T_k(x), T_k Chebyshev's, within eps of x^steps on [-1, 1].

    x^n is exactly such a sum, c_k the probability that n fair steps of +-1 end k away from 0 (Sachdeva & Vishnoi 2014,
    Thm. 3.1). The highest coefficients are dropped as long as they sum to at most eps / 2, and the others are scaled to
    sum 1, so that the polynomial is 1 at 1, which adds another eps / 2.
    steps: n, at least 0.  eps: above 0.  Returns the coefficients.  Raises ValueError for negative steps.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; give 0 or more")
    terms = [2 * math.comb(steps, (steps - k) // 2) / 2**steps if (steps - k) % 2 == 0 else 0.0
             for k in range(steps + 1)]
    terms[0] /= 2
    tail = 0.0
    while len(terms) > 1 and tail + terms[-1] <= eps / 2:
        tail += terms.pop()
    total = math.fsum(terms)
    return tuple(term / total for term in terms)


@torch.no_grad()
def _power(columns: torch.Tensor, matrix: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """matrix^steps columns, within eps, by the cheaper of its Chebyshev expansion and `steps` products."""
    terms = chebyshev(steps, eps) if eps else ()
    if eps and len(terms) <= steps:
        return _expand(columns, matrix, terms)
    for _ in range(steps):
        columns = matrix @ columns
    return columns


def _expand(before, matrix, terms):
    """sum_k terms[k] T_k(matrix) before, by T_k+1(x) = 2 x T_k(x) - T_k-1(x).  Overwrites `before`."""
    total = terms[0] * before
    if len(terms) > 1:
        current = matrix @ before
        total.add_(current, alpha=terms[1])
        for term in terms[2:]:
            # In place of the older of the two: nothing is allocated but what the product returns.
            before, current = current, torch.sub(matrix @ current * 2, before, out=before)
            total.add_(current, alpha=term)
    return total


def _columns(scores, most):
    """Scores (K, h, w) as the float32 columns (N, most + padding) of a product with T."""
    # MKL's sparse product is nearly twice as fast when the number of columns is a multiple of 4.
    return F.pad(scores.detach().float().flatten(1), (0, 0, 0, -(-most // 4) * 4 - len(scores))).T.contiguous()


def _maps(columns, scores):
    """A copy of such columns in the shape and type of `scores`."""
    frame = columns[:, : len(scores)].T.reshape(scores.shape)  # (K, h, w), perhaps a view
    return frame.to(scores.dtype, copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def _walk(scores, matrix, steps, every):
    yield 0, scores.clone()
    walked = _columns(scores, len(scores))
    for step in range(1, steps + 1):
        walked = matrix @ walked
        if step % every == 0 or step == steps:
            yield step, _maps(walked, scores)


def _neighbours(offsets, height, width, device):
    """List the M = 2P + 1 neighbours of every pixel, self included, in raster order: CSR wants columns ascending.

    Returns plane (M,), the stencil row that holds the pair (P for the pixel itself); column (N, M), the partner's
    raster index; inside (N, M) bool, whether the partner lies on the grid.
    """
    forward = [(dy, dx, p) for p, (dy, dx) in enumerate(offsets)]
    backward = [(-dy, -dx, p) for dy, dx, p in forward]
    table = torch.tensor(sorted([*forward, *backward, (0, 0, len(offsets))]), device=device)  # (M, 3)
    pixel = torch.arange(height * width, device=device)[:, None]  # (N, 1)
    y = torch.div(pixel, width, rounding_mode="floor") + table[:, 0]  # (N, M)
    x = pixel % width + table[:, 1]  # (N, M)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return table[:, 2], y * width + x, inside


def _csr(inside, column, weight):
    return _matrix(inside.sum(dim=1).cumsum(0), column[inside], weight[inside])


def _block_diagonal(matrices):
    """One matrix whose blocks are the given ones."""
    if len(matrices) == 1:
        return matrices[0]
    ends, columns, rows, entries = [], [], 0, 0
    for matrix in matrices:
        ends.append(matrix.crow_indices()[1:].long() + entries)
        columns.append(matrix.col_indices().long() + rows)
        rows, entries = rows + len(matrix), entries + len(matrix.values())
    return _matrix(torch.cat(ends), torch.cat(columns), torch.cat([matrix.values() for matrix in matrices]))


def _matrix(ends, columns, values):
    """Square CSR matrix.  ends: (N,) entries up to the end of each row.  columns, values: (M,) of the entries."""
    # int32 indices make the products a third faster; int64 where the entries cannot be counted in 32 bits.
    index = torch.int32 if len(values) < 2**31 else torch.int64
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(F.pad(ends, (1, 0)).to(index), columns.to(index), values, (len(ends),) * 2,
                                       check_invariants=False)


def _check_affinity(affinity, offsets, beta):
    if affinity.ndim != 3 or not affinity.is_floating_point() or affinity.shape[0] != len(offsets):
        found = f"{affinity.dtype} {tuple(affinity.shape)}"
        raise ValueError(f"affinity is {found}; give floats (P, h, w) with P = {len(offsets)} offsets")
    if any(dy < 0 or (dy == 0 and dx <= 0) for dy, dx in offsets) or len(set(offsets)) < len(offsets):
        raise ValueError("offsets must be distinct (dy, dx) with dy > 0, or dy == 0 and dx > 0: see half_disc")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; give a finite power above 0")
    if affinity.numel() and not ((affinity >= 0) & (affinity <= 1)).all():
        raise ValueError("affinity has values outside [0, 1] or not finite; check the AffinityNet's features")


def _check_scores(scores, affinity):
    if scores.ndim != 3 or not scores.is_floating_point():
        raise ValueError(f"scores are {scores.dtype} {tuple(scores.shape)}; give floats (K, h, w)")
    if scores.shape[1:] != affinity.shape[1:]:
        grids = f"{tuple(scores.shape[1:])} and {tuple(affinity.shape[1:])}"
        raise ValueError(f"the grids of scores and affinity differ: {grids}; resize the scores to the affinity's grid")
    if scores.device != affinity.device:
        raise ValueError(f"scores are on {scores.device} and affinity on {affinity.device}; move one of them")
    if not torch.isfinite(scores).all():
        raise ValueError("scores have values that are not finite; check the classifier's maps")
