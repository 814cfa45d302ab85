"""The common object as a seed: its discriminant on descriptors whose object side is known, its maps, what it reads."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.weights import build_network, pack
from src.pipeline import Pipeline
from src.seeds import attach
from src.seeds.common import DESCRIPTORS, LEAST, SHARPNESS, CommonObject
from utils.config import Machine, MapConfig, WalkConfig
from utils.errors import UserError

HOW = {"kind": "classifier", "backbone": "resnet18", "classes": 3}


def gap(found, expected):
    """Largest difference, relative to the largest magnitude of what is expected."""
    found, expected = (torch.as_tensor(values) for values in (found, expected))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def descriptors(count=600, channels=12, seed=0):
    """Two classes whose objects differ a little, before backgrounds that differ a lot along another axis.

    Returns features (N, D), classes (N,), a CAM that fires on a tenth of the object, and which rows are object.
    """
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(count, channels, generator=rng)
    is_object = torch.rand(count, generator=rng) < 0.35
    classes = torch.randint(0, 2, (count,), generator=rng)
    features[:, 0] += torch.where(is_object, 5.0, -2.0)
    features[:, 1] += classes * is_object * 1.5
    cam = (is_object & (torch.rand(count, generator=rng) < 0.1)).float()
    return features, classes, cam, is_object


def fitted():
    seed = CommonObject(12)
    seed.fit_descriptors(*descriptors()[:3])
    return seed


def agreement(seed, features, is_object):
    odds = seed.log_odds(features.T[None, :, :, None])[0, :, 0]
    return ((odds > 0) == is_object).float().mean().item()


# --- the discriminant ----------------------------------------------------------------------------------------------

def test_the_discriminant_finds_the_whole_object_from_a_cam_that_fires_on_a_tenth_of_it():
    features, classes, cam, is_object = descriptors()
    seed = CommonObject(12)
    ratio = seed.fit_descriptors(features, classes, cam)
    found = agreement(seed, features, is_object)
    assert found > 0.98, f"{found:.3f} of the descriptors are on the right side"
    truth = is_object.float().mean().item()
    assert abs(ratio - truth) < 0.02, f"ratio {ratio:.3f}, truth {truth:.3f}"


def test_the_sign_follows_the_cam():
    features, classes, _, is_object = descriptors()
    seed = CommonObject(12)
    seed.fit_descriptors(features, classes, 1 - is_object.float())
    found = agreement(seed, features, ~is_object)
    assert found > 0.98, f"{found:.3f} of the descriptors follow a CAM that fires on the background"


def test_the_discriminant_is_fishers_between_the_sides_it_ends_with():
    features, *rest = descriptors()[:3]
    seed = CommonObject(12)
    ratio = seed.fit_descriptors(features, *rest)
    side = features @ seed.weight + seed.bias - torch.logit(torch.tensor(ratio)) > 0
    data = features.double().numpy()
    means = [data[~side.numpy()].mean(axis=0), data[side.numpy()].mean(axis=0)]
    scatter = sum(np.outer(row - means[int(which)], row - means[int(which)]) for row, which in zip(data, side))
    covariance = scatter / len(data)
    covariance += 0.3 * np.diag(covariance).mean() * np.eye(12)
    weight = np.linalg.inv(covariance) @ (means[1] - means[0])
    bias = -weight @ (means[0] + means[1]) / 2 + np.log(ratio / (1 - ratio))
    assert gap(seed.weight, weight) < 1e-4, f"{seed.weight}, not {weight}"
    assert seed.bias.item() == pytest.approx(bias, rel=1e-4), f"{seed.bias.item()}, not {bias}"


def test_the_log_odds_are_a_linear_function_of_the_features_in_float32():
    seed, maps = fitted(), torch.randn(2, 12, 3, 5)
    expected = torch.stack([maps[b, :, y, x] @ seed.weight + seed.bias
                            for b in range(2) for y in range(3) for x in range(5)]).view(2, 3, 5)
    assert gap(seed.log_odds(maps), expected) < 1e-5, f"off by {gap(seed.log_odds(maps), expected)} of the largest"
    with torch.autocast("cpu", torch.bfloat16):
        found = seed.log_odds(maps)
    assert found.dtype == torch.float32 and torch.equal(found, seed.log_odds(maps)), found.dtype


def test_a_fitted_seed_survives_its_state_dict():
    seed, other = fitted(), CommonObject(12)
    other.load_state_dict(seed.state_dict())
    assert seed.weight.any() and torch.equal(other.weight, seed.weight) and torch.equal(other.bias, seed.bias)


def test_features_without_two_sides_are_refused_with_the_remedy():
    with pytest.raises(UserError, match="--method cam"):
        CommonObject(4).fit_descriptors(torch.zeros(50, 4), torch.zeros(50, dtype=torch.long), torch.zeros(50))


# --- what is read --------------------------------------------------------------------------------------------------

class Backbone:
    stages = ("shallow", "middle", "deep")


class Classifier:
    backbone = Backbone


def maps_of(raw, features=None):
    """What a reader gives of an image: feature maps, the first channel of which numbers the cells, and its CAM."""
    raw = torch.as_tensor(raw)[None]  # (1, K, h, w)
    cells = raw[0, 0].numel()
    if features is None:
        features = torch.randn(1, 4, *raw.shape[-2:], generator=torch.Generator().manual_seed(1))
    features[0, 0] = torch.arange(cells).view(raw.shape[-2:])
    return {"middle": features}, raw


def sampled(monkeypatch, items, seed=0):
    """(descriptors, classes, CAM) that `fit` hands over, of items (feature maps, CAM, keys)."""
    handed = []
    common = CommonObject(4)
    monkeypatch.setattr(common, "fit_descriptors", lambda *found: handed.extend(found) or 0.5)
    common.fit(Classifier, lambda positions: [items[i] for i in positions], np.ones((len(items), 1)), seed)
    return handed


@pytest.mark.parametrize("count", [1, 100, 16_384, 16_385, 20_000, 82_081])
def test_a_split_of_any_size_is_asked_for_no_more_images_than_give_65536_descriptors(count):
    """A part of the images is drawn where each would otherwise give fewer than LEAST."""
    asked = []

    def read(positions):
        asked.append(list(positions))
        for position in positions[:40]:  # the others have no label
            rng = torch.Generator().manual_seed(position)
            features = torch.randn(1, 4, 3, 5, generator=rng)
            yield {"middle": features}, torch.randn(1, 3, 3, 5, generator=rng), np.array([1])
        yield from (({"middle": None}, torch.zeros(1, 3, 1, 1), np.array([], int)) for _ in positions[40:])

    CommonObject(4).fit(Classifier, read, np.ones((count, 1)), seed=5)
    (positions,) = asked
    assert len(positions) * LEAST <= max(DESCRIPTORS, LEAST), f"{len(positions)} of {count} images are read"
    assert len(positions) == min(count, DESCRIPTORS // LEAST), f"{len(positions)} of {count} images are read"
    assert positions == sorted(set(positions)) and positions[0] >= 0 and positions[-1] < count, "twice, or out of order"
    if len(positions) < count:
        assert positions[-1] - positions[0] > 0.9 * count, "the images are not drawn from the whole split"
        CommonObject(4).fit(Classifier, read, np.ones((count, 1)), seed=5)
        CommonObject(4).fit(Classifier, read, np.ones((count, 1)), seed=6)
        assert asked[1] == asked[0] != asked[2], "the seed does not decide which"


def test_every_image_gives_as_many_cells_as_fit_and_each_cell_once(monkeypatch):
    items = [(*maps_of(torch.rand(2, 30, 40)), np.array([0, 1])) for _ in range(100)]
    found, classes, cam = sampled(monkeypatch, items)
    assert found.shape == (100 * 655, 4) and classes.shape == cam.shape == (100 * 655,), found.shape
    cells = found[:, 0].view(100, 655)
    assert all(len(set(row)) == 655 for row in cells.tolist()), "a cell was taken twice"
    same, other = (sampled(monkeypatch, items, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(same, found) and not torch.equal(other, found), "the seed does not decide which"


def test_cells_belong_to_the_class_whose_normalised_cam_is_highest_there(monkeypatch):
    keys, raw = np.array([1, 4]), torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(2)) - 0.3
    raw[1] *= 20  # a CAM's own height does not count
    items = [(*maps_of(raw), keys)]
    found, classes, cam = sampled(monkeypatch, items)
    own = raw[keys].clamp(min=0)
    own = (own / own.amax(dim=(1, 2), keepdim=True)).flatten(1)
    for cell, label, height in zip(found[:, 0].long().tolist(), classes.tolist(), cam.tolist()):
        best = own[:, cell].max()
        assert height == pytest.approx(best.item(), rel=1e-5), f"cell {cell}: {height}, not {best}"
        if best > 0:
            assert label == keys[own[:, cell].argmax()], f"cell {cell} belongs to {label}: {own[:, cell]}"


def test_where_no_cam_fires_a_cell_belongs_to_the_class_whose_cam_falls_short_least(monkeypatch):
    keys, raw = np.array([0, 2, 5]), -torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(2)) - 0.1
    raw[2, 0, 0] = 3.0  # but in one cell
    found, classes, cam = sampled(monkeypatch, [(*maps_of(raw), keys)])
    expected = [int(keys[raw[keys, cell // 7, cell % 7].argmax()]) for cell in found[:, 0].long().tolist()]
    assert classes.tolist() == expected, f"{classes.tolist()}, not {expected}"
    assert set(expected) == set(keys.tolist()) and (cam > 0).sum() == 1, "the example has not all classes"


def test_a_split_without_labels_is_refused():
    def read(positions):
        yield from ((*maps_of(torch.rand(2, 3, 3)), np.array([], int)) for _ in positions)
    with pytest.raises(UserError, match="no image has a label; --method common needs labelled images"):
        CommonObject(4).fit(Classifier, read, np.ones((3, 1)), 0)


def test_what_was_found_is_told(capsys):
    features, _, cam, _ = descriptors(count=320, channels=4)
    items = [({"middle": rows.T.reshape(1, 4, 4, 8)}, fires.view(1, 1, 4, 8), np.array([0]))
             for rows, fires in zip(features.split(32), cam.split(32))]
    CommonObject(4).fit(Classifier, lambda positions: [items[i] for i in positions], np.ones((10, 1)), 0)
    said = capsys.readouterr()
    assert "fitted to 320 descriptors" in said.err and "% of them object" in said.err and not said.out, said


# --- maps ----------------------------------------------------------------------------------------------------------

def merged(cam, odds, keys=None):
    """The maps of an image of one view: cam (K, h, w), odds (h, w)."""
    cam, odds = torch.as_tensor(cam)[None], torch.as_tensor(odds)[None, None]
    keys = np.arange(cam.shape[1]) if keys is None else keys
    return CommonObject(4).merge([(cam, odds)], keys, tuple(cam.shape[-2:]))


@pytest.mark.parametrize("cam", [torch.zeros(1, 3, 4), torch.rand(1, 3, 4), torch.rand(1, 3, 4) - 1.5])
def test_one_class_takes_its_map_from_the_object_alone_whatever_its_cam(cam):
    odds = torch.linspace(-4, 4, 12).view(3, 4)
    expected = torch.sigmoid(odds) ** SHARPNESS
    found = merged(cam, odds)[0]
    assert gap(found, expected / expected.max()) < 1e-5, f"{found} is not {expected / expected.max()}"


def test_several_classes_divide_the_object_in_proportion_to_their_cams():
    maps = merged([[[1.0, 0.25]], [[0.5, 1.0]]], torch.full((1, 2), 3.0))
    assert gap(maps, [[[1, 0.25]], [[0.5, 1]]]) < 1e-4, f"maps {maps.tolist()}"


def test_where_no_cam_fires_the_class_whose_cam_falls_short_least_wins_however_deep():
    """Equal ratios there would give the whole object to the class that comes first."""
    rng = torch.Generator().manual_seed(0)
    for depth in (0.1, 1.0, 60.0):
        raw = -depth * (1 + torch.rand(3, 6, 8, generator=rng))
        raw[:, 0, :3] = torch.eye(3) * 2 - 1  # but in three cells, one a class
        maps = merged(raw, torch.full((6, 8), 3.0))
        wrong = (maps.argmax(axis=0) != raw.argmax(dim=0).numpy()).sum()
        assert wrong == 0, f"{wrong} of 48 cells go to another class at depth {depth}"
        assert np.isfinite(maps).all() and maps.min() >= 0 and (maps.max(axis=(1, 2)) == 1).all(), maps.max(axis=(1, 2))


def test_where_no_cam_fires_at_all_the_halves_of_an_image_go_to_their_own_classes():
    raw = torch.full((2, 4, 6), -1.0)
    raw[0, :, 3:] = raw[1, :, :3] = -4.0
    maps = merged(raw, torch.zeros(4, 6))
    assert (maps.argmax(axis=0) == np.arange(6) // 3).all(), maps.argmax(axis=0)


def test_where_a_cam_fires_its_sum_over_views_counts_and_not_what_others_lack():
    raw = torch.tensor([[[2.0, -1.0]], [[-5.0, -0.5]]])  # the first class fires on the left, none on the right
    maps = merged(raw, torch.zeros(1, 2))
    expected = torch.tensor([[[1, np.exp(-0.5)]], [[1e-6 / 2, 1.0]]])
    assert gap(maps, expected) < 1e-4, f"{maps.tolist()}, not {expected.tolist()}"


def test_without_a_class_there_is_no_map():
    assert merged(torch.zeros(3, 4, 5), torch.zeros(4, 5), np.array([], int)).shape == (0, 4, 5)


@torch.no_grad()
def test_the_log_odds_are_averaged_over_scales_and_flips():
    torch.manual_seed(1)
    network = build_network(**HOW)
    attach(network, {"name": "common"})
    depth = network.backbone.channels[network.backbone.stages[1]]
    network.seed.fit_descriptors(torch.randn(60, depth), torch.arange(60) % 3, torch.rand(60))
    network.eval()
    views = [torch.randn(3, *side) for side in ((33, 49), (65, 97))]
    stage, size = network.backbone.stages[1], (17, 25)
    odds = [network.seed.log_odds(network.backbone(one[None])[stage])[:, None]
            for view in views for one in (view, view.flip(-1))]
    odds = [F.interpolate(one, size=size, mode="bilinear", align_corners=True)[0, 0] for one in odds]
    mean = sum(one.flip(-1) if i % 2 else one for i, one in enumerate(odds)) / 4
    expected = torch.sigmoid(mean.clamp(-30, 30)) ** SHARPNESS
    payload = {"classes": ["a", "b", "c"],
               "networks": {"classifier": pack(network, **HOW, seed={"name": "common"})}}
    pipeline = Pipeline(payload, MapConfig(max_size=512), WalkConfig(), Machine(torch.device("cpu")))
    (cam,) = pipeline.cams([views], [(65, 97)], [np.array([1])])
    assert gap(cam.maps[0], expected / expected.max()) < 1e-4, f"off by {gap(cam.maps[0], expected / expected.max())}"
    assert mean.std() > 0.1, "the example is flat"
