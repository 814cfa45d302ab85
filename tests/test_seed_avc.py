"""AVC as a seed: terms against loops and at their zeros, views undone exactly, padding, schedule, no GPU waited for."""
import contextlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.weights import build_network, load_model, pack, unpack
from src.seeds import attach
from src.seeds.avc import head as heads
from src.seeds.avc import losses, views
from src.seeds.avc.head import AffinityHead
from src.seeds.avc.seed import TERMS, AvcConfig, Look, Pair, affinity_terms, sharpened
from src.seeds.avc.views import View
from src.seeds.cam import unit_maximum
from src.seeds.common import SHARPNESS
from src.training.loop import MicroBatch
from utils.checkpoint import OLD_FORMAT, save_tensors
from utils.maps import foreground_probability, with_background
from utils.options import FLAGS

GRID = (5, 7)
N = GRID[0] * GRID[1]
SIZE = (65, 97)  # of an image whose stride-16 grid is 5x7


def gap(found, expected):
    """Largest difference, relative to the largest magnitude of what is expected."""
    found, expected = (torch.as_tensor(values) for values in (found, expected))
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def units(batch=2, dims=4, grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, dims, *grid, generator=generator), dim=1)


def everywhere(batch=2, cells=N):
    return torch.ones(batch, cells, dtype=torch.bool)


def vectors_of(unit, valid=None):
    return heads.affinity_vectors(heads.affinity(unit), everywhere(len(unit)) if valid is None else valid)


def halves(batch=2):
    """Labels: left columns background, right columns class 1, one column between ignored."""
    labels = torch.full((batch, *GRID), losses.IGNORE)
    labels[..., :3], labels[..., 4:] = 0, 1
    return labels.flatten(1)


def split_units(labels):
    """Unit features that are one axis for label 0 and another for label 1 (a third for the rest)."""
    axes = torch.eye(3)[torch.where(labels == losses.IGNORE, 2, labels)]  # (B, N, 3)
    return axes.transpose(1, 2).reshape(len(labels), 3, *GRID)


# --- affinities ----------------------------------------------------------------------------------------------------

def test_affinity_equals_a_double_loop():
    unit = units()
    matrix, flat = heads.affinity(unit), unit.flatten(2)
    for i in range(0, N, 6):
        for j in range(N):
            expected = max(0.0, float((flat[1, :, i] * flat[1, :, j]).sum()))
            assert abs(matrix[1, i, j] - expected) < 1e-6, f"A[{i}, {j}] is {matrix[1, i, j]}, not {expected}"


def test_affinity_is_float32_even_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert heads.affinity(units().bfloat16()).dtype == torch.float32


def test_affinity_vectors_sum_to_one_and_leave_padding_out():
    valid = everywhere()
    valid[:, ::4] = False
    vectors = vectors_of(units(), valid)
    worst = abs(vectors.sum(dim=2)[valid] - 1).max()
    assert worst < 1e-6, f"a row sums to 1 but for {worst}"
    assert not vectors[~valid].any() and not vectors.transpose(1, 2)[~valid].any(), "padding has affinity"


def test_similarity_equals_a_double_loop_and_is_one_for_equal_colours():
    colours = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(0))
    found, flat = heads.similarity(colours, 0.7), colours.flatten(2)
    for i in range(0, N, 6):
        for j in range(N):
            expected = math.exp(-float(((flat[0, :, i] - flat[0, :, j]) ** 2).sum()) / (2 * 0.7 ** 2))
            assert abs(found[0, i, j] - expected) < 1e-6, f"similarity[{i}, {j}] is {found[0, i, j]}, not {expected}"
    assert (heads.similarity(torch.ones(1, 3, *GRID), 0.7) == 1).all()


def test_the_head_weights_affinities_by_colour_unless_told_not_to():
    described = torch.randn(2, 8, *GRID, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    head = AffinityHead(5, dims=4, colour=0.5)
    unit, matrix = head.affinity(described)
    assert torch.equal(matrix, heads.affinity(unit) * heads.similarity(described[:, 5:], 0.5))
    plain = AffinityHead(8, dims=4)
    unit, matrix = plain.affinity(described)
    assert torch.equal(matrix, heads.affinity(unit))


def test_unit_features_are_standardised_projected_and_of_length_one():
    torch.manual_seed(0)
    head, described = AffinityHead(5, dims=4), torch.randn(2, 5, *GRID)
    head.mean.copy_(torch.randn(5))
    head.variance.copy_(torch.rand(5) + 0.5)
    found = head(described)
    for b, y, x in ((0, 0, 0), (1, 4, 6), (1, 2, 3)):
        row = head.project.weight[:, :, 0, 0] @ ((described[b, :, y, x] - head.mean) / (head.variance + 1e-5).sqrt())
        assert gap(found[b, :, y, x], row / row.norm()) < 1e-5, f"{found[b, :, y, x]}, not {row / row.norm()}"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(described), found), "autocast changes the unit features"


