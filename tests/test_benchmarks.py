"""The references that benchmarks compare with compute the same as ours, and the output says what was measured."""
import itertools
import json

import numpy as np
import pytest
import torch
from script_runs import chain, read_json, run
from torch.nn import functional as F

from benchmarks.affinity_loss import case, gather_loss
from benchmarks.cam import SCALES, plain_cam
from benchmarks.deeplab import plain, without_dropout
from benchmarks.device import copy_rate, crf, operations, photos, walk
from benchmarks.measure import Table
from benchmarks.performance import BENCHMARKS, document
from benchmarks.scale import CLASSES, MACHINE, SIZE, STEPS, open_drawn
from benchmarks.scoring import DISTINCT, counts_of, make, plain_sweep, score_maps
from experiments.avc_ablation import square_truth
from models.affinitynet import affinity_loss
from models.deeplab import segmentation_loss
from models.weights import build_network, pack, unpack
from src.pipeline import Pipeline
from utils.config import Machine, MapConfig, WalkConfig
from utils.labels import IGNORE
from utils.metrics import SweepHistogram
from utils.random_walk import chebyshev, half_disc


@pytest.mark.parametrize("training", [True, False])
def test_the_plain_deeplab_gives_our_loss_and_gradients_in_float64(training):
    torch.manual_seed(0)
    network = build_network("deeplab", "resnet38", width=0.0625, classes=3)
    network = without_dropout(network).double().train(training)
    images, target = torch.randn(2, 3, 65, 97).double(), torch.randint(0, 4, (2, 65, 97))
    results = []
    for loss in (F.cross_entropy(plain(network)(images), target, ignore_index=255),
                 segmentation_loss(network(images), target)):
        network.zero_grad()
        loss.backward()
        results.append([loss.item(), network.backbone.conv1a.weight.grad.clone(),
                        network.head.cls_conv.bias.grad.clone()])
    (one, *gradients), (other, *ours) = results
    assert abs(one - other) < 1e-6, f"losses {one} and {other}"
    for a, b in zip(gradients, ours):
        gap = ((a - b).norm() / a.norm()).item()
        assert gap < 1e-5, f"gradients differ by {gap:.1e}"


def test_the_plain_cam_is_ours_where_both_see_the_same_pixels():
    torch.manual_seed(0)
    how = {"kind": "classifier", "backbone": "resnet18", "classes": 3}
    record = pack(build_network(**how), seed={"name": "cam"}, **how)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    payload = {"networks": {"classifier": record}, "classes": ["a", "b", "c"]}
    (cam,) = Pipeline(payload, MapConfig(SCALES), WalkConfig(), Machine(torch.device("cpu"))).cam(image, ["b"]).maps
    error = abs(cam - plain_cam(unpack(record), image, 1, cam.shape)).max()
    assert error < 1e-4, f"off by {error} where the maps reach 1"


def test_the_gathered_affinity_loss_is_ours():
    features, labels = case(1)
    offsets = half_disc(3)
    one, other = affinity_loss(features, labels, offsets)[0].item(), gather_loss(features, labels, offsets).item()
    assert abs(one - other) < 1e-4, f"losses {one} and {other}"


def test_the_plain_sweep_counts_what_the_histogram_counts():
    histogram = SweepHistogram(5, 7)
    (image,) = score_maps(1, (20, 30), 4)
    histogram.update(*image)
    expected = plain_sweep(*image, histogram.thresholds(), 5)
    for threshold, matrix, counts in zip(histogram.thresholds(), histogram.confusions(), expected):
        assert (counts_of(matrix) == counts).all(), f"counts differ at {threshold}"


def test_truth_lies_on_the_cells_of_the_padded_square_and_nowhere_else():
    mask = np.ones((100, 200), np.uint8)
    mask[:, 150:] = 0
    truth = square_truth(mask, 257, (17, 17)).view(17, 17)
    assert (truth[9:] == IGNORE).all() and (truth[:9, :12] == 1).all() and (truth[:9, 13:] == 0).all(), truth.tolist()


