"""The mixture as a seed: EM against densities by scipy, objects found from a CAM on a part, what is read, its maps."""
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from models.weights import build_network, pack, unpack
from src.pipeline import Pipeline
from src.seeds import attach
from src.seeds import mixture as module
from src.seeds.mixture import (
    BACKGROUND,
    CELLS,
    FITS,
    IMAGES,
    PER_CLASS,
    SHARPNESS,
    Mixture,
    MixtureConfig,
    affinities,
    binary_posterior,
    drawn_images,
    inner_cells,
    log_prior,
    posteriors,
    spread,
)
from utils.config import Machine, MapConfig, WalkConfig
from utils.errors import UserError

HOW = {"kind": "classifier", "backbone": "resnet18", "classes": 2}
GRID = (8, 10)


def classifier(depths=(), classes=2):
    torch.manual_seed(0)
    how = {**HOW, "classes": classes, "seed": {**Mixture.record(MixtureConfig()), "depths": list(depths)}}
    network = build_network(**HOW | {"classes": classes}).eval()
    attach(network, how["seed"])
    return network, how


def scene(keys, rng, channels=384, classes=2):
    """(features of layer2 and layer3, CAM, keys, truth) of an image: a class's cells lie along an axis of their own,
    background of three kinds along others, and the CAM fires on a fifth of each object."""
    truth = torch.zeros(GRID, dtype=torch.long)
    for place, key in enumerate(keys):
        truth[2:6, 1 + 5 * place:4 + 5 * place] = key + 1
    kinds = torch.randint(0, 3, GRID, generator=rng)
    x = torch.randn(channels, *GRID, generator=rng)
    for kind in range(3):
        x[kind] += 6.0 * ((truth == 0) & (kinds == kind))
    cam = torch.full((1, classes, *GRID), -1.0)
    for key in keys:
        x[3 + key] += 6.0 * (truth == key + 1)
        x[128 + key] += 6.0 * (truth == key + 1)
        cam[0, key][(truth == key + 1) & (torch.rand(GRID, generator=rng) < 0.3)] = 1.0
    return {"layer2": x[None, :128], "layer3": x[None, 128:]}, cam, np.array(keys, int), truth


def scenes(count=60, classes=2):
    rng = torch.Generator().manual_seed(1)
    kinds = [[0], [1], [0, 1], [], [0], [1]]
    return [scene(kinds[i % len(kinds)], rng, classes=classes) for i in range(count)]


def labels_of(items, classes=2):
    labels = np.zeros((len(items), classes), int)
    for row, (_, _, keys, *_) in zip(labels, items):
        row[keys] = 1
    return labels


def reader(items, asked=None):
    def read(positions):
        if asked is not None:
            asked.extend(positions)
        return (items[i][:3] for i in positions)
    return read


@pytest.fixture(scope="module")
def fitted():
    network, how = classifier()
    items = scenes()
    network.seed.fit(network, reader(items), labels_of(items), seed=0)
    return network, how, items


def map_of(network, item):
    features, cam, keys, _ = item
    view = network.seed.maps(network, features, cam, torch.zeros(1, 3, 8, 8))
    return network.seed.merge([view], keys, GRID)


