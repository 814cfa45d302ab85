"""The plain CAM as a seed, and what all seeds share: views against one at a time, the registry, plans, affinities."""
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.classifier import classification_loss
from models.weights import build_network, pack, unpack
from src import pipeline as pipelines
from src.pipeline import Pipeline
from src.seeds import SEED_FLAGS, SEEDS, attach, seed_class
from src.seeds.cam import FINEST_GRID, CamConfig, Plan, Seed, cutmix, sum_views, unit_maximum
from src.training.loop import MicroBatch
from utils.config import Machine, MapConfig, WalkConfig
from utils.errors import UserError

HOW = {"kind": "classifier", "backbone": "resnet18", "classes": 3}
SIZE, GRID = (65, 97), (17, 25)  # of the images, and of their CAMs
KEYS = [np.array(keys, int) for keys in ([0, 2], [1], [], [0, 1, 2], [2])]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    network = build_network(**HOW)
    attach(network, {"name": "cam"})
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


def pipeline_of(classifier, scales=(0.5, 1.0), **how):
    payload = {"classes": ["a", "b", "c"], "networks": {"classifier": pack(classifier, **HOW, seed={"name": "cam"})}}
    return Pipeline(payload, MapConfig(scales, max_size=512, **how), WalkConfig(), Machine(torch.device("cpu")))


def views_of(count, sides=((33, 49), (65, 97)), seed=0):
    """The views of so many images: of each, one a side."""
    generator = torch.Generator().manual_seed(seed)
    return list(zip(*(torch.randn(count, 3, *side, generator=generator) for side in sides)))


@torch.no_grad()
def one_view_at_a_time(classifier, views, keys, alternate=False):
    """The CAM as the papers have it: every scale and its flip by itself, ReLU, resized, summed, over its maximum."""
    total = 0
    for number, view in enumerate(views):
        for flipped in [number == 1] if alternate else (False, True):
            cam = classifier.cam(classifier.backbone(view.flip(-1)[None] if flipped else view[None])).relu()
            cam = F.interpolate(cam, size=GRID, mode="bilinear", align_corners=True)[0]
            total = total + (cam.flip(-1) if flipped else cam)
    total = total[keys].numpy()
    return total / np.maximum(total.max(axis=(1, 2), keepdims=True), 1e-8)


@pytest.mark.parametrize("pixels", [1, 3 * 65 * 97, 10**9])
def test_cams_equal_those_of_one_view_at_a_time_however_views_share_a_pass(classifier, monkeypatch, pixels):
    monkeypatch.setitem(pipelines.PIXELS, "cpu", pixels)
    views = views_of(len(KEYS))
    for own, keys, cam in zip(views, KEYS, pipeline_of(classifier).cams(views, [SIZE] * len(KEYS), KEYS)):
        expected = one_view_at_a_time(classifier, own, keys)
        assert list(cam.keys) == list(keys) and cam.size == SIZE, f"{cam.keys} of {keys}, {cam.size}"
        assert cam.maps.shape == expected.shape, f"shape {cam.maps.shape} instead of {expected.shape}"
        error = abs(cam.maps - expected).max(initial=0)  # of maps whose maximum is 1
        assert error < 1e-4, f"off by {error} with {pixels} pixels a pass"
    assert abs(expected - 1).max() > 0.5, "the example is flat"


def test_an_image_without_a_class_has_no_map(classifier):
    (cam,) = pipeline_of(classifier).cams(views_of(1), [SIZE], [np.array([], int)])
    assert len(cam.keys) == 0 and cam.maps.shape == (0, *GRID), cam.maps.shape


@pytest.mark.parametrize("seed", range(4))
def test_predicted_labels_come_from_the_mean_of_all_views(classifier, seed):
    (views,) = views_of(1, seed=seed)
    with torch.no_grad():
        logits = torch.cat([classifier(torch.stack([view, view.flip(-1)])) for view in views]).mean(dim=0)
    (cam,) = pipeline_of(classifier).cams([views], [SIZE], [None])
    expected = np.flatnonzero(logits > 0) if (logits > 0).any() else [int(logits.argmax())]
    assert list(cam.keys) == list(expected), f"{cam.keys} of logits {logits.tolist()}"


@pytest.mark.parametrize("evidence, keys", [((-2.0, 3.0, 1.0), [1, 2]), ((-2.0, -1.0, -3.0), [1]), ((0.0, -1.0), [0])])
def test_the_likeliest_class_is_predicted_if_none_is_likely(evidence, keys):
    assert list(pipelines.predicted(np.array(evidence))) == keys


