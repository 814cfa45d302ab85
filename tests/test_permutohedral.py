"""The permutohedral lattice against a plain dictionary of vertices, and against the Gaussian itself."""
import itertools
import math

import pytest
import torch

from utils.crf.permutohedral import Lattice


def features(count, d, spread=3.0, seed=0):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed)) * spread


def reference(points, values):
    """Splat, blur and slice as in the paper's Sec. 3, one point and one vertex at a time, in float64."""
    d = points.shape[1]
    corners = [_simplex(point.tolist(), d) for point in points.double()]
    lattice = {}
    for corner, value in zip(corners, values.double()):
        for vertex, weight in corner:
            lattice[vertex] = lattice.get(vertex, 0) + weight * value
    for axis in range(d + 1):
        step = [d if k == axis else -1 for k in range(d + 1)]

        def at(vertex, sign):
            return lattice.get(tuple(v + sign * s for v, s in zip(vertex, step)), 0)
        lattice = {vertex: value + (at(vertex, 1) + at(vertex, -1)) / 2 for vertex, value in lattice.items()}
    return torch.stack([sum(weight * lattice[vertex] for vertex, weight in corner) for corner in corners])


def _simplex(point, d):
    """The vertices around a point and their barycentric weights, these as the solution of a linear system."""
    scale = math.sqrt(2 / 3) * (d + 1)
    scaled = [scale * p / math.sqrt((k + 1) * (k + 2)) for k, p in enumerate(point)]
    y = [sum(scaled[k:]) - (k * scaled[k - 1] if k else 0) for k in range(d + 1)]
    # Remainder 0: the nearest point of (d + 1) Z^(d+1) in the hyperplane of sum 0.
    near = [round(value / (d + 1)) for value in y]
    gaps = sorted(range(d + 1), key=lambda k: y[k] - near[k] * (d + 1))
    excess = sum(near)
    for k in (gaps[:excess] if excess > 0 else gaps[len(gaps) + excess:]):
        near[k] -= 1 if excess > 0 else -1
    gap = [value - n * (d + 1) for value, n in zip(y, near)]
    order = sorted(range(d + 1), key=lambda k: gap[k])
    vertices = []
    for remainder in range(d + 1):
        lowered = set(order[:remainder])
        vertex = tuple(n * (d + 1) + remainder - (d + 1) * (k in lowered) for k, n in enumerate(near))
        vertices.append(vertex)
    system = torch.tensor([[*map(float, vertex), 1.0] for vertex in vertices], dtype=torch.double).T
    weights = torch.linalg.lstsq(system, torch.tensor([*y, 1.0], dtype=torch.double)[:, None]).solution[:, 0]
    return list(zip(vertices, weights.tolist()))


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_the_filter_equals_the_dictionary_of_vertices(d):
    points, values = features(60, d), torch.rand(60, 3)
    expected = reference(points, values)
    error = ((Lattice(points)(values) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"d = {d}: relative error {error:.1e}"


def test_far_apart_clusters_need_wide_keys_and_are_filtered_the_same():
    centres = features(20, 5, spread=300.0)
    points, values = torch.cat([centres, centres + features(20, 5, 0.4, 1), centres]), torch.rand(60, 2)
    expected = reference(points, values)
    error = ((Lattice(points)(values) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-3, f"relative error {error:.1e}"  # float32 has 1e-4 left of a place 600 cells out


def test_the_reference_simplices_hold_their_points():
    for point, d in itertools.product(features(20, 5), (2, 5)):
        weights = torch.tensor([weight for _, weight in _simplex(point[:d].tolist(), d)])
        assert weights.min() > -1e-9 and abs(weights.sum() - 1) < 1e-6, weights


@pytest.mark.parametrize("d, bound", [(2, 0.002), (5, 0.01)])
def test_normalised_it_is_close_to_the_gaussian(d, bound):
    points, values = features(800, d, spread=1.0), torch.rand(800, 2)
    kernel = torch.exp(-torch.cdist(points, points) ** 2 / 2)
    lattice = Lattice(points)
    means = lattice(values) / lattice(torch.ones(800, 1))
    error = (means - kernel @ values / kernel.sum(dim=1, keepdim=True)).abs().mean().item()
    assert error < bound, f"d = {d}: weighted means of values in [0, 1] differ by {error:.4f} on average"


def test_it_is_symmetric_and_linear():
    points = features(150, 3)
    lattice, (one, two) = Lattice(points), torch.rand(2, 150, 1)
    forth, back = (two * lattice(one)).sum().item(), (one * lattice(two)).sum().item()
    assert abs(forth - back) < 0.02 * forth, f"{forth} and {back}"  # the blurs of a lattice with gaps do not commute
    error = (lattice(one + 2 * two) - lattice(one) - 2 * lattice(two)).abs().max().item()
    assert error < 1e-4, f"off by {error:.1e}"


def test_groups_do_not_see_each_other():
    sizes = (40, 1, 70)
    parts = [features(size, 2, seed=size) for size in sizes]
    values = [torch.rand(size, 2) for size in sizes]
    groups = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    together = Lattice(torch.cat(parts), groups)(torch.cat(values)).split(sizes)
    for part, value, found in zip(parts, values, together):
        error = (Lattice(part)(value) - found).abs().max().item()
        assert error < 1e-5, f"{len(part)} points: off by {error:.1e}"


@pytest.mark.parametrize("farthest", [2.0**21, math.nan, math.inf])
def test_features_too_far_out_are_refused(farthest):
    with pytest.raises(ValueError, match="standard deviations; give larger widths"):
        Lattice(torch.tensor([[0.0], [farthest]]))


def test_more_cells_than_a_key_can_number_are_refused():
    points = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 2.0**17
    with pytest.raises(ValueError, match="lattice cells; give larger widths"):
        Lattice(points)