def test_a_description_is_features_and_mean_colours_on_one_grid():
    images = torch.zeros(1, 3, 65, 33)
    images[:, :, :, 17:] = 1.0
    features = torch.randn(1, 4, 5, 3)
    described = AffinityHead(4, dims=2, colour=0.5).describe(features, images)
    assert described.shape == (1, 7, 9, 5)
    assert torch.equal(described[:, :4, ::2, ::2], features), "corners do not lie on corners"
    for column, mean in enumerate((0.0, 0.0, 4 / 9, 1.0, 1.0)):  # windows of 9 pixels round 0, 8, 16, 24 and 32
        worst = abs(described[0, 4:, :, column] - mean).max()
        assert worst < 1e-6, f"column {column} is off {mean} by {worst}"


def test_grids_have_a_cell_for_8_pixels_with_colours_and_at_most_28_cells_a_side():
    coloured, plain = AffinityHead(2, dims=2, colour=0.5), AffinityHead(2, dims=2)
    for size, most, grid in (((65, 97), 28, (9, 13)), ((8, 9), 28, (1, 2)), ((1000, 60), 28, (28, 8)),
                             ((1000, 60), heads.TRAINING_GRID, (20, 8))):
        found = coloured.describe(torch.rand(1, 2, 5, 7), torch.rand(1, 3, *size), most).shape
        assert found == (1, 5, *grid), f"{tuple(found)} of {size}, not {grid}"
    features = torch.rand(1, 2, 57, 20).bfloat16()
    found = plain.describe(features, torch.rand(1, 3, 900, 320))
    assert found.shape == (1, 2, 28, 20) and found.dtype == torch.float32, (found.shape, found.dtype)
    small = torch.rand(1, 2, 9, 20)
    assert plain.describe(small, torch.rand(1, 3, 9, 20), 5) is small, "features of the right size were resampled"


def test_mean_colours_turn_with_the_image_and_equal_a_loop():
    images = torch.rand(1, 3, 57, 41, generator=torch.Generator().manual_seed(0))
    found = heads.mean_colours(images, (8, 6))
    assert gap(heads.mean_colours(images.flip(-1), (8, 6)).flip(-1), found) < 1e-6
    for i in range(8):
        for j in range(6):
            window = images[0, :, max(0, 8 * i - 4):8 * i + 5, max(0, 8 * j - 4):8 * j + 5]
            assert gap(found[0, :, i, j], window.mean(dim=(1, 2))) < 1e-5, (i, j)


def test_statistics_are_those_of_valid_cells_and_run_along_with_momentum():
    head, generator = AffinityHead(3, dims=2), torch.Generator().manual_seed(0)
    mean, variance = torch.zeros(3), torch.ones(3)
    for step in range(3):
        described = torch.randn(2, 3, *GRID, generator=generator) * 3 + 5
        valid = torch.rand(2, N, generator=generator) < 0.6
        cells = torch.stack([described[b].flatten(1)[:, i] for b in range(2) for i in range(N) if valid[b, i]])
        speed = 0.1 if step else 1.0
        mean, variance = mean + speed * (cells.mean(0) - mean), variance + speed * (cells.var(0) - variance)
        head.observe(described, valid)
        assert gap(head.mean, mean) < 1e-5 and gap(head.variance, variance) < 1e-5, f"step {step}: {head.mean}, {mean}"
    assert head.steps == 3, head.steps


@pytest.mark.parametrize("cells", [0, 1])
def test_too_few_cells_for_a_variance_leave_the_statistics_as_they_are(cells):
    head, valid = AffinityHead(3, dims=2), torch.zeros(1, N, dtype=torch.bool)
    valid[0, :cells] = True
    head.observe(torch.full((1, 3, *GRID), 7.0), valid)
    assert head.mean.tolist() == [0, 0, 0] and head.variance.tolist() == [1, 1, 1], (head.mean, head.variance)
    assert head.steps == 1, "the step was not counted"


# --- refined maps --------------------------------------------------------------------------------------------------

def test_refining_with_identity_affinity_changes_nothing_and_equals_the_matrix_power():
    cam = torch.rand(2, 3, N)
    assert torch.equal(heads.refine(cam, torch.eye(N).expand(2, N, N), 3), cam)
    vectors = vectors_of(units())
    expected = torch.linalg.matrix_power(vectors, 3) @ cam.transpose(1, 2)
    found = heads.refine(cam, vectors, 3).transpose(1, 2)
    assert gap(found, expected) < 1e-5, f"off by {gap(found, expected)} of the largest value"


def test_refined_ratios_equal_a_loop():
    cam = torch.randn(1, 2, N, generator=torch.Generator().manual_seed(0))
    valid = everywhere(1)
    valid[0, 30:] = False
    vectors = vectors_of(units(1), valid)
    found = heads.refined_ratios(cam, vectors, valid, 2)
    power = torch.linalg.matrix_power(vectors[0], 2)
    for k in range(2):
        own = cam[0, k].clamp(min=0) * valid[0]
        own = own / own.max()
        other = (1 - own) ** 4 * valid[0]
        sent, held = power @ (own / own.sum()), power @ (other / other.sum())
        expected = torch.where(valid[0], sent / (sent + held), 0)
        assert gap(found[0, k], expected) < 1e-5, f"class {k} off by {gap(found[0, k], expected)}"


