"""AVC: terms against loops and at their zeros, views undone exactly on both axes, padding, schedule, the head."""
import math

import pytest
import torch

from models import avc
from models.build import build_network, pack, unpack
from src.avc import Pair, View, affinity_terms, avc_loss, cut, draw_view, ramp, shown_pixels, valid_cells
from src.task import Part

GRID = (5, 7)
N = GRID[0] * GRID[1]
FULL = (0, 0, 65, 97)  # window of a whole 65x97 image, whose stride-16 grid is 5x7


def units(batch=2, dims=4, grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(batch, dims, *grid, generator=generator), dim=1)


def everywhere(batch=2, cells=N):
    return torch.ones(batch, cells, dtype=torch.bool)


def halves(batch=2):
    """Labels: left columns background, right columns class 1, one column between ignored."""
    labels = torch.full((batch, *GRID), avc.IGNORE)
    labels[..., :3], labels[..., 4:] = 0, 1
    return labels.flatten(1)


def split_units(labels):
    """Unit features that are one axis for label 0 and another for label 1 (a third for the rest)."""
    axes = torch.eye(3)[torch.where(labels == avc.IGNORE, 2, labels)]  # (B, N, 3)
    return axes.transpose(1, 2).reshape(len(labels), 3, *GRID)


def test_affinity_equals_a_double_loop():
    unit = units()
    matrix, flat = avc.affinity(unit), unit.flatten(2)
    for i in range(0, N, 6):
        for j in range(N):
            expected = max(0.0, float((flat[1, :, i] * flat[1, :, j]).sum()))
            assert abs(matrix[1, i, j] - expected) < 1e-6, f"A[{i}, {j}] is {matrix[1, i, j]}, not {expected}"


def test_affinity_is_float32_even_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert avc.affinity(units().bfloat16()).dtype == torch.float32


def test_affinity_vectors_sum_to_one_and_leave_padding_out():
    valid = everywhere()
    valid[:, ::4] = False
    vectors = avc.affinity_vectors(avc.affinity(units()), valid)
    assert torch.allclose(vectors.sum(dim=2)[valid], torch.ones(int(valid.sum())), atol=1e-6)
    assert not vectors[~valid].any() and not vectors.transpose(1, 2)[~valid].any(), "padding has affinity"


def test_likeness_equals_a_double_loop_and_is_one_for_equal_colours():
    colours = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(0))
    found, flat = avc.likeness(colours, 0.7), colours.flatten(2)
    for i in range(0, N, 6):
        for j in range(N):
            expected = math.exp(-float(((flat[0, :, i] - flat[0, :, j]) ** 2).sum()) / (2 * 0.7 ** 2))
            assert abs(found[0, i, j] - expected) < 1e-6, f"likeness[{i}, {j}] is {found[0, i, j]}, not {expected}"
    assert (avc.likeness(torch.ones(1, 3, *GRID), 0.7) == 1).all()


