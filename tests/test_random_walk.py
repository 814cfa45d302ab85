"""Random walk: half disc, transition matrix and propagation against double loops on a small grid; their refusals."""
import math
import warnings

import numpy as np
import pytest
import torch

from utils.random_walk import chebyshev, half_disc, random_walk, random_walks, transition, walk_frames

GRID = (6, 7)


def random_case(radius=3, grid=GRID, maps=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    offsets = half_disc(radius)
    affinity = torch.rand(len(offsets), *grid, generator=generator, dtype=dtype)
    return torch.rand(maps, *grid, generator=generator, dtype=dtype), affinity, offsets


def dense_transition(affinity, offsets, beta):
    """The definition, pixel by pixel, in float64."""
    _, height, width = affinity.shape
    matrix = torch.eye(height * width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for p, (dy, dx) in enumerate(offsets):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    here, there = y * width + x, (y + dy) * width + x + dx
                    matrix[here, there] = matrix[there, here] = affinity[p, y, x].double() ** beta
    return matrix / matrix.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("radius, pairs", [(1, 0), (1.5, 4), (2, 4), (3, 12), (5, 34)])
def test_half_disc_has_the_published_number_of_pairs(radius, pairs):
    found = half_disc(radius)
    assert len(found) == len(set(found)) == pairs, f"radius {radius}: {len(found)} pairs, expected {pairs}"


def test_half_disc_and_its_mirror_image_fill_the_disc_once():
    mirrored = [(-dy, -dx) for dy, dx in half_disc(5)]
    disc = {(dy, dx) for dy in range(-6, 7) for dx in range(-6, 7) if 0 < dy * dy + dx * dx < 25}
    assert sorted(half_disc(5) + mirrored) == sorted(disc), f"{len(disc)} neighbours expected"


@pytest.mark.parametrize(
    "radius, grid", [(1, GRID), (3, GRID), (5, GRID), (3, (1, 9)), (3, (9, 1)), (5, (2, 3)), (2, (1, 1))]
)
def test_transition_equals_a_double_loop(radius, grid):
    _, affinity, offsets = random_case(radius, grid)
    found = transition(affinity, offsets, beta=2.5)
    error = (found.to_dense().double() - dense_transition(affinity, offsets, 2.5)).abs().max()
    assert found.layout == torch.sparse_csr and found.dtype == torch.float32, f"{found.layout} {found.dtype}"
    assert error < 1e-6, f"largest difference {error:.2e}"


def test_transition_is_a_valid_csr_matrix_with_ascending_columns():
    _, affinity, offsets = random_case()
    found = transition(affinity, offsets)
    row, column = found.crow_indices(), found.col_indices()
    torch.sparse_csr_tensor(row, column, found.values(), found.shape, check_invariants=True)  # raises if it is not
    ordered = all((column[a + 1 : b] > column[a : b - 1]).all() for a, b in zip(row[:-1].tolist(), row[1:].tolist()))
    assert ordered, f"columns are not ascending in {found.shape}"


@pytest.mark.parametrize("grid", [GRID, (13, 17)])
def test_rows_of_the_transition_sum_to_one(grid):
    _, affinity, offsets = random_case(5, grid)
    error = (transition(affinity, offsets).to_dense().sum(dim=1) - 1).abs().max()
    assert error < 1e-5, f"rows sum to 1 within {error:.2e}"


def test_pairs_between_border_pixels_are_kept():
    offsets = half_disc(2)
    affinity = torch.zeros(len(offsets), *GRID)
    affinity[offsets.index((0, 1)), 0, 0] = 1
    found = transition(affinity, offsets).to_dense()
    assert found[0, 1] == found[1, 0] == 0.5, f"corner pair has {found[0, 1]:.3f} and {found[1, 0]:.3f}, expected 0.5"


def test_values_of_partners_outside_the_grid_are_not_read():
    _, affinity, offsets = random_case()
    clean = affinity.clone()
    for p, (dy, dx) in enumerate(offsets):
        clean[p, GRID[0] - dy :] = 0
        clean[p, :, GRID[1] - dx if dx > 0 else GRID[1] :] = 0
        clean[p, :, : max(-dx, 0)] = 0
    error = (transition(affinity, offsets).to_dense() - transition(clean, offsets).to_dense()).abs().max()
    assert not torch.equal(affinity, clean) and error == 0, f"largest difference {error:.2e}"


@pytest.mark.parametrize("steps", [0, 1, 2, 17, 256])
def test_random_walk_equals_the_dense_matrix_power(steps):
    maps, affinity, offsets = random_case()
    power = torch.linalg.matrix_power(dense_transition(affinity, offsets, 8.0), steps)
    expected = (power @ maps.double().flatten(1).T).T.reshape(maps.shape)
    error = (random_walk(maps, affinity, offsets, steps=steps, eps=0).double() - expected).abs().max()
    assert error < 1e-5, f"T^{steps}: largest difference {error:.2e}"


@pytest.mark.parametrize("eps", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("steps", [1, 2, 17, 64, 256, 1000])
def test_the_expansion_of_a_power_is_within_eps_of_it_and_1_at_1(steps, eps):
    x = np.linspace(-1, 1, 4001)
    terms = chebyshev(steps, eps)
    error = abs(np.polynomial.chebyshev.chebval(x, terms) - x**steps).max()
    assert error <= eps, f"x^{steps} at eps {eps}: off by {error:.2e}"
    assert abs(sum(terms) - 1) < 1e-12 and min(terms) >= 0, f"sum {sum(terms)}, least {min(terms)}"
    assert len(terms) - 1 <= min(steps, math.sqrt(2 * steps * math.log(4 / eps)) + 2), f"degree {len(terms) - 1}"


def test_the_expansion_is_exact_where_nothing_may_be_dropped():
    assert chebyshev(0, 1e-9) == (1.0,) and chebyshev(1, 1e-9) == (0.0, 1.0)
    assert chebyshev(4, 1e-9) == (3 / 8, 0.0, 4 / 8, 0.0, 1 / 8)


@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("steps", [16, 64, 256])
def test_the_expanded_walk_keeps_its_bound_against_the_dense_matrix_power(steps, eps):
    maps, affinity, offsets = random_case(radius=5, grid=(13, 17))
    matrix = dense_transition(affinity, offsets, 8.0)
    expected = (torch.linalg.matrix_power(matrix, steps) @ maps.double().flatten(1).T).T.reshape(maps.shape)
    degree = 1 / matrix.diagonal().reshape(maps.shape[1:])  # row sums of A^beta, whose diagonal is 1
    off = random_walk(maps, affinity, offsets, steps=steps, eps=eps).double() - expected
    norm, total = ((degree * values**2).sum(dim=(1, 2)).sqrt() for values in (off, maps.double()))
    assert (norm <= eps * total + 1e-6 * total).all(), f"relative error {(norm / total).max():.2e} at eps {eps}"


def test_the_order_of_the_offsets_does_not_matter():
    maps, affinity, offsets = random_case()
    order = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = random_walk(maps, affinity[order], [offsets[p] for p in order])
    error = (random_walk(maps, affinity, offsets) - shuffled).abs().max()
    assert error < 1e-6, f"largest difference {error:.2e}"


def test_an_affinity_of_zero_leaves_the_scores_unchanged():
    maps, affinity, offsets = random_case()
    walked = random_walk(maps, torch.zeros_like(affinity), offsets, eps=0)
    assert torch.equal(walked, maps), "the identity walk changed scores"
    error = (random_walk(maps, torch.zeros_like(affinity), offsets) - maps).abs().max()
    assert error < 1e-5, f"the expanded identity walk changed scores by {error:.2e}"


def test_a_constant_map_stays_constant():
    _, affinity, offsets = random_case(5, (13, 17))
    walked = random_walk(torch.full((1, 13, 17), 0.7), affinity, offsets)
    error = (walked - 0.7).abs().max()
    assert error < 1e-4, f"0.7 moved by {error:.2e} in 256 steps"


def test_scores_do_not_cross_a_wall_of_zero_affinity():
    offsets = half_disc(2)
    affinity = torch.ones(len(offsets), *GRID)
    for p, (_, dx) in enumerate(offsets):  # cut every pair between the columns 2 and 3
        affinity[p, :, 2 if dx > 0 else 3] *= float(dx == 0)
    maps = torch.zeros(1, *GRID)
    maps[0, 2, 1] = 1
    walked = random_walk(maps, affinity, offsets)
    assert walked[..., 3:].max() == 0, f"{walked[..., 3:].max():.2e} leaked through the wall"
    assert walked[..., :3].min() > 0.01, f"only {walked[..., :3].min():.2e} arrived on the near side"


@pytest.mark.parametrize("maps", [1, 2, 3, 4, 5, 8])
def test_each_map_walks_alone_whatever_their_number(maps):
    stack, affinity, offsets = random_case(maps=maps)
    alone = torch.cat([random_walk(one[None], affinity, offsets) for one in stack])
    error = (random_walk(stack, affinity, offsets) - alone).abs().max()
    assert error < 1e-6, f"{maps} maps: largest difference {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept_and_inputs_untouched(dtype):
    maps, affinity, offsets = random_case(dtype=dtype)
    before = maps.clone(), affinity.clone()
    walked = random_walk(maps.requires_grad_(), affinity.requires_grad_(), offsets, steps=3)
    assert (walked.dtype, walked.shape) == (dtype, maps.shape), f"{walked.dtype} {tuple(walked.shape)}"
    assert not walked.requires_grad, f"{dtype} scores carry a gradient"
    assert torch.equal(maps, before[0]) and torch.equal(affinity, before[1]), f"{dtype} inputs were changed"


def test_frames_are_the_walks_of_their_steps():
    maps, affinity, offsets = random_case()
    frames = list(walk_frames(maps, affinity, offsets, steps=10, every=4))
    assert [step for step, _ in frames] == [0, 4, 8, 10], f"steps {[step for step, _ in frames]}"
    for step, frame in frames:
        error = (frame - random_walk(maps, affinity, offsets, steps=step)).abs().max()
        assert error < 1e-6, f"frame {step} differs by {error:.2e}"


def test_frames_are_copies():
    maps, affinity, offsets = random_case(maps=4)
    frames = walk_frames(maps, affinity, offsets, steps=2, every=1)
    for _, frame in frames:
        kept = frame.clone()
        frame.zero_()
    error = (kept - random_walk(maps, affinity, offsets, steps=2)).abs().max()
    assert kept.is_contiguous() and error < 1e-6, f"writing on a frame moved the walk by {error:.2e}"


def test_no_warning_is_printed():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        random_walk(*random_case(), steps=2)
    assert not caught, f"warned: {[str(warning.message) for warning in caught]}"


@pytest.mark.parametrize("steps, eps", [(0, 1e-3), (3, 0), (64, 0), (64, 1e-3)])
def test_several_images_at_once_walk_as_each_alone(steps, eps):
    cases = [random_case(grid=grid, maps=maps, seed=seed)
             for seed, (grid, maps) in enumerate([((6, 7), 3), ((1, 1), 4), ((9, 5), 1), ((6, 7), 6)])]
    scores, affinities, (offsets, *_) = zip(*cases)
    originals = [one.clone() for one in scores]
    together = random_walks(scores, affinities, offsets, steps=steps, eps=eps)
    for one, affinity, found, original in zip(scores, affinities, together, originals):
        alone = random_walk(one, affinity, offsets, steps=steps, eps=eps)
        error = (found - alone).abs().max()
        assert found.shape == alone.shape and error < 1e-6, f"{tuple(found.shape)}: largest difference {error:.2e}"
        assert torch.equal(one, original), "the scores that were handed in have changed"


def test_a_list_of_scores_of_another_length_than_the_affinities_is_refused():
    maps, affinity, offsets = random_case()
    with pytest.raises(ValueError, match="zip"):
        random_walks([maps, maps], [affinity], offsets)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scores=torch.rand(3, 7, 6)), "grids of scores and affinity differ"),
        (dict(scores=torch.rand(6, 7)), r"give floats \(K, h, w\)"),
        (dict(scores=torch.ones(3, 6, 7, dtype=torch.int64)), r"give floats \(K, h, w\)"),
        (dict(scores=torch.full((3, 6, 7), float("nan"))), "not finite; check the classifier"),
        (dict(scores=torch.full((3, 6, 7), float("inf"))), "not finite; check the classifier"),
        (dict(scores=torch.rand(3, 6, 7, device="meta")), "move one of them"),
        (dict(affinity=torch.full((12, 6, 7), float("nan"))), "outside .* or not finite"),
        (dict(affinity=torch.full((12, 6, 7), 1.5)), "outside"),
        (dict(affinity=torch.full((12, 6, 7), -0.5)), "outside"),
        (dict(affinity=torch.rand(11, 6, 7)), "P = 12 offsets"),
        (dict(affinity=torch.ones(12, 6, 7, dtype=torch.uint8)), "give floats"),
        (dict(offsets=[(0, -1), *half_disc(3)[1:]]), "see half_disc"),
        (dict(offsets=[(0, 1), (0, 1), *half_disc(3)[2:]]), "distinct"),
        (dict(beta=0), "beta is 0"),
        (dict(beta=float("nan")), "beta is nan"),
        (dict(steps=-1), "steps is -1"),
        (dict(steps=-1, eps=0), "steps is -1"),
        (dict(eps=-1e-3), "eps is -0.001"),
        (dict(eps=float("nan")), "eps is nan"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    maps, affinity, offsets = random_case()
    with pytest.raises(ValueError, match=message):
        random_walk(**{**dict(scores=maps, affinity=affinity, offsets=offsets), **change})


def test_frames_refuse_at_the_call():
    with pytest.raises(ValueError, match="every is 0"):
        walk_frames(*random_case(), every=0)


@pytest.mark.parametrize("radius", [0, -1, float("nan")])
def test_half_disc_refuses_a_radius_that_is_not_above_zero(radius):
    with pytest.raises(ValueError, match="above 0"):
        half_disc(radius)