def test_refined_ratios_split_two_groups_of_cells_and_do_not_depend_on_the_height_of_a_map():
    labels = halves()
    labels[labels == losses.IGNORE] = 0
    vectors = vectors_of(split_units(labels))
    cam = torch.zeros(2, 1, *GRID)
    cam[:, :, 2, 5] = 1.0  # one cell of the object
    cam = cam.flatten(2)
    ratios = heads.refined_ratios(cam, vectors, everywhere(), 4)
    assert (ratios[:, 0][labels == 1] > 0.5).all() and (ratios[:, 0][labels == 0] < 0.5).all(), ratios
    assert gap(heads.refined_ratios(40 * cam, vectors, everywhere(), 4), ratios) < 1e-5
    assert (heads.refined_ratios(-cam, vectors, everywhere(), 4) == 0).all(), "an empty map has a ratio somewhere"


def test_sharpened_ratios_put_the_undecided_ratio_on_the_threshold_whatever_their_maximum():
    ratios = np.array([[[0.0, 0.2, 0.5, 1.0]], [[0.0, 0.2, 0.5, 0.7]], [[0.0, 0.1, 0.2, 0.3]]])
    maps = unit_maximum(sharpened(ratios))
    assert np.allclose(maps[:, 0, 3], 1) and (np.diff(maps, axis=2) > 0).all(), maps
    assert np.allclose(maps[:2, 0, 2], 0.5 ** SHARPNESS), f"0.5 becomes {maps[:2, 0, 2]}"
    scores = with_background(maps[:1], FLAGS["bg_alpha"].default)
    assert abs(foreground_probability(scores, np.array([0]))[0][0, 2] - 0.5) < 0.02, "0.5 is not at the threshold"
    assert maps[2, 0, 2] < 0.5 ** SHARPNESS, "a map that is sure nowhere is object in most of its cells"
    assert not sharpened(np.zeros((1, 2, 2))).any() and sharpened(np.zeros((0, 2, 2))).shape == (0, 2, 2)


# --- two views -----------------------------------------------------------------------------------------------------

def carrier(source, target, size, window, flip=False):
    return views.carrier(source, target, size, View(window, (0, 0), flip))