def test_a_case_is_a_line_of_the_table_a_json_line_and_a_row_of_the_document(capsys):
    table = Table()
    table.add("walk", 0.5, 4.0, None, 1.234e-5, images=3)
    table.finish()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == {"case": "walk", "seconds": 0.5, "reference_seconds": 4.0, "ratio": 8.0, "extra_mb": None,
                   "max_error": 1.2e-5, "images": 3}
    text = document({name: [row] for name in BENCHMARKS}, photos=True)
    assert text.count("| walk | 0.5 | 4 | 8 |  | 1.2e-05 | images 3 |") == len(BENCHMARKS), text
    assert "`python -m benchmarks.crf --presets psa --data_root DATA`" in text, text


def test_drawn_photos_are_the_same_each_time_and_their_masks_show_a_class_of_their_labels(tmp_path):
    split = open_drawn(tmp_path, "20", difficult=True)
    for i in range(len(split)):
        image, mask = split.image(i), split.mask(i)
        assert image.shape == (*SIZE, 3) and mask.shape == SIZE and np.array_equal(image, split.image(i))
        (shown,) = set(np.unique(mask)) - {0}
        assert split.labels[i, shown - 1] == 1 and 1 <= split.labels[i].sum() <= 3, f"{shown}: {split.labels[i]}"
        assert 0.03 < (mask > 0).mean() < 0.6, f"{(mask > 0).mean():.2f} of the photo is object"
    assert split.labels.shape == (20, CLASSES) and len({split.image(i).tobytes() for i in range(20)}) == 20


def test_the_rates_of_a_device_rest_on_what_the_cases_do():
    cpu = torch.device("cpu")
    assert copy_rate(cpu) > 1e8, f"{copy_rate(cpu):.1e} bytes a second"
    layer = torch.nn.Conv2d(3, 5, 1, bias=False)
    assert operations(lambda: layer(torch.zeros(1, 3, 4, 4))) == 2 * 3 * 5 * 16
    images = photos(2, (48, 64))
    assert images[0].shape == (48, 64, 3) and len(np.unique(images[0])) > 100, "flat photos"
    (call, moved), (_, double) = walk(1, (48, 64), cpu), walk(2, (48, 64), cpu)
    assert call()[0].shape == (3, 6, 8) and double == 2 * moved, (moved, double)
    cells = list(itertools.product(range(6), range(8)))
    pairs = sum((a - c) ** 2 + (b - d) ** 2 < 25 for (a, b), (c, d) in itertools.product(cells, cells))
    products = len(chebyshev(256, 1e-3)) - 1
    assert moved == products * pairs * (4 + 4), f"{moved} bytes in {products} products of {pairs} entries"
    call, moved = crf(images, cpu, 2)
    call()
    assert moved > 12 * 2 * 48 * 64 * 6 * 16, f"{moved} bytes"  # 12 filterings, 6 corners, splat and slice, 8 bytes


@chain
def drawn(folder, get):
    """Step 1 on six drawn photos, through tests/test_plugs.py, which runs a module.  The folder."""
    run(folder, "tests/test_plugs.py", "-m", "benchmarks.scale", *STEPS["step 1"], "--split", 6, *MACHINE)
    return folder


def test_a_script_takes_the_drawn_photos(drawn):
    manifest = read_json(drawn / "data/cams/manifest.json")
    assert manifest["options"]["dataset"] == "drawn" and len(list((drawn / "data/cams").glob("*.npz"))) == 6, manifest


def test_step_4_scores_the_masks_that_scoring_makes(tmp_path):
    make(tmp_path, DISTINCT + 2, (24, 32), 5)
    data = ("--dataset", "folder", "--data_root", tmp_path)
    run(tmp_path, "run_eval.py", *data, "--mask_dir", "predicted", "--output_dir", "eval", *MACHINE)
    assert read_json(tmp_path / "eval/scores.json")["images"] == DISTINCT + 2
