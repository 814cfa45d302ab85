"""AffinityNet: its grid, its pair affinities and its loss against a double loop over pixels, and its gradient."""
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.affinitynet import EPS, KINDS, WEIGHTS, AffinityNet, _PairSums, affinity_loss, affinity_stencil, pair_counts
from models.backbone import build_backbone
from utils.random_walk import half_disc, random_walk

GRID = (6, 7)
OFFSETS = half_disc(5)


def random_features(batch=2, depth=5, grid=GRID, seed=0):
    return torch.randn(batch, depth, *grid, generator=torch.Generator().manual_seed(seed))


def random_labels(batch=2, grid=GRID, seed=0):
    """Background, three classes and ignored pixels."""
    values = torch.tensor([0, 1, 2, 3, 255])
    return values[torch.randint(0, 5, (batch, *grid), generator=torch.Generator().manual_seed(seed))]


def pairs(grid, radius=5):
    """Every pair of pixels closer than the radius, once, by a double loop over pixels."""
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return [(a, b) for i, a in enumerate(cells) for b in cells[i + 1:] if math.dist(a, b) < radius]


def naive_affinity(features, a, b):
    return torch.exp(-(features[:, a[0], a[1]] - features[:, b[0], b[1]]).abs().mean())


def naive_loss(features, labels, radius=5):
    """(loss, terms) by the definition, one pair at a time; autograd goes through it."""
    likelihoods = {kind: [] for kind in KINDS}
    for image, marks in zip(features, labels.tolist()):
        for a, b in pairs(image.shape[-2:], radius):
            first, second = marks[a[0]][a[1]], marks[b[0]][b[1]]
            if 255 in (first, second):
                continue
            affinity = naive_affinity(image, a, b)
            if first != second:
                likelihoods["neg"].append(-torch.log(1 + EPS - affinity))
            else:
                likelihoods["fg" if first else "bg"].append(-torch.log(affinity + EPS))
    terms = [sum(values) / len(values) if values else features.sum() * 0 for values in likelihoods.values()]
    return sum(weight * term for weight, term in zip(WEIGHTS, terms)), [term.item() for term in terms]


# --- affinities ----------------------------------------------------------------------------------------------------

def test_the_stencil_equals_a_double_loop_over_pixels():
    features = random_features()[0]
    stencil, counted = affinity_stencil(features, OFFSETS), 0
    for a, b in pairs(GRID):
        plane = OFFSETS.index((b[0] - a[0], b[1] - a[1]))
        found, expected = stencil[plane, a[0], a[1]].item(), naive_affinity(features, a, b).item()
        assert abs(found - expected) < 1e-6, f"{a}-{b}: {found:.7f}, not {expected:.7f}"
        counted += 1
    assert (stencil > 0).sum() == counted, f"{(stencil > 0).sum()} affinities, {counted} pairs"


def test_the_stencil_is_zero_where_the_partner_lies_outside():
    stencil = affinity_stencil(random_features()[0], OFFSETS)
    assert stencil.shape == (34, *GRID) and stencil.dtype == torch.float32, (stencil.shape, stencil.dtype)
    for plane, (dy, dx) in zip(stencil, OFFSETS):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                inside = y + dy < GRID[0] and 0 <= x + dx < GRID[1]
                assert (plane[y, x] > 0) == inside, f"offset {dy, dx} at {y, x}: {plane[y, x]:.3f}"


@pytest.mark.parametrize("grid", [(2, 9), (9, 2), (3, 3), (4, 12), (1, 6)])
def test_grids_narrower_than_the_radius_have_the_pairs_they_hold(grid):
    """A long thin photo: its short side has fewer cells than the radius."""
    features, labels = random_features(1, grid=grid), random_labels(1, grid=grid)
    stencil = affinity_stencil(features[0], OFFSETS)
    assert (stencil > 0).sum() == len(pairs(grid)), f"{(stencil > 0).sum()} affinities of {len(pairs(grid))} pairs"
    walked = random_walk(torch.rand(2, *grid), stencil, OFFSETS, steps=8)
    assert torch.isfinite(walked).all() and walked.shape == (2, *grid)
    found, expected = affinity_loss(features, labels, OFFSETS)[0], naive_loss(features, labels)[0]
    assert abs(found - expected) < 1e-5, f"{found:.6f}, not {expected:.6f}"


def test_half_precision_features_give_a_float32_stencil():
    features = random_features()[0].bfloat16()
    stencil = affinity_stencil(features, OFFSETS)
    assert stencil.dtype == torch.float32
    assert torch.equal(stencil, affinity_stencil(features.float(), OFFSETS))


def test_equal_features_have_affinity_one():
    stencil = affinity_stencil(torch.ones(5, *GRID), OFFSETS)
    assert set(stencil.unique().tolist()) == {0.0, 1.0}, stencil.unique()


# --- loss ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_equals_a_double_loop_over_pixels(seed):
    features, labels = random_features(seed=seed), random_labels(seed=seed)
    loss, terms = affinity_loss(features, labels, OFFSETS)
    expected, expected_terms = naive_loss(features, labels)
    assert abs(loss.item() - expected.item()) < 1e-5, f"{loss.item():.6f}, not {expected.item():.6f}"
    for kind, found, term in zip(KINDS, terms.tolist(), expected_terms):
        assert abs(found - term) < 1e-5, f"{kind}: {found:.6f}, not {term:.6f}"
    assert not terms.requires_grad and min(expected_terms) > 0.1, expected_terms


def test_the_gradient_equals_autograds_through_the_double_loop():
    labels = random_labels()
    found, expected = (random_features().requires_grad_() for _ in range(2))
    affinity_loss(found, labels, OFFSETS)[0].backward()
    naive_loss(expected, labels)[0].backward()
    difference = (found.grad - expected.grad).abs().max() / expected.grad.abs().max()
    assert difference < 1e-5, f"differs by {difference:.1e} of the largest gradient"