def test_the_head_weighs_affinities_by_colour_unless_told_not_to():
    described = torch.randn(2, 8, *GRID, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    head = avc.AffinityHead(5, dims=4, colour=0.5)
    unit, matrix = head.affinity(described)
    assert torch.equal(matrix, avc.affinity(unit) * avc.likeness(described[:, 5:], 0.5))
    plain = avc.AffinityHead(8, dims=4)
    unit, matrix = plain.affinity(described)
    assert torch.equal(matrix, avc.affinity(unit))


def test_a_description_is_features_and_mean_colours_on_one_grid():
    images = torch.zeros(1, 3, 65, 33)
    images[:, :, :, 17:] = 1.0
    features = torch.randn(1, 4, 5, 3)
    head = avc.AffinityHead(4, dims=2, colour=0.5)
    described = head.describe(features, images)
    assert described.shape == (1, 7, 9, 5)
    assert torch.equal(described[:, :4, ::2, ::2], features), "corners do not lie on corners"
    for column, mean in enumerate((0.0, 0.0, 4 / 9, 1.0, 1.0)):  # windows of 9 pixels round 0, 8, 16, 24 and 32
        assert torch.allclose(described[0, 4:, :, column], torch.tensor(mean), atol=1e-6), (column, mean)


def test_mean_colours_turn_with_the_image_and_equal_a_loop():
    images = torch.rand(1, 3, 57, 41, generator=torch.Generator().manual_seed(0))
    found = avc.mean_colours(images, (8, 6))
    assert torch.allclose(avc.mean_colours(images.flip(-1), (8, 6)).flip(-1), found, atol=1e-6)
    for i in range(8):
        for j in range(6):
            window = images[0, :, max(0, 8 * i - 4):8 * i + 5, max(0, 8 * j - 4):8 * j + 5]
            assert torch.allclose(found[0, :, i, j], window.mean(dim=(1, 2)), atol=1e-5), (i, j)


def test_refining_with_identity_affinity_changes_nothing_and_equals_the_matrix_power():
    cam = torch.rand(2, 3, N)
    assert torch.equal(avc.refine(cam, torch.eye(N).expand(2, N, N), 3), cam)
    vectors = avc.affinity_vectors(avc.affinity(units()), everywhere())
    expected = torch.linalg.matrix_power(vectors, 3) @ cam.transpose(1, 2)
    assert torch.allclose(avc.refine(cam, vectors, 3).transpose(1, 2), expected, atol=1e-5)


def test_refined_shares_equal_a_loop():
    cam = torch.randn(1, 2, N, generator=torch.Generator().manual_seed(0))
    valid = everywhere(1)
    valid[0, 30:] = False
    vectors = avc.affinity_vectors(avc.affinity(units(1)), valid)
    found = avc.refined_shares(cam, vectors, valid, 2)
    power = torch.linalg.matrix_power(vectors[0], 2)
    for k in range(2):
        own = cam[0, k].clamp(min=0) * valid[0]
        own = own / own.max()
        other = (1 - own) ** 4 * valid[0]
        sent, held = power @ (own / own.sum()), power @ (other / other.sum())
        expected = torch.where(valid[0], sent / (sent + held), 0)
        assert torch.allclose(found[0, k], expected, atol=1e-5), f"class {k} off by {(found[0, k] - expected).abs().max()}"


def test_refined_shares_split_two_groups_of_cells_and_do_not_depend_on_the_height_of_a_map():
    labels = halves()
    labels[labels == avc.IGNORE] = 0
    vectors = avc.affinity_vectors(avc.affinity(split_units(labels)), everywhere())
    cam = torch.zeros(2, 1, *GRID)
    cam[:, :, 2, 5] = 1.0  # one cell of the object
    cam = cam.flatten(2)
    shares = avc.refined_shares(cam, vectors, everywhere(), 4)
    assert (shares[:, 0][labels == 1] > 0.5).all() and (shares[:, 0][labels == 0] < 0.5).all(), shares
    assert torch.allclose(avc.refined_shares(40 * cam, vectors, everywhere(), 4), shares, atol=1e-6)
    assert (avc.refined_shares(-cam, vectors, everywhere(), 4) == 0).all(), "an empty map has no share anywhere"


@pytest.mark.parametrize("size", [(65, 97), (17, 33), (113, 49)])
def test_a_flip_is_undone_exactly_on_both_axes(size):
    grid = tuple((side - 1) // 16 + 1 for side in size)
    unit = units(grid=grid)
    back = avc.carrier(grid, grid, size, (0, 0, *size), flip=True)
    assert torch.equal(back @ avc.affinity(unit.flip(-1)) @ back.T, avc.affinity(unit)), f"flip of {grid} not undone"


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_undone_exactly_on_both_axes(flip):
    unit, window = units(), (16, 32, 33, 49)  # rows 1..3, columns 2..5
    part = unit[..., 1:4, 2:6]
    back = avc.carrier((3, 4), GRID, (65, 97), window, flip)
    inside = back.sum(dim=1) > 0.5
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert torch.equal(inside, expected.flatten())
    carried = back @ avc.affinity(part.flip(-1) if flip else part) @ back.T
    reference = avc.affinity(unit) * (inside[:, None] & inside)
    assert torch.allclose(carried, reference, atol=1e-6), f"off by {(carried - reference).abs().max()}"


@pytest.mark.parametrize("source", [(3, 5), (9, 13), (4, 11)])
def test_a_scale_is_undone_exactly_on_both_axes_for_what_is_linear_in_place(source):
    def linear(grid):  # A[i, j] linear in the places of i and of j, which bilinear weights reproduce
        y, x = torch.meshgrid(torch.linspace(0, 1, grid[0]), torch.linspace(0, 1, grid[1]), indexing="ij")
        at = (1 + 2 * y + 3 * x).flatten()
        return at[:, None] * at
    back = avc.carrier(source, GRID, (65, 97), FULL, flip=False)
    assert torch.allclose(back @ linear(source) @ back.T, linear(GRID), atol=1e-4)


def test_carried_rows_sum_to_one_inside_the_window_and_to_nothing_outside():
    sums = avc.carrier((4, 3), (9, 9), (65, 65), (16, 16, 33, 33), True).sum(dim=1).reshape(9, 9)
    assert torch.allclose(sums[2:7, 2:7], torch.ones(5, 5), atol=1e-6) and sums.sum() == pytest.approx(25, abs=1e-4)


def test_equivariance_is_zero_for_equal_views_and_grows_with_the_difference():
    first, second = avc.affinity(units()), avc.affinity(units(seed=1))
    assert avc.equivariance(first, first, everywhere()) < 1e-6
    assert avc.equivariance(first, second, everywhere()) > 0.05


def test_equivariance_equals_a_loop_and_stops_the_target_gradient():
    first, second = (avc.affinity(units(seed=seed)).requires_grad_() for seed in (0, 1))
    valid = everywhere()
    valid[0, :5] = False
    value = avc.equivariance(first, second, valid)
    rows = [1 - torch.cosine_similarity(first[b, i, valid[b]], second[b, i, valid[b]], dim=0)
            for b in range(2) for i in range(N) if valid[b, i]]
    assert value.item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-5)
    value.backward()
    own = first.grad.clone()
    half = (1 - torch.cosine_similarity(first * valid[:, None], second.detach() * valid[:, None], dim=2))[valid]
    (expected,) = torch.autograd.grad(half.mean() / 2, first)
    assert torch.allclose(own, expected, atol=1e-6), "a gradient came through the side that is the target"


def test_agreement_is_zero_when_all_vectors_of_a_label_are_equal():
    labels = halves()
    vectors = avc.affinity_vectors(avc.affinity(split_units(labels)), everywhere())
    assert avc.agreement(vectors, labels) < 1e-6
    assert avc.agreement(avc.affinity_vectors(avc.affinity(units()), everywhere()), labels) > 0.05


def test_agreement_averages_background_and_objects_apart_and_ignores_the_rest():
    labels = halves()
    labels[1] = avc.IGNORE
    vectors = avc.affinity_vectors(avc.affinity(units()), everywhere())
    means = [vectors[0, labels[0] == kind].mean(dim=0) for kind in (0, 1)]
    parts = [1 - torch.cosine_similarity(vectors[0, labels[0] == kind], means[kind][None], dim=1)
             for kind in (0, 1)]
    expected = (parts[0].mean() + parts[1].mean()) / 2
    assert float(avc.agreement(vectors, labels)) == pytest.approx(float(expected), abs=1e-5)


def test_separation_is_zero_for_orthogonal_labels_and_one_when_all_are_alike():
    labels = halves()
    assert avc.separation(split_units(labels), labels) == 0
    assert avc.separation(torch.ones(2, 1, *GRID), labels) == pytest.approx(1)
    assert avc.separation(torch.ones(2, 1, *GRID), labels, margin=0.25) == pytest.approx(0.75)


def test_separation_of_two_classes_in_one_image_equals_a_loop():
    labels = torch.where(halves() == 0, 2, halves())  # classes 1 and 2, no background
    unit = units()
    flat, found = unit.flatten(2), []
    for b in range(2):
        for i in range(N):
            for j in range(N):
                if labels[b, i] > 0 and labels[b, j] > 0 and labels[b, i] != labels[b, j]:
                    found.append(max(0.0, float(flat[b, :, i] @ flat[b, :, j])))
    assert float(avc.separation(unit, labels)) == pytest.approx(sum(found) / len(found), abs=1e-5)


def test_separation_does_not_push_the_objects_of_two_images_apart():
    labels = torch.stack([torch.ones(N), torch.full((N,), 2)]).long()
    assert avc.separation(torch.ones(2, 1, *GRID), labels) == 0


def test_equal_rows_are_minimal_for_equivariance_and_agreement_but_not_with_separation():
    labels, same = halves(), torch.ones(2, 3, *GRID) / math.sqrt(3)

    def terms(unit):
        matrix = avc.affinity(unit)
        vectors = avc.affinity_vectors(matrix, everywhere())
        return (float(avc.equivariance(matrix, matrix, everywhere()) + avc.agreement(vectors, labels)),
                float(avc.separation(unit, labels)))
    (collapsed, apart), (split, none) = terms(same), terms(split_units(labels))
    assert collapsed < 1e-6, f"equal rows should be minimal without separation, but give {collapsed}"
    assert split + none < 1e-6 < collapsed + apart, f"with separation: split {split + none}, equal {collapsed + apart}"


def test_every_term_is_zero_with_a_finite_gradient_where_nothing_is_valid_or_reliable():
    unit = units().requires_grad_()
    matrix, nowhere = avc.affinity(unit), torch.zeros(2, N, dtype=torch.bool)
    labels = torch.full((2, N), avc.IGNORE)
    vectors, cam = avc.affinity_vectors(matrix, nowhere), torch.rand(2, 3, N)
    refined = avc.unit_range(avc.refine(cam, vectors, 2), nowhere)
    terms = [avc.equivariance(matrix, matrix, nowhere), avc.agreement(vectors, labels), avc.separation(unit, labels),
             avc.cam_consistency(refined, refined, torch.ones(2, 3, dtype=torch.bool), nowhere)]
    assert [term.item() for term in terms] == [0, 0, 0, 0]
    (sum(terms)).backward()
    assert torch.isfinite(unit.grad).all()


def test_padding_never_counts():
    valid = everywhere()
    valid[:, N // 2:] = False
    labels = torch.where(valid, halves(), avc.IGNORE)
    results = []
    for seed in (3, 4):  # other features in the padding
        unit = units().flatten(2)
        unit[..., N // 2:] = units(seed=seed).flatten(2)[..., N // 2:]
        unit = unit.reshape(2, 4, *GRID)
        matrix = avc.affinity(unit)
        vectors = avc.affinity_vectors(matrix, valid)
        cam = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(0))
        cam[..., N // 2:] *= seed  # other maps in the padding
        maps = avc.unit_range(avc.refine(cam, vectors, 2), valid) + avc.refined_shares(cam, vectors, valid, 2)
        other = avc.affinity(units(seed=9))
        results.append([avc.equivariance(matrix, other, valid), avc.agreement(vectors, labels),
                        avc.separation(unit, labels), maps.sum()])
    assert torch.allclose(torch.stack(results[0]), torch.stack(results[1]), atol=1e-6), results


def test_reliable_labels_keep_what_is_sure_of_the_images_own_classes():
    cam = torch.tensor([[[0.9, 0.05, 0.3, 0.9], [0.95, 0.0, 0.0, 0.99]]])
    valid = torch.tensor([[True, True, True, False]])
    labels = avc.reliable_labels(cam, torch.tensor([[True, False]]), valid, 0.1, 0.4)
    assert labels.tolist() == [[1, 0, avc.IGNORE, avc.IGNORE]]
    none = avc.reliable_labels(cam, torch.tensor([[False, False]]), torch.ones(1, 4, dtype=torch.bool), 0.1, 0.4)
    assert (none == avc.IGNORE).all(), "an image without labels has no reliable cell"


def test_anchors_put_the_means_of_seeds_and_background_at_one_and_nought():
    refined = torch.tensor([[[0.8, 0.6, 0.4, 0.5], [0.3, 0.3, 0.3, 0.3]]])
    seeds = torch.tensor([[1, avc.IGNORE, 0, 0]])
    scaled = avc.anchored(refined, seeds, torch.tensor([[True, True]]))
    assert torch.allclose(scaled[0, 0], torch.tensor([1.0, 0.15 / 0.35, 0.0, 0.05 / 0.35]), atol=1e-6), scaled
    assert (scaled[0, 1] == 0.5).all(), "a class without seeds must be reliable nowhere"


def test_the_second_view_shows_its_window_and_keeps_padding_at_nought():
    images = torch.rand(2, 3, 65, 65) + 0.5
    images[..., 48:] = 0  # padding on the right
    torch.manual_seed(0)
    view = View((16, 0, 33, 65), (33, 65), True)
    out, shown = cut(images, view)
    assert out.shape == (2, 3, 33, 65) and shown.shape == (2, 1, 33, 65)
    assert torch.equal(shown[0, 0], shown_pixels(images)[0, 0, 16:49].flip(-1))
    assert not out[~shown.expand_as(out)].any(), "padding got a colour"
    cells = valid_cells(shown, (3, 5)).reshape(2, 3, 5)
    assert cells[0, 0].tolist() == [False, False, True, True, True], cells[0, 0]


def test_views_fit_their_image_at_any_size_and_follow_the_seed():
    for size in ((65, 97), (33, 17), (257, 257)):
        for seed in range(20):
            torch.manual_seed(seed)
            view = draw_view(size)
            assert all(start + side <= total for start, side, total in zip(view.window, view.window[2:], size)), view
            assert all((side - 1) % 16 == 0 and 17 <= side <= total for side, total in zip(view.size, size)), view
            torch.manual_seed(seed)
            assert draw_view(size) == view


def test_the_ramp_starts_late_and_ends_at_one():
    assert [ramp(at, 0.2) for at in (0, 0.2, 0.25, 0.3, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


OPTIONS = {"avc_equivariance": 1.0, "avc_agreement": 1.0, "avc_separation": 1.0, "avc_consistency": 1.0,
           "avc_start": 0.0, "batch_size": 2, "seed": 0, "epochs": 1}


def network(**how):
    torch.manual_seed(0)
    return build_network("classifier", "resnet18", classes=3, **{"affinity_dims": 8, "affinity_steps": 2, **how})


@pytest.mark.parametrize("name, colour", [("resnet18", 0.0), ("resnet18", 0.5), ("resnet38", 0.0)])
def test_gradients_are_finite_on_padded_multi_label_images(name, colour):
    torch.manual_seed(0)
    net = build_network("classifier", name, width=0.125, classes=3, affinity_dims=8, affinity_steps=2,
                        affinity_colour=colour).train()
    net.avc.steps += 5
    images = torch.randn(2, 3, 65, 65)
    images[0, :, 40:] = 0
    batch = {"image": images, "labels": torch.tensor([[1., 1, 0], [0, 0, 1]])}
    value, terms = avc_loss(OPTIONS, 20)(net, batch, Part(0, 2, 2, None))
    value.backward()
    assert math.isfinite(value.item()) and terms["equivariance"] > 0, terms
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert net.avc.project.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("colour", [0.0, 0.5])
@pytest.mark.parametrize("term", ["equivariance", "agreement", "separation", "consistency"])
def test_a_weight_of_nought_removes_its_term_and_no_other(term, colour):
    net, images = network(affinity_colour=colour).eval(), torch.randn(2, 3, 65, 65)
    maps = net.training_maps(images)
    pair = Pair((65, 65), View((0, 0, 65, 65), (65, 65), False), shown_pixels(images), shown_pixels(images), maps, maps)
    weights = {name: 1.0 for name in ("equivariance", "agreement", "separation", "consistency")}
    found = affinity_terms(net.avc, pair, torch.ones(2, 3, dtype=torch.bool), {**weights, term: 0.0}, False)
    assert set(found) == set(weights) - {term}
    assert found.get("equivariance", torch.zeros(())) < 1e-5, "equal views differ"


def test_a_record_with_the_head_makes_refined_maps_and_one_without_it_still_loads():
    net = network().eval()
    how = {"kind": "classifier", "backbone": "resnet18", "classes": 3}
    again = unpack(pack(net, **how, affinity_dims=8, affinity_steps=2))
    images = torch.randn(1, 3, 65, 97)
    assert torch.equal(net.localise(images)[1], again.localise(images)[1])
    plain = network(affinity_dims=0).eval()
    assert unpack(pack(plain, **how)).avc is None
    assert not any("avc" in name for name in plain.state_dict())


def test_one_image_equals_its_batch():
    net, images = network().eval(), torch.randn(3, 3, 65, 97)
    batch = net.localise(images)[1]
    assert torch.allclose(batch[1:2], net.localise(images[1:2])[1], atol=1e-4)


def test_grids_have_a_cell_for_8_pixels_and_are_at_most_28_cells_a_side():
    assert avc.grid_of((65, 97)) == (9, 13) and avc.grid_of((8, 9)) == (1, 2)
    assert avc.grid_of((1000, 60)) == (28, 8) and avc.grid_of((1000, 60), avc.TRAINING_GRID) == (20, 8)
    assert avc.pooled(torch.rand(1, 2, 57, 20)).shape == (1, 2, 28, 20)