def test_an_e_step_equals_densities_written_out_cell_by_cell():
    rng = torch.Generator().manual_seed(0)
    network, _ = classifier()
    count, channels, components = 40, 5, BACKGROUND + 2 * PER_CLASS
    cells, prior = torch.randn(count, channels, generator=rng), torch.rand(count, 2, generator=rng)
    own = torch.tensor([[True, False], [False, True], [True, True], [False, False]]).repeat(10, 1)
    means, weights = torch.randn(components, channels, generator=rng), torch.rand(components, generator=rng)
    root = torch.randn(channels, channels, generator=rng)
    covariance = root @ root.T + torch.eye(channels)
    precision = torch.linalg.inv(covariance)
    bias = weights.log() - 0.5 * ((means @ precision) * means).sum(dim=1)
    counts, sums = network.seed._expect(cells, module.log_priors(prior * own, own), means @ precision, bias)
    shares = np.zeros((count, components))
    for i in range(count):
        for c in range(components):
            k = (c - BACKGROUND) // PER_CLASS
            highest = (prior * own)[i].max()
            if c >= BACKGROUND and not own[i, k]:
                continue
            before = (prior * own)[i, k] if c >= BACKGROUND else 1 - highest
            density = multivariate_normal.pdf(cells[i].numpy(), means[c].numpy(), covariance.numpy())
            shares[i, c] = weights[c] * density * np.clip(before, 0.05, 0.95) ** module.PRIOR
        shares[i] /= shares[i].sum()
    gap = np.abs(counts.numpy() - shares.sum(axis=0)).max()
    assert gap < 1e-4, f"counts differ by {gap:.1e}"
    gap = np.abs(sums.numpy() - shares.T @ cells.numpy()).max()
    assert gap < 1e-4, f"sums of features differ by {gap:.1e}"


def test_the_whole_object_is_found_from_a_cam_that_fires_on_a_part(fitted):
    network, _, items = fitted
    right, alone, cells = 0, 0, 0
    for item in items:
        *_, keys, truth = item
        if not len(keys):
            continue
        maps = torch.from_numpy(map_of(network, item)) ** (1 / SHARPNESS)
        highest, which = maps.max(dim=0)
        found = torch.where(highest >= 0.5, torch.from_numpy(keys)[which] + 1, 0)
        cam = torch.where(item[1][0, keys].max(dim=0).values > 0.5, torch.from_numpy(keys)[which] + 1, 0)
        right, alone, cells = (right + (found == truth).sum().item(), alone + (cam == truth).sum().item(),
                               cells + truth.numel())
    assert right / cells > 0.95, f"{right / cells:.3f} of the cells are right"
    assert alone / cells < 0.9, f"the CAM alone has {alone / cells:.3f}: too easy"


def test_the_seed_is_built_again_from_its_record_with_the_same_maps(fitted):
    network, how, items = fitted
    again = unpack(pack(network, **how), attach)
    gap = np.abs(map_of(again, items[2]) - map_of(network, items[2])).max()
    assert gap == 0, f"maps differ by {gap:.1e}"


def test_a_mixture_that_was_never_fitted_is_refused_instead_of_giving_maps_of_zeros(fitted):
    network, how = classifier()
    payload = {"networks": {"classifier": pack(network, **how)}, "classes": ["cat", "dog"]}
    with pytest.raises(UserError, match="mixture was never fitted, as its step 1 was stopped before; run step 1 again"):
        Pipeline(payload, MapConfig(), WalkConfig(), Machine(torch.device("cpu")))
    network, how, _ = fitted
    record = pack(network, **how)
    payload["networks"]["classifier"] = {**record, "state": {"backbone": torch.zeros(1)}}
    damaged = Pipeline(payload, MapConfig(), WalkConfig(), Machine(torch.device("cpu")))
    with pytest.raises(UserError, match="missing or unknown tensors"):
        damaged.cam_views()
    payload["networks"]["classifier"] = record
    assert Pipeline(payload, MapConfig(), WalkConfig(), Machine(torch.device("cpu"))).classifier.seed.fits == FITS


def test_a_pair_of_equal_views_gives_the_map_of_the_view(fitted):
    network, _, items = fitted
    features, cam, keys, _ = items[2]
    images = torch.zeros(1, 3, 8, 8)
    one = network.seed.maps(network, features, cam, images)
    pair = tuple(torch.cat([part, part]) for part in one)
    gap = np.abs(network.seed.merge([one], keys, GRID) - network.seed.merge([pair], keys, GRID)).max()
    assert gap < 1e-5, f"they differ by {gap:.1e}"