def test_the_gradient_equals_finite_differences_in_double_precision():
    features = random_features(1, 3, (3, 4)).double().requires_grad_()
    labels = torch.tensor([[[0, 0, 1, 1], [0, 255, 2, 1], [3, 3, 0, 0]]])
    assert torch.autograd.gradcheck(lambda x: _PairSums.apply(x, labels, half_disc(3)), (features,))


def test_the_gradient_stays_finite_for_equal_and_for_distant_features():
    labels = random_labels()
    for features in (torch.zeros(2, 5, *GRID), 1e4 * random_features()):
        features.requires_grad_()
        loss, _ = affinity_loss(features, labels, OFFSETS)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(features.grad).all(), f"loss {loss.item()}"


def test_labels_may_be_of_any_integer_type():
    features, labels = random_features(), random_labels()
    losses = [affinity_loss(features, labels.to(kind), OFFSETS)[0] for kind in (torch.uint8, torch.int32, torch.int64)]
    assert losses[0] == losses[1] == losses[2], losses


@pytest.mark.parametrize("labels, present", [(0, {"bg"}), (2, {"fg"}), ("halves", {"bg", "fg", "neg"}),
                                             ("two classes", {"fg", "neg"})])
def test_a_kind_without_pairs_adds_nothing(labels, present):
    marks = torch.full((1, *GRID), labels if isinstance(labels, int) else 1)
    if not isinstance(labels, int):
        marks[..., :3] = 0 if labels == "halves" else 2
    loss, terms = affinity_loss(random_features(1), marks, OFFSETS)
    assert {kind for kind, term in zip(KINDS, terms) if term > 0} == present, dict(zip(KINDS, terms.tolist()))
    expected = sum(weight * term for weight, term in zip(WEIGHTS, terms.tolist()))
    assert abs(loss.item() - expected) < 1e-6, f"{loss.item():.6f}, not {expected:.6f}"


def test_ignored_labels_alone_give_zero_and_a_gradient_of_zeros():
    features = random_features().requires_grad_()
    loss, terms = affinity_loss(features, torch.full((2, *GRID), 255), OFFSETS)
    loss.backward()
    assert loss == 0 and not terms.any() and not features.grad.any(), (loss, terms)


def test_labels_on_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"labels are on a \(3, 3\) grid, features on \(6, 7\)"):
        affinity_loss(random_features(), torch.zeros(2, 3, 3, dtype=torch.long), OFFSETS)


class NoWaiting(TorchDispatchMode):
    """Fails on what makes a CPU wait for its GPU: values or sizes that it asks for, numbers that it copies there."""
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "scalar_tensor", "lift_fresh")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.removeprefix("aten::")
        indices = [x for one in arguments if isinstance(one, (list, tuple)) for x in one if isinstance(x, torch.Tensor)]
        by_mask = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        assert name not in self.WAITING and not by_mask, f"{name} waits for the GPU"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("waits", [lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: torch.where(x > 0, x, 0),
                                   lambda x: x.new_tensor([0.5, 1]), lambda x: x.nonzero(),
                                   lambda x: x.masked_select(x > 0), lambda x: x.index_put((x > 0,), x[0, 0, 0, 0])])
def test_operations_that_wait_for_a_gpu_are_told(waits):
    with pytest.raises(AssertionError, match="waits for the GPU"), NoWaiting():
        waits(random_features())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_the_loss_and_its_gradient_never_wait_for_a_gpu(kind):
    features, labels = random_features().requires_grad_(), random_labels().to(kind)
    with NoWaiting():
        affinity_loss(features, labels, OFFSETS)[0].backward()
        affinity_loss(features, labels, OFFSETS, pair_counts(labels, OFFSETS))[0].backward()
    assert features.grad.abs().max() > 0, "no gradient"


def test_descending_the_loss_tells_the_halves_apart():
    features = (0.1 * random_features(1)).requires_grad_()
    labels = torch.zeros(1, *GRID, dtype=torch.long)
    labels[..., 4:] = 1
    optimizer = torch.optim.SGD([features], lr=5.0)
    losses = []
    for _ in range(60):
        loss, _ = affinity_loss(features, labels, OFFSETS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


# --- network -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, output_stride", [("resnet18", 8), ("resnet18", 16), ("resnet50", 16),
                                                     ("resnet38", 8)])
def test_features_lie_on_the_stride_8_grid_whatever_the_backbone(backbone, output_stride):
    for size in ((65, 97), (64, 50)):
        with torch.device("meta"):  # shapes alone
            features = AffinityNet(build_backbone(backbone, output_stride))(torch.empty(1, 3, *size))
        expected = (1, 448, -(-size[0] // 8), -(-size[1] // 8))
        assert features.shape == expected, f"{tuple(features.shape)}, not {expected}"


def test_fresh_affinities_are_spread_so_that_there_is_something_to_learn_from():
    torch.manual_seed(0)
    network = AffinityNet(build_backbone("resnet18", 16)).eval()
    with torch.no_grad():
        stencil = affinity_stencil(network(torch.randn(1, 3, 65, 65))[0], OFFSETS)
    found = stencil[stencil > 0]
    assert 0.01 < found.median() < 0.95, f"the median affinity is {found.median():.3f}"


def test_every_head_takes_part_in_the_features():
    network = AffinityNet(build_backbone("resnet18", 16))
    network(torch.randn(1, 3, 33, 33)).square().mean().backward()
    for index, head in enumerate(network.heads):
        assert isinstance(head, nn.Conv2d) and head.weight.grad.abs().max() > 0, f"head {index} gets no gradient"