@pytest.mark.parametrize("size", [(65, 97), (17, 33), (113, 49)])
def test_a_flip_is_undone_exactly_on_both_axes(size):
    grid = tuple((side - 1) // 16 + 1 for side in size)
    unit = units(grid=grid)
    back = carrier(grid, grid, size, (0, 0, *size), flip=True)
    carried = back @ heads.affinity(unit.flip(-1)) @ back.T
    assert torch.equal(carried, heads.affinity(unit)), f"flip of {grid} not undone"


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_undone_exactly_on_both_axes(flip):
    unit, window = units(), (16, 32, 33, 49)  # rows 1..3, columns 2..5
    part = unit[..., 1:4, 2:6]
    back = carrier((3, 4), GRID, SIZE, window, flip)
    inside = back.sum(dim=1) > 0.5
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert torch.equal(inside, expected.flatten())
    carried = back @ heads.affinity(part.flip(-1) if flip else part) @ back.T
    reference = heads.affinity(unit) * (inside[:, None] & inside)
    assert gap(carried, reference) < 1e-6, f"off by {gap(carried, reference)}"


@pytest.mark.parametrize("source", [(3, 5), (9, 13), (4, 11)])
def test_a_scale_is_undone_exactly_on_both_axes_for_what_is_linear_in_place(source):
    def linear(grid):  # A[i, j] linear in the places of i and of j, which bilinear weights reproduce
        y, x = torch.meshgrid(torch.linspace(0, 1, grid[0]), torch.linspace(0, 1, grid[1]), indexing="ij")
        at = (1 + 2 * y + 3 * x).flatten()
        return at[:, None] * at
    back = carrier(source, GRID, SIZE, (0, 0, *SIZE))
    found = back @ linear(source) @ back.T
    assert gap(found, linear(GRID)) < 1e-5, f"off by {gap(found, linear(GRID))} of the largest value"


def test_carried_rows_sum_to_one_inside_the_window_and_to_nothing_outside():
    sums = carrier((4, 3), (9, 9), (65, 65), (16, 16, 33, 33), flip=True).sum(dim=1).reshape(9, 9)
    assert gap(sums[2:7, 2:7], torch.ones(5, 5)) < 1e-6 and sums.sum() == pytest.approx(25, rel=1e-5), sums


def test_the_second_view_shows_its_window_and_keeps_padding_at_zero():
    images = torch.rand(2, 3, 65, 65) + 0.5
    images[..., 48:] = 0  # padding on the right
    torch.manual_seed(0)
    out, valid = views.cut(images, View((16, 0, 33, 65), (33, 65), True))
    assert out.shape == (2, 3, 33, 65) and valid.shape == (2, 1, 33, 65)
    assert torch.equal(valid[0, 0], views.valid_pixels(images)[0, 0, 16:49].flip(-1))
    assert not out[~valid.expand_as(out)].any(), "padding got a colour"
    cells = views.valid_cells(valid, (3, 5)).reshape(2, 3, 5)
    assert cells[0, 0].tolist() == [False, False, True, True, True], cells[0, 0]


def test_colours_of_the_second_view_change_in_contrast_and_brightness_alone():
    images = torch.randn(2, 3, 33, 33)
    torch.manual_seed(0)
    out, _ = views.cut(images, View((0, 0, 33, 33), (33, 33), False))
    for b in range(2):
        for channel in range(3):
            x, y = images[b, channel].flatten(), out[b, channel].flatten()
            slope = (y[1:] - y[0]) @ (x[1:] - x[0]) / (x[1:] - x[0]).square().sum()
            shift = y.mean() - slope * x.mean()
            assert gap(slope * x + shift, y) < 1e-5, "the change is not linear"
            assert 0.8 <= slope <= 1.2 and abs(shift) <= 0.2 + 1e-5, (slope, shift)
    assert gap(out, images) > 0.01, "nothing changed"


def test_views_fit_their_image_at_any_size_and_follow_the_seed():
    for size in ((65, 97), (33, 17), (257, 257)):
        for seed in range(20):
            torch.manual_seed(seed)
            view = views.draw_view(size)
            assert all(start + side <= total for start, side, total in zip(view.window, view.window[2:], size)), view
            assert all((side - 1) % 16 == 0 and 17 <= side <= total for side, total in zip(view.size, size)), view
            torch.manual_seed(seed)
            assert views.draw_view(size) == view


# --- terms ---------------------------------------------------------------------------------------------------------

def test_equivariance_is_zero_for_equal_views_and_grows_with_the_difference():
    first, second = heads.affinity(units()), heads.affinity(units(seed=1))
    assert losses.equivariance(first, first, everywhere()) < 1e-6
    assert losses.equivariance(first, second, everywhere()) > 0.05


def test_equivariance_equals_a_loop_and_stops_the_target_gradient():
    first, second = (heads.affinity(units(seed=seed)).requires_grad_() for seed in (0, 1))
    valid = everywhere()
    valid[0, :5] = False
    value = losses.equivariance(first, second, valid)
    rows = [1 - torch.cosine_similarity(first[b, i, valid[b]], second[b, i, valid[b]], dim=0)
            for b in range(2) for i in range(N) if valid[b, i]]
    assert value.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)
    value.backward()
    half = (1 - torch.cosine_similarity(first * valid[:, None], second.detach() * valid[:, None], dim=2))[valid]
    (expected,) = torch.autograd.grad(half.mean() / 2, first)
    assert gap(first.grad, expected) < 1e-5, "a gradient came through the side that is the target"


def test_agreement_is_zero_when_all_vectors_of_a_label_are_equal():
    labels = halves()
    assert losses.agreement(vectors_of(split_units(labels)), labels, 3) < 1e-6
    assert losses.agreement(vectors_of(units()), labels, 3) > 0.05


@pytest.mark.parametrize("classes", [1, 4])
def test_agreement_averages_background_and_objects_apart_and_ignores_the_rest(classes):
    labels = halves()
    labels[1] = losses.IGNORE
    vectors = vectors_of(units())
    means = [vectors[0, labels[0] == kind].mean(dim=0) for kind in (0, 1)]
    parts = [1 - torch.cosine_similarity(vectors[0, labels[0] == kind], means[kind][None], dim=1)
             for kind in (0, 1)]
    expected = (parts[0].mean() + parts[1].mean()).item() / 2
    assert losses.agreement(vectors, labels, classes).item() == pytest.approx(expected, rel=1e-5)


def test_agreement_compares_a_cell_with_the_mean_of_its_own_class_in_its_own_image():
    generator = torch.Generator().manual_seed(4)
    labels, vectors = torch.randint(-1, 4, (3, N), generator=generator), vectors_of(units(3))
    ground, objects = [], []
    for b in range(3):
        for i in range(N):
            if labels[b, i] >= 0:
                mean = torch.stack([vectors[b, j] for j in range(N) if labels[b, j] == labels[b, i]]).mean(dim=0)
                distance = 1 - torch.cosine_similarity(vectors[b, i], mean, dim=0).item()
                (objects if labels[b, i] else ground).append(distance)
    expected = (sum(ground) / len(ground) + sum(objects) / len(objects)) / 2
    found = losses.agreement(vectors, labels, 3).item()
    assert found == pytest.approx(expected, rel=1e-4), f"{found}, not {expected}"


def test_separation_is_zero_for_orthogonal_labels_and_one_when_all_are_alike():
    labels = halves()
    assert losses.separation(split_units(labels), labels) == 0
    assert losses.separation(torch.ones(2, 1, *GRID), labels).item() == pytest.approx(1, rel=1e-6)
    assert losses.separation(torch.ones(2, 1, *GRID), labels, margin=0.25).item() == pytest.approx(0.75, rel=1e-6)