def test_an_image_without_classes_has_no_map(fitted):
    network, _, items = fitted
    assert map_of(network, items[3]).shape == (0, *GRID)


def test_the_fit_is_the_same_for_the_same_seed_and_another_for_another():
    items, weights = scenes(12), []
    for seed in (0, 0, 1):
        network, _ = classifier()
        network.seed.fit(network, reader(items), labels_of(items), seed)
        weights.append(network.seed.weight.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("change", ["a class with one image", "a class without images", "constant features",
                                    "one image", "small images"])
def test_poor_splits_give_finite_maps(change):
    items, classes = scenes(8), 2
    if change == "a class with one image":
        items = [item for item in items if 1 not in item[2]] + [items[1]]
    elif change == "a class without images":
        classes, items = 3, scenes(8, classes=3)
    elif change == "constant features":
        items = [({name: torch.ones_like(x) for name, x in item[0].items()}, *item[1:]) for item in items]
    elif change == "one image":
        items = items[:1]
    else:
        items = [({name: x[..., :2, :3] for name, x in item[0].items()}, item[1][..., :2, :3], *item[2:])
                 for item in items]
    network, _ = classifier(classes=classes)
    network.seed.fit(network, reader(items), labels_of(items, classes), seed=0)
    for features, cam, *_ in items:
        maps = network.seed.merge([network.seed.maps(network, features, cam, torch.zeros(1, 3, 8, 8))],
                                  np.arange(classes), GRID)
        assert np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1, f"{maps.min()} to {maps.max()}"
        if change == "a class without images":
            assert maps[2].max() < 0.01, f"a class that was never seen reaches {maps[2].max():.2f}"


def test_a_split_without_labels_is_refused():
    network, _ = classifier()
    with pytest.raises(UserError, match="--method mixture needs labelled images"):
        network.seed.fit(network, reader([]), np.zeros((5, 2), int), seed=0)


def test_a_large_split_is_read_in_part_and_cells_are_bounded(monkeypatch):
    item = scene([0], torch.Generator().manual_seed(0))
    asked, sizes = [], []
    network, _ = classifier()
    monkeypatch.setattr(network.seed, "_maximise", lambda cells, *_: sizes.append(len(cells)) or 0.5)
    monkeypatch.setattr(network.seed, "_own_prior", lambda cells, mean, prior, *_: prior)

    def read(positions):
        asked.extend(positions)
        return (item[:3] for _ in positions)
    network.seed.fit(network, read, np.tile([1, 0], (20_000, 1)), seed=0)
    assert len(asked) == IMAGES and len(set(asked)) == IMAGES, f"{len(asked)} images are read"
    assert max(sizes) <= IMAGES * CELLS, f"{max(sizes)} cells"


@pytest.mark.parametrize("count, classes", [(5, 2), (3000, 80), (20_000, 20)])
def test_every_class_is_among_the_images_drawn(count, classes):
    rng = np.random.default_rng(0)
    labels = np.zeros((count, classes), int)
    labels[np.arange(count), rng.integers(0, classes - 1, count)] = 1  # all but the last, which one image shows
    labels[count // 2] = 0
    labels[count // 2, -1] = 1
    drawn = drawn_images(labels, IMAGES, np.random.default_rng(1))
    assert drawn == sorted(set(drawn)) and len(drawn) == min(count, IMAGES), f"{len(drawn)} images"
    missing = np.flatnonzero((labels.sum(axis=0) > 0) & (labels[drawn].sum(axis=0) == 0))
    assert not len(missing), f"classes {missing} are not drawn"
    assert drawn == drawn_images(labels, IMAGES, np.random.default_rng(1))


def test_posteriors_of_the_classes_and_the_background_sum_to_one():
    rng = torch.Generator().manual_seed(0)
    inner, outer, prior = (torch.randn(2, 3, 4, 5, generator=rng), torch.randn(2, 1, 4, 5, generator=rng),
                           torch.rand(2, 3, 4, 5, generator=rng))
    found = posteriors(inner, outer, prior)
    scores = torch.cat([outer + log_prior(1 - prior.amax(1, keepdim=True)), inner + log_prior(prior)], dim=1).exp()
    expected = scores[:, 1:] / scores.sum(dim=1, keepdim=True)
    assert torch.allclose(found, expected, atol=1e-6), f"{(found - expected).abs().max():.1e}"
    one = posteriors(inner[:, :1], outer, prior[:, :1]).flatten(2)
    binary = binary_posterior(inner[:, :1].flatten(2), outer.flatten(2), prior[:, :1].flatten(2))
    assert torch.allclose(one, binary, atol=1e-6), f"{(one - binary).abs().max():.1e}"


def test_affinities_are_squared_positive_cosines_of_centred_features_by_rows():
    x = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))
    found, centred = affinities(x)[0].numpy(), (x - x.mean(dim=2, keepdim=True))[0].T.numpy()
    expected = np.array([[max(0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2 for b in centred]
                         for a in centred])
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.abs(found - expected).max() < 1e-6, f"{np.abs(found - expected).max():.1e}"
    maps = torch.rand(1, 2, 9)
    reached = spread(maps, affinities(x), 2)[0]
    assert torch.allclose(reached.amin(dim=1), torch.zeros(2)) and torch.allclose(reached.amax(dim=1), torch.ones(2))
    again = (maps[0].numpy() @ expected.T) @ expected.T
    again = (again - again.min(axis=1, keepdims=True)) / np.ptp(again, axis=1, keepdims=True)
    assert np.abs(reached.numpy() - again).max() < 1e-5
    assert torch.isfinite(spread(torch.zeros(1, 1, 9), affinities(x), 4)).all()


@pytest.mark.parametrize("size, margin", [((24, 32), 6), ((13, 32), 4), ((12, 12), 1), ((10, 8), 0), ((1, 3), 0),
                                          ((12, 200), 5)], ids=str)
def test_cells_near_the_edge_are_not_drawn_where_enough_others_are(size, margin):
    inside = torch.zeros(size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            inside[y, x] = margin <= y < size[0] - margin and margin <= x < size[1] - margin
    assert inner_cells(size).tolist() == inside.flatten().nonzero()[:, 0].tolist()
    features = {"layer2": torch.arange(size[0] * size[1]).expand(1, 128, -1).reshape(1, 128, *size).float(),
                "layer3": torch.zeros(1, 256, *size)}
    network, _ = classifier()
    drawn, _, _ = network.seed._sample(features, torch.zeros(1, 2, *size), np.array([0]), torch.Generator())
    assert set(drawn[:, 0].long().tolist()) <= set(inner_cells(size).tolist()), f"{drawn[:, 0]} in {size}"
    assert len(drawn) == min(96, int(inside.sum()))


def test_a_checkpoint_from_before_the_record_held_them_has_6_background_components_and_3_fits():
    network = build_network(**HOW).eval()
    attach(network, {"name": "mixture", "depths": []})
    assert network.seed.weight.shape == (3, 6 + 2 * PER_CLASS, 384), tuple(network.seed.weight.shape)
    items = scenes(6)
    network.seed.fit(network, reader(items), labels_of(items), seed=0)
    assert np.isfinite(map_of(network, items[0])).all()


def test_depths_are_chosen_by_name_and_a_wrong_name_is_refused():
    network, _ = classifier(["layer3"])
    assert network.seed.weight.shape == (FITS, BACKGROUND + 2 * PER_CLASS, 256), tuple(network.seed.weight.shape)
    items = scenes(6)
    network.seed.fit(network, reader(items), labels_of(items), seed=0)
    assert np.isfinite(map_of(network, items[0])).all()
    with pytest.raises(UserError, match="no depth 'layer9'; it has layer2"):
        classifier(["layer9"])