def test_without_the_flip_there_is_one_view_a_scale(classifier):
    views = [view for _, view in views_of(2)]
    logits, (cam,) = pipeline_of(classifier)._look(views, (False,))
    both, (turned,) = pipeline_of(classifier)._look(views, (False, True))
    assert logits.shape == (2, 1, 3) and cam.shape[:3] == (2, 1, 3), (logits.shape, cam.shape)
    assert both.shape == (2, 2, 3) and turned.shape[:3] == (2, 2, 3), (both.shape, turned.shape)
    assert not torch.equal(turned[:, 0], turned[:, 1]), "the second view is no other"


@pytest.mark.parametrize("how, flips", [
    ({}, [(False, True), (False, True), (False, True)]), ({"flip": False}, [(False,), (False,), (False,)]),
    ({"alternate": True}, [(False,), (True,), (False,)]),
    ({"flip": False, "alternate": True}, [(False,), (False,), (False,)]),
    ({"scales": (1.0,), "alternate": True}, [(False, True)])])
def test_the_flips_of_each_scale_follow_from_the_two_flags(how, flips):
    assert MapConfig(**how).flips() == flips, f"{how}: {MapConfig(**how).flips()}"


def test_alternate_cams_are_the_first_scales_and_the_flipped_second_ones(classifier):
    ((views, keys),) = zip(views_of(1), KEYS[:1])
    (cam,) = pipeline_of(classifier, alternate=True).cams([views], [SIZE], [keys])
    expected = one_view_at_a_time(classifier, views, keys, alternate=True)
    error, apart = abs(cam.maps - expected).max(), abs(expected - one_view_at_a_time(classifier, views, keys)).max()
    assert error < 1e-4 < apart, f"off by {error}; from those of both flips by {apart}"


def test_maps_are_summed_over_scales_and_views():
    scales = [torch.rand(2, 3, 5, 7), torch.rand(1, 3, 9, 4)]
    both, one = (F.interpolate(maps, size=(11, 13), mode="bilinear", align_corners=True) for maps in scales)
    expected = (both[0] + both[1] + one[0]).numpy()
    found = sum_views(scales, (11, 13))
    error = abs(found - expected).max() / expected.max()
    assert found.dtype == np.float32 and error < 1e-6, f"{found.dtype}, off by {error} of the maximum"
    assert sum_views([maps[:, :0] for maps in scales], (11, 13)).shape == (0, 11, 13)


def test_every_map_is_divided_by_its_own_maximum_and_a_blank_one_stays_blank():
    found = unit_maximum(np.array([[[1.0, 4.0]], [[0.0, 0.0]], [[50.0, 25.0]]]))
    assert found.tolist() == [[[0.25, 1]], [[0, 0]], [[1, 0.5]]], found.tolist()
    assert unit_maximum(np.zeros((0, 2, 2))).shape == (0, 2, 2)


# --- a training step -----------------------------------------------------------------------------------------------

MICRO = MicroBatch(0.25, torch.zeros(0), 0.5)


def batch_of(count=4):
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(count, 3, 65, 65, generator=generator),
            "labels": torch.randint(0, 2, (count, 3), generator=generator).float()}


def test_the_loss_is_the_weighted_classification_loss(classifier):
    batch = batch_of()
    value, terms = classifier.seed.loss(classifier, batch, MICRO, CamConfig())
    expected = classification_loss(classifier(batch["image"]), batch["labels"]).item() / 4
    assert value.item() == pytest.approx(expected, rel=1e-6) and terms == {}, f"{value.item()}, not {expected}; {terms}"


def test_cutmix_mixes_a_step_with_its_probability_and_without_it_nothing_is_drawn(classifier):
    batch = batch_of()
    torch.manual_seed(3)
    found, _ = classifier.seed.loss(classifier, batch, MICRO, CamConfig(cutmix=1.0))
    torch.manual_seed(3)
    torch.rand(())  # whether this step mixes
    images, labels = cutmix(batch["image"], batch["labels"])
    expected = classification_loss(classifier(images), labels).item() / 4
    assert found.item() == pytest.approx(expected, rel=1e-6), f"{found.item()}, not {expected}"
    torch.manual_seed(3)
    mixed = [classifier.seed.loss(classifier, batch, MICRO, CamConfig(cutmix=0.3))[0] for _ in range(40)]
    plain = classifier.seed.loss(classifier, batch, MICRO, CamConfig())[0]
    changed = sum(not torch.equal(one, plain) for one in mixed)
    assert 4 <= changed <= 20, f"{changed} of 40 steps were mixed with probability 0.3"
    before = torch.get_rng_state()
    classifier.seed.loss(classifier, batch, MICRO, CamConfig())
    assert torch.equal(torch.get_rng_state(), before), "a step without CutMix moved torch's generator"