def looped_separation(unit, labels, margin, cap):
    """Object against background cells of the whole batch, at most `cap` evenly taken of each; classes in each image."""
    flat, places = unit.flatten(2), [(b, i) for b in range(len(unit)) for i in range(labels.shape[1])]

    def product(one, other):
        return max(0.0, float(flat[one[0], :, one[1]] @ flat[other[0], :, other[1]]) - margin)

    def mean(values):
        return sum(values) / max(1, len(values))
    objects, ground = ([place for place in places if (labels[place] > 0 if thing else labels[place] == 0)]
                       for thing in (True, False))
    objects, ground = (cells[::max(1, math.ceil(len(cells) / cap))] for cells in (objects, ground))
    differ = [product((b, i), (b, j)) for b, i in places for j in range(labels.shape[1])
              if labels[b, i] > 0 and labels[b, j] > 0 and labels[b, i] != labels[b, j]]
    return mean([product(one, other) for one in objects for other in ground]) + mean(differ)


@pytest.mark.parametrize("cap", [4096, 17, 5, 1])
@pytest.mark.parametrize("kinds, margin", [((-1, 0, 1, 2, 3), 0.0), ((0, 1), 0.1), ((-1, 1, 2), 0.0), ((-1, 0), 0.0),
                                           ((-1, 1), 0.0)])
def test_separation_equals_a_double_loop(monkeypatch, kinds, margin, cap):
    monkeypatch.setattr(losses, "PAIR_CAP", cap)
    generator = torch.Generator().manual_seed(len(kinds))
    unit, labels = units(3), torch.tensor(kinds)[torch.randint(0, len(kinds), (3, N), generator=generator)]
    found, expected = losses.separation(unit, labels, margin).item(), looped_separation(unit, labels, margin, cap)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), f"{found}, not {expected}"
    if len(kinds) > 2:
        assert expected > 0.01, "the example has no pairs"


def test_the_gradient_of_separation_is_that_of_the_chosen_pairs(monkeypatch):
    monkeypatch.setattr(losses, "PAIR_CAP", 9)
    labels, gradients = torch.randint(-1, 2, (2, N), generator=torch.Generator().manual_seed(3)), []
    for compute in (lambda unit: losses.separation(unit, labels), lambda unit: torch.relu(
            _cells(unit, labels > 0) @ _cells(unit, labels == 0).T).mean()):
        unit = units().requires_grad_()
        compute(unit).backward()
        gradients.append(unit.grad)
    assert gap(*gradients) < 1e-5, f"gradients differ by {gap(*gradients)} of the largest"


def _cells(unit, mask):
    cells = unit.flatten(2).transpose(1, 2)[mask]
    return cells[::max(1, math.ceil(len(cells) / 9))]


def test_separation_does_not_push_the_objects_of_two_images_apart():
    labels = torch.stack([torch.ones(N), torch.full((N,), 2)]).long()
    assert losses.separation(torch.ones(2, 1, *GRID), labels) == 0


def test_equal_rows_are_minimal_for_equivariance_and_agreement_but_not_with_separation():
    labels, same = halves(), torch.ones(2, 3, *GRID) / math.sqrt(3)

    def terms(unit):
        matrix = heads.affinity(unit)
        return (float(losses.equivariance(matrix, matrix, everywhere())
                      + losses.agreement(vectors_of(unit), labels, 1)), float(losses.separation(unit, labels)))
    (collapsed, apart), (split, none) = terms(same), terms(split_units(labels))
    assert collapsed < 1e-6, f"equal rows should be minimal without separation, but give {collapsed}"
    assert split + none < 1e-6 < collapsed + apart, f"with separation: split {split + none}, equal {collapsed + apart}"


def test_consistency_equals_a_loop_over_valid_cells_of_the_images_own_classes():
    first, second = torch.rand(2, 3, N).requires_grad_(), torch.rand(2, 3, N).requires_grad_()
    present, valid = torch.tensor([[True, False, True], [False, False, True]]), everywhere()
    valid[1, 9:] = False
    found = losses.cam_consistency(first, second, present, valid)
    gaps = [abs(first[b, k, i] - second[b, k, i]).item() for b in range(2) for k in range(3) for i in range(N)
            if present[b, k] and valid[b, i]]
    assert found.item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    found.backward()
    assert gap(first.grad, -second.grad) < 1e-6 and first.grad.abs().max().item() == pytest.approx(0.5 / len(gaps))


def test_every_term_is_zero_with_a_finite_gradient_where_nothing_is_valid_or_confident():
    unit = units().requires_grad_()
    matrix, nowhere = heads.affinity(unit), torch.zeros(2, N, dtype=torch.bool)
    labels = torch.full((2, N), losses.IGNORE)
    vectors, cam = heads.affinity_vectors(matrix, nowhere), torch.rand(2, 3, N)
    refined = losses.unit_range(heads.refine(cam, vectors, 2), nowhere)
    terms = [losses.equivariance(matrix, matrix, nowhere), losses.agreement(vectors, labels, 3),
             losses.separation(unit, labels),
             losses.cam_consistency(refined, refined, torch.ones(2, 3, dtype=torch.bool), nowhere)]
    assert [term.item() for term in terms] == [0, 0, 0, 0]
    (sum(terms)).backward()
    assert torch.isfinite(unit.grad).all()


