"""The measures of experiments.affinity against loops, and the experiment itself on a few toy images."""
import numpy as np
import pytest
import torch
from PIL import Image

from data.make_toy import make_toy
from experiments.affinity import draw, measure, pair_quality, roc_area, sampled_mask
from models.weights import build_network, pack
from src.pipeline import Pipeline
from src.seeds import attach
from utils.config import DataConfig, Machine, MapConfig, WalkConfig
from utils.datasets import open_dataset


def test_the_roc_area_equals_a_loop_over_pairs_with_ties_counting_half():
    positive, negative = torch.tensor([0.9, 0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.2])
    expected = sum((p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()) / 12
    assert roc_area(positive, negative) == pytest.approx(expected)
    assert roc_area(torch.ones(3), torch.zeros(5)) == 1 and roc_area(torch.ones(3), torch.ones(5)) == 0.5


def test_pairs_of_a_cell_with_itself_and_of_ignored_cells_do_not_count():
    truth = torch.tensor([1, 1, 0, 0, 255])
    matrix = torch.full((5, 5), 0.1) + torch.eye(5)
    matrix[0, 1] = matrix[1, 0] = 0.8
    matrix[2, 3] = matrix[3, 2] = 0.6
    assert pair_quality(matrix, truth) == pytest.approx((0.8, 0.1, 0.6, 1.0))
    assert pair_quality(matrix, torch.zeros(5, dtype=torch.long)) is None, "an image without an object has no border"


def test_a_mask_is_sampled_corners_on_corners():
    mask = torch.arange(35).reshape(5, 7).to(torch.uint8).numpy()
    assert sampled_mask(mask, (3, 4)).tolist() == [0, 2, 4, 6, 14, 16, 18, 20, 28, 30, 32, 34]


@pytest.mark.parametrize("seed", [{"name": "cam"}, {"name": "avc", "colour": 0.5}])
def test_the_affinities_of_any_seed_are_measured_and_drawn(tmp_path, seed):
    make_toy(tmp_path / "data", train=4, test=1, classes=2, size=64)
    dataset, how = open_dataset(DataConfig("pet", str(tmp_path / "data"))), {"backbone": "resnet18", "classes": 2}
    torch.manual_seed(0)
    network = build_network("classifier", **how)
    attach(network, seed)
    record = pack(network, kind="classifier", **how, seed=seed)
    payload = {"classes": dataset.classes, "networks": {"classifier": record}}
    pipeline = Pipeline(payload, MapConfig(max_size=65), WalkConfig(), Machine(torch.device("cpu")))
    same, across, ground, area = measure(pipeline, dataset)
    assert all(0 < value <= 1 for value in (same, across, ground, area)), (same, across, ground, area)
    draw([pipeline, pipeline], dataset, tmp_path / "drawn.jpg")
    with Image.open(tmp_path / "drawn.jpg") as picture:
        assert picture.format == "JPEG" and np.asarray(picture).std() > 10, picture.size
