"""CAM inference: scales, mirror images, batches and memory against one view at a time."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.make_toy import make_toy
from models.build import build_network, pack
from src import cams
from src.cams import (SHARPNESS, cam_folder, cam_size, image_cams, label_keys, make_cams, normalised_cam, sharpened,
                      view_maps)
from src.inference import make_walks, walk_folder
from src.masks import load_scores
from utils.artifacts import load_cam
from utils.datasets import open_dataset
from utils.maps import foreground_share, with_background
from utils.options import FLAGS

CPU = torch.device("cpu")
OPTIONS = {"flip": True, "precision": "fp32", "labels": "gt", "max_size": 512}
LABELS = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]], np.uint8)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return build_network("classifier", backbone="resnet18", width=1.0, classes=3).eval()


def items(count, sides=((33, 49), (65, 97)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(count, 3, *side, generator=generator) for side in sides]
    return [{"index": i, "size": (65, 97), "views": [view[i] for view in views]} for i in range(count)]


def one_view_at_a_time(classifier, item, keys, size):
    """The CAM as the papers have it: every scale and mirror image by itself, ReLU, resized, summed, over its maximum."""
    total = 0
    with torch.no_grad():
        for view in item["views"]:
            for mirrored in (False, True):
                cam = classifier.cam(view.flip(-1)[None] if mirrored else view[None])[1].relu()
                cam = F.interpolate(cam, size=size, mode="bilinear", align_corners=True)[0]
                total = total + (cam.flip(-1) if mirrored else cam)
    total = total[keys].numpy()
    return total / np.maximum(total.max(axis=(1, 2), keepdims=True), 1e-8)


@pytest.mark.parametrize("pixels", [1, 3 * 65 * 97, 10**9])
def test_cams_equal_those_of_one_view_at_a_time_however_views_share_a_pass(classifier, monkeypatch, pixels):
    monkeypatch.setitem(cams.PIXELS, "cpu", pixels)
    batch = items(4)
    for item, labels, (keys, cam) in zip(batch, LABELS, image_cams(classifier, batch, LABELS, OPTIONS, CPU)):
        expected = one_view_at_a_time(classifier, item, np.flatnonzero(labels), (17, 25))
        assert list(keys) == list(np.flatnonzero(labels))
        assert cam.shape == expected.shape, f"shape {cam.shape} instead of {expected.shape}"
        error = abs(cam - expected).max(initial=0)
        assert error < 1e-5, f"off by {error} with {pixels} pixels a pass"


def test_an_image_without_a_class_has_no_map(classifier):
    ((keys, cam),) = image_cams(classifier, items(1), [np.zeros(3, np.uint8)], OPTIONS, CPU)
    assert len(keys) == 0 and cam.shape == (0, 17, 25)


def test_predicted_labels_come_from_the_mean_of_all_views(classifier):
    (item,) = items(1, seed=3)
    with torch.no_grad():
        logits = torch.stack([classifier(view[None])[0] for view in item["views"]
                              for view in (view, view.flip(-1))]).mean(dim=0).numpy()
    ((keys, _),) = image_cams(classifier, [item], [None], {**OPTIONS, "labels": "predicted"}, CPU)
    assert list(keys) == list(label_keys(logits, None, "predicted")), f"{keys} of {logits}"


def test_the_common_objects_odds_are_averaged_over_scales_and_mirror_images(classifier):
    torch.manual_seed(1)
    network = build_network("classifier", backbone="resnet18", width=1.0, classes=3).eval()
    depth = network.common.weight.numel()
    network.common.fit(torch.randn(60, depth), torch.arange(60) % 3, torch.rand(60))
    (item,) = items(1)
    with torch.no_grad():
        odds = [network.localise(view[None])[2][:, None] for view in item["views"] for view in (view, view.flip(-1))]
        odds = [F.interpolate(one, size=(17, 25), mode="bilinear", align_corners=True)[0, 0] for one in odds]
    mean = sum(one.flip(-1) if i % 2 else one for i, one in enumerate(odds)) / 4
    ((_, cam),) = image_cams(network, [item], [np.array([0, 1, 0])], OPTIONS, CPU)
    expected = torch.sigmoid(mean.clamp(-30, 30)) ** cams.SHARPNESS
    error = abs(cam[0] - (expected / expected.max()).numpy()).max()
    assert error < 1e-4, f"off by {error}"


def test_without_the_mirror_image_there_is_one_view_a_scale(classifier):
    logits, cam, odds = view_maps(classifier, [item["views"][1] for item in items(2)], False, CPU, "fp32")
    assert logits.shape == (2, 1, 3) and cam.shape[:3] == (2, 1, 3) and odds.shape[:2] == (2, 1)


def test_batches_of_images_give_the_files_of_one_at_a_time(classifier, monkeypatch, tmp_path):
    make_toy(tmp_path / "data", train=7, test=1, classes=3, size=48)
    dataset = open_dataset("pet", tmp_path / "data")
    affinity = build_network("affinity", backbone="resnet18").eval()
    options = {**OPTIONS, "scales": [1.0], "workers": 0, "difficult": True, "beta": 8.0, "walk_steps": 16,
               "walk_eps": 1e-3, "radius": 5, "bg_alpha": 6.0}
    made = {}
    for together in (1, 4):
        monkeypatch.setitem(cams.TOGETHER, "cpu", together)
        record = pack(classifier, kind="classifier", backbone="resnet18", classes=3)
        folder = cam_folder(tmp_path / f"cams{together}", record, dataset.classes, dataset.name, options)
        make_cams(record, dataset, folder, options, CPU)
        record = pack(affinity, kind="affinity", backbone="resnet18")
        walks = walk_folder(tmp_path / f"walks{together}", record, folder, options)
        make_walks(record, dataset, folder, walks, options, CPU)
        made[together] = [(load_cam(folder.path, image_id)[1], load_scores(walks.path, image_id)[1])
                          for image_id in dataset.ids]
    for one, four in zip(*made.values()):
        gaps = [abs(a - b).max() for a, b in zip(one, four)]
        assert max(gaps) < 2e-3, f"CAM and walk differ by {gaps}, more than their files' steps"


def test_the_grid_is_a_quarter_of_the_capped_image_rounded_up():
    assert cam_size((375, 500), 512) == (94, 125) and cam_size((1200, 1600), 512) == (96, 128)


def test_sharpened_shares_put_the_undecided_share_on_the_threshold_whatever_their_maximum():
    shares = np.array([[[0.0, 0.2, 0.5, 1.0]], [[0.0, 0.2, 0.5, 0.7]], [[0.0, 0.1, 0.2, 0.3]]])
    maps = normalised_cam(sharpened(shares))
    assert np.allclose(maps[:, 0, 3], 1) and (np.diff(maps, axis=2) > 0).all(), maps
    assert np.allclose(maps[:2, 0, 2], 0.5 ** SHARPNESS), f"0.5 becomes {maps[:2, 0, 2]}"
    scores = with_background(maps[:1], FLAGS["bg_alpha"].default)
    assert abs(foreground_share(scores, np.array([0]))[0][0, 2] - 0.5) < 0.02, "0.5 is not at the threshold"
    assert maps[2, 0, 2] < 0.5 ** SHARPNESS, "a map that is sure nowhere is object in most of its cells"
    assert not sharpened(np.zeros((1, 2, 2))).any() and sharpened(np.zeros((0, 2, 2))).shape == (0, 2, 2)