def test_padding_never_counts():
    valid = everywhere()
    valid[:, N // 2:] = False
    labels = torch.where(valid, halves(), losses.IGNORE)
    results = []
    for seed in (3, 4):  # other features in the padding
        unit = units().flatten(2)
        unit[..., N // 2:] = units(seed=seed).flatten(2)[..., N // 2:]
        unit = unit.reshape(2, 4, *GRID)
        matrix = heads.affinity(unit)
        vectors = heads.affinity_vectors(matrix, valid)
        cam = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(0))
        cam[..., N // 2:] *= seed  # other maps in the padding
        maps = losses.unit_range(heads.refine(cam, vectors, 2), valid) + heads.refined_ratios(cam, vectors, valid, 2)
        results.append([losses.equivariance(matrix, heads.affinity(units(seed=9)), valid).item(),
                        losses.agreement(vectors, labels, 3).item(), losses.separation(unit, labels).item(),
                        maps.sum().item()])
    assert results[0] == pytest.approx(results[1], rel=1e-5), results


def test_a_map_is_moved_and_scaled_to_its_range_over_valid_cells():
    cam = torch.tensor([[[2.0, 4.0, 3.0, 9.0], [-1.0, -1.0, 0.0, -7.0]]])
    found = losses.unit_range(cam, torch.tensor([[True, True, True, False]]))
    assert found.tolist() == [[[0, 1, 0.5, 0], [0, 0, 1, 0]]], found.tolist()


def test_confident_labels_keep_what_is_sure_of_the_images_own_classes():
    cam = torch.tensor([[[0.9, 0.05, 0.3, 0.9], [0.95, 0.0, 0.0, 0.99]]])
    valid = torch.tensor([[True, True, True, False]])
    labels = losses.confident_labels(cam, torch.tensor([[True, False]]), valid, 0.1, 0.4)
    assert labels.tolist() == [[1, 0, losses.IGNORE, losses.IGNORE]]
    none = losses.confident_labels(cam, torch.tensor([[False, False]]), torch.ones(1, 4, dtype=torch.bool), 0.1, 0.4)
    assert (none == losses.IGNORE).all(), "an image without labels has a confident cell"
    both = losses.confident_labels(cam, torch.tensor([[True, True]]), valid, 0.1, 0.4)
    assert both.tolist() == [[2, 0, losses.IGNORE, losses.IGNORE]], "the highest map does not win"


def test_anchors_put_the_means_of_seeds_and_background_at_one_and_zero():
    refined = torch.tensor([[[0.8, 0.6, 0.4, 0.5], [0.3, 0.3, 0.3, 0.3]]])
    seeds = torch.tensor([[1, losses.IGNORE, 0, 0]])
    scaled = losses.anchored(refined, seeds, torch.tensor([[True, True]]))
    assert gap(scaled[0, 0], [1.0, 0.15 / 0.35, 0.0, 0.05 / 0.35]) < 1e-6, scaled
    assert (scaled[0, 1] == 0.5).all(), "a class without seeds must be confident nowhere"


# --- the seed ------------------------------------------------------------------------------------------------------

HOW = {"kind": "classifier", "backbone": "resnet18", "classes": 3}
ALL_TERMS = {f"avc_{name}": 1.0 for name in TERMS}
LABELS = {"single": [[0, 1, 0], [1, 0, 0]], "multi": [[1, 1, 0], [0, 0, 1]], "none": [[0, 0, 0], [0, 0, 0]]}


def network(**how):
    torch.manual_seed(0)
    net = build_network(**{**HOW, **{name: how.pop(name) for name in ("backbone", "width") if name in how}})
    attach(net, {"name": "avc", "dims": 8, "power": 2, **how})
    return net


def batch_of(labels="multi", padded=True):
    images = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    if padded:
        images[0, :, 40:] = 0
    return {"image": images, "labels": torch.tensor(LABELS[labels], dtype=torch.float32)}


def micro_at(progress, weight=1.0):
    return MicroBatch(weight, torch.zeros(0), progress)


@pytest.mark.parametrize("backbone, colour, labels", [("resnet18", 0.0, "multi"), ("resnet18", 0.5, "single"),
                                                      ("resnet18", 0.0, "none"), ("resnet38", 0.0, "multi")])
def test_gradients_are_finite_on_padded_images(backbone, colour, labels):
    net = network(backbone=backbone, width=0.125 if backbone == "resnet38" else 1, colour=colour).train()
    torch.manual_seed(2)
    value, terms = net.seed.loss(net, batch_of(labels), micro_at(0.7), AvcConfig(**ALL_TERMS, avc_colour=colour))
    value.backward()
    assert math.isfinite(value.item()) and terms["equivariance"] > 0, terms
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert net.seed.head.project.weight.grad.abs().sum() > 0 and net.seed.head.steps == 1


def test_the_terms_set_in_after_the_start_and_reach_their_weights_a_tenth_of_the_training_later():
    net, settings = network().eval(), AvcConfig(**ALL_TERMS, avc_start=0.2)
    for progress, factor in ((0.0, 0), (0.2, 0), (0.25, 0.5), (0.3, 1), (0.99, 1)):
        torch.manual_seed(3)
        value, terms = net.seed.loss(net, batch_of(), micro_at(progress), settings)
        rest = value.item() - terms["classification"].item()
        assert list(terms) == ["classification", *TERMS], terms
        total = sum(terms[name].item() for name in TERMS)
        assert (total > 0.1) == (factor > 0), f"terms of {total} at {progress}"
        assert rest == pytest.approx(factor * total, rel=1e-4, abs=1e-6), f"{rest} at {progress}, of {total}"


def test_weights_multiply_their_terms_and_a_micro_batch_counts_by_its_images():
    net, found = network().eval(), {}
    for name, settings, weight in (("plain", ALL_TERMS, 1.0), ("half", ALL_TERMS, 0.5),
                                   ("double", {**ALL_TERMS, "avc_agreement": 2.0}, 1.0)):
        torch.manual_seed(3)
        value, terms = net.seed.loss(net, batch_of(), micro_at(0.9, weight), AvcConfig(**settings))
        found[name] = value.item(), terms
        net.seed.load_state_dict(network().seed.state_dict())  # its statistics moved
    assert found["half"][0] == pytest.approx(found["plain"][0] / 2, rel=1e-5), found
    for name, term in found["half"][1].items():
        assert term.item() == pytest.approx(found["plain"][1][name].item() / 2, rel=1e-5), name
    more = found["double"][0] - found["plain"][0]
    assert more == pytest.approx(found["plain"][1]["agreement"].item(), rel=1e-3), f"{more} more, not one agreement"


@pytest.mark.parametrize("colour", [0.0, 0.5])
@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_removes_its_term_and_no_other(term, colour):
    net, images = network(colour=colour).eval(), torch.randn(2, 3, 65, 65)
    features = net.backbone(images)
    look = Look(net.classify(features), net.cam(features).detach(),
                net.seed.head.describe(features[net.backbone.stages[1]], images))
    pixels = views.valid_pixels(images)
    pair = Pair((65, 65), View((0, 0, 65, 65), (65, 65), False), pixels, pixels, look, look)
    weights = dict.fromkeys(TERMS, 1.0)
    found = affinity_terms(net.seed.head, pair, torch.ones(2, 3, dtype=torch.bool), {**weights, term: 0.0}, False)
    assert set(found) == set(weights) - {term}
    assert found.get("equivariance", torch.zeros(())) < 1e-5, "equal views differ"


@torch.no_grad()
def maps_of(net, images):
    features = net.backbone(images)
    return net.seed.maps(net, features, net.cam(features), images)[0]


@pytest.mark.parametrize("colour", [0.0, 0.5])
def test_maps_are_the_rectified_cam_refined_along_the_heads_affinities(colour):
    net, images = network(colour=colour).eval(), torch.randn(2, 3, 65, 97)
    found = maps_of(net, images)
    with torch.no_grad():
        features = net.backbone(images)
        matrix, grid = net.seed.affinities(net, images)
        cam = F.interpolate(net.cam(features).relu(), size=grid, mode="bilinear", align_corners=True).flatten(2)
        rows = matrix / matrix.sum(dim=2, keepdim=True)
        expected = heads.refined_ratios(cam, rows, torch.ones(2, len(rows[0]), dtype=torch.bool), 2) if colour else (
            rows @ rows @ cam.transpose(1, 2)).transpose(1, 2)
    assert found.shape == (2, 3, *grid) and grid == ((9, 13) if colour else (5, 7)), (found.shape, grid)
    assert gap(found.flatten(2), expected) < 1e-5, f"off by {gap(found.flatten(2), expected)} of the largest value"


def test_merged_maps_lose_their_floor_and_are_sharpened_and_ratios_are_averaged():
    cams = [torch.rand(2, 3, 5, 7) + 1, torch.rand(2, 3, 9, 13) + 1]
    keys, size = np.array([0, 2]), (17, 25)
    resized = [F.interpolate(cam[:, keys], size=size, mode="bilinear", align_corners=True) for cam in cams]
    total = sum(cam[0] + cam[1] for cam in resized).numpy()
    low, high = (getattr(total, side)(axis=(1, 2), keepdims=True) for side in ("min", "max"))
    found = network().seed.merge([(cam,) for cam in cams], keys, size)
    assert gap(found, ((total - low) / (high - low)) ** SHARPNESS) < 1e-4, "not between floor and maximum"
    found = network(colour=0.5).seed.merge([(cam / 2,) for cam in cams], keys, size)
    assert gap(found, unit_maximum(sharpened(total / 8))) < 1e-4, "not the sharpened mean over four views"
    for seed in (network().seed, network(colour=0.5).seed):
        none = seed.merge([(cam,) for cam in cams], np.array([], int), size)
        assert none.shape == (0, *size), none.shape


def test_one_image_equals_its_batch():
    net, images = network().eval(), torch.randn(3, 3, 65, 97)
    batch, alone = maps_of(net, images), maps_of(net, images[1:2])
    assert gap(alone, batch[1:2]) < 1e-5, f"off by {gap(alone, batch[1:2])} of the largest value"


def test_a_record_with_the_head_makes_the_same_maps():
    net, images = network(colour=0.5).eval(), torch.randn(1, 3, 65, 97)
    again = unpack(pack(net, **HOW, seed={"name": "avc", "dims": 8, "power": 2, "colour": 0.5}), attach)
    assert torch.equal(maps_of(net, images), maps_of(again, images))


def test_a_checkpoint_of_the_old_format_makes_the_same_maps(tmp_path):
    net, images, state = network(colour=0.5).eval(), torch.randn(1, 3, 65, 97), {}
    for name, tensor in pack(net, **HOW)["state"].items():
        state[name.replace("backbone.", "trunk.").replace("seed.head.", "avc.")] = tensor
    state |= {"common.weight": torch.zeros(256), "common.bias": torch.zeros(()), "common.fitted": torch.tensor(False)}
    record = {**HOW, "affinity_dims": 8, "affinity_steps": 2, "affinity_colour": 0.5, "state": state}
    save_tensors(tmp_path / "old.pth.tar", {"format": OLD_FORMAT, "step": "stage1", "options": {},
                                            "classes": list("abc"), "networks": {"classifier": record}})
    payload = load_model(tmp_path / "old.pth.tar", ("stage1",))
    again = unpack(payload["networks"]["classifier"], attach)
    assert torch.equal(maps_of(net, images), maps_of(again, images))


# --- a step does not wait for a GPU --------------------------------------------------------------------------------

class NoWaiting(TorchDispatchMode):
    """Fails on what makes the CPU wait for its GPU, whose part PyTorch's meta device plays.

    A tensor there has a shape and no values: whatever asks for one (.item(), nonzero, a selection by a mask) is an
    error of PyTorch's own. What runs on the CPU does so as ever. Of copies to the device, only those that are not
    waited for pass; `index_put` by a mask, whose shape needs no value but which asks a GPU for them, does not.
    """

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name, out = function._schema.name.removeprefix("aten::"), function(*arguments, **keywords)
        tensors = [one for argument in arguments for one in (argument if isinstance(argument, (list, tuple))
                                                             else [argument]) if isinstance(one, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.is_meta:
            copied = any(one.device.type == "cpu" and one.ndim for one in tensors)
            masked = name.startswith("index") and any(one.dtype in (torch.bool, torch.uint8) for one in tensors[1:])
            assert not masked and (not copied or keywords.get("non_blocking")), f"{name} waits for the device"
        return out


@pytest.mark.parametrize("waits", [
    lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.nonzero(),
    lambda x: x.masked_select(x > 0), lambda x: x.unique(), lambda x: x.tolist(), lambda x: x.to("cpu"),
    lambda x: x.index_put((x > 0,), x[0, 0]), lambda x: x * torch.ones(4).to("meta"),
    lambda x: x.copy_(torch.ones(3, 4)), lambda x: torch.repeat_interleave(x[0].long())])
def test_operations_that_wait_for_a_gpu_are_told(waits):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match="waits for|[Mm]eta"), NoWaiting():
        waits(torch.empty(3, 4, device="meta"))


def step_on(device, colour, progress, labels="multi"):
    net, settings = network(colour=colour).train().to(device), AvcConfig(**ALL_TERMS, avc_colour=colour)
    batch = {name: value.to(device) for name, value in batch_of(labels).items()}

    def step():
        torch.manual_seed(5)
        value, terms = net.seed.loss(net, batch, micro_at(progress), settings)
        value.backward()
        return value, terms, net.seed.head.project.weight.grad
    return step


@pytest.mark.parametrize("progress", [0.3, 0.6])  # labels from the CAM, and from the refined one
@pytest.mark.parametrize("colour", [0.0, 0.5])
def test_a_step_never_waits_for_the_device(monkeypatch, colour, progress):
    """Whatever the images' values and labels, one or several: none of them is known to a single operation."""
    # There is no autocast on the meta device; it is off in the step, and decides no shape.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for _ in range(5):  # of various second views
        step = step_on("meta", colour, progress)
        with NoWaiting():
            value, terms, gradient = step()
        assert value.is_meta and list(terms) == ["classification", *TERMS] and gradient.shape[0] == 8, terms


@pytest.mark.gpu
@pytest.mark.parametrize("labels", ["single", "multi", "none"])
@pytest.mark.parametrize("colour", [0.0, 0.5])
def test_a_step_on_a_gpu_never_waits_for_it(colour, labels):
    step = step_on("cuda", colour, 0.6, labels)
    step()  # cuDNN and cuBLAS start up
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, _, _ = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(value.item()), value