# --- affinities for pictures ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_affinities_of_a_plain_cam_are_the_cosines_of_its_features(classifier):
    images = torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    matrix, grid = classifier.seed.affinities(classifier, images)
    features = classifier.backbone(images)[classifier.backbone.stages[1]]
    assert grid == tuple(features.shape[-2:]) and matrix.shape == (2, grid[0] * grid[1], grid[0] * grid[1]), grid
    flat = features.flatten(2)
    for i in range(0, matrix.shape[1], 5):
        for j in range(matrix.shape[1]):
            expected = torch.cosine_similarity(flat[1, :, i], flat[1, :, j], dim=0).clamp(min=0).item()
            assert abs(matrix[1, i, j] - expected) < 1e-5, f"A[{i}, {j}] is {matrix[1, i, j]}, not {expected}"
    assert 0 < matrix.min() < 0.9 or (matrix == 0).any(), "the example is flat"


@torch.no_grad()
def test_grids_of_affinities_are_at_most_28_cells_a_side(classifier):
    _, grid = classifier.seed.affinities(classifier, torch.zeros(1, 3, 49, 16 * 40 + 1))
    assert grid == (4, FINEST_GRID), grid


# --- the registry --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cam", "common", "avc"])
def test_a_seed_is_built_again_from_its_record(name):
    torch.manual_seed(0)
    network, seed = build_network(**HOW), seed_class(name)
    assert issubclass(seed, Seed) and seed.name == name and SEEDS[name] is seed
    record = seed.record(seed.Settings())
    attach(network, record)
    for buffer in network.seed.buffers():
        buffer.add_(3)
    again = unpack(pack(network, **HOW, seed=record), attach)
    assert type(again.seed) is seed and record["name"] == name, (type(again.seed), record)
    different = [key for key, value in network.state_dict().items() if not torch.equal(value, again.state_dict()[key])]
    assert not different, different
    added = network.state_dict().keys() - build_network(**HOW).state_dict().keys()
    assert all(key.startswith("seed.") for key in added), added


def test_a_classifier_without_its_seed_is_refused():
    network = build_network(**HOW)
    attach(network, {"name": "common"})
    with pytest.raises(UserError, match="unknown tensors .2, such as seed.weight"):
        unpack(pack(network, **HOW))


def test_an_unknown_seed_is_refused_with_the_choices():
    with pytest.raises(UserError, match="unknown seed method 'cams'; pass --method cam, common, avc"):
        seed_class("cams")


def test_the_flags_of_a_seed_have_the_defaults_of_its_settings():
    for name, flags in SEED_FLAGS.items():
        settings = asdict(seed_class(name).Settings())
        assert {flag: settings[flag] for flag in flags} == {flag: one.default for flag, one in flags.items()}, name
        assert settings == asdict(seed_class(name).Settings.of({**settings, "lr": 1.0})), name


def plan(settings=None, pretrained=True, freeze=None, accumulate=1, head_only=False):
    return Plan(settings or CamConfig(), pretrained, 5, freeze, accumulate, head_only)


def test_a_plain_cam_runs_with_any_plan_and_freezes_two_blocks():
    for one in (plan(), plan(pretrained=False), plan(freeze=0), plan(CamConfig(cutmix=0.5), accumulate=4)):
        assert Seed.check(one) is None
    assert Seed.default_freeze(5) == 2


@pytest.mark.parametrize("changes, words", [
    ({"pretrained": False}, "--method common reads pretrained features; pass --pretrained PATH, or --method cam"),
    ({"freeze": 3}, "--method common needs the features of the pretrained backbone: pass --freeze 4 or more"),
])
def test_the_common_object_is_refused_features_that_training_bends(changes, words):
    common = seed_class("common")
    with pytest.raises(UserError, match=words):
        common.check(plan(**changes))
    for freeze in (None, 4, 5):
        assert common.check(plan(freeze=freeze)) is None
    assert common.default_freeze(5) == 4


@pytest.mark.parametrize("changes, words", [
    ({"settings": {"cutmix": 0.5}}, "--cutmix pastes images together"),
    ({"accumulate": 2}, "--accumulate takes apart"),
    ({"head_only": True}, "--method avc trains its affinities, and --head_only trains nothing"),
])
def test_avc_is_refused_steps_that_take_objects_or_batches_apart_or_do_not_train(changes, words):
    avc = seed_class("avc")
    settings = avc.Settings(**changes.pop("settings", {}))
    with pytest.raises(UserError, match=words):
        avc.check(plan(settings, **changes))
    assert avc.check(plan(avc.Settings(), pretrained=False)) is None and avc.default_freeze(5) == 4
