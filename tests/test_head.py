"""A linear head on stored features: the optimum of its penalised loss, and stage 1 with --head_only."""
import json
import math
import re

import numpy as np
import pytest
import torch
from script_runs import DATA, chain, copy, finish, run, start

from data.make_toy import make_toy
from models.backbone import build_backbone
from models.weights import build_network
from src import train
from src.train import deepest_loaded
from src.training.head import PENALTY, fit_head
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import DataConfig, Machine
from utils.datasets import open_dataset


def data(count=80, channels=6, classes=3):
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand(count, classes, generator=rng) < 0.4).float()
    features = torch.randn(count, channels, generator=rng) + 3
    features[:, :classes] += 4 * labels
    return features, labels


def loss(weight, bias, features, labels):
    """The penalised loss written out, per image; weight and bias on standardised features."""
    x = (features - features.mean(dim=0)) / features.std(dim=0, unbiased=False)
    probability = torch.sigmoid(x @ weight.T + bias)
    likelihood = labels * probability.log() + (1 - labels) * (1 - probability).log()
    return -likelihood.sum(dim=1).mean() + PENALTY * (weight ** 2).sum()


def test_the_head_is_the_optimum_of_its_loss():
    features, labels = (part.double() for part in data())
    weight, bias = (part.double() for part in fit_head(features.float(), labels))
    deviation = features.std(dim=0, unbiased=False)
    standard = (weight * deviation).requires_grad_()
    offset = (bias + weight @ features.mean(dim=0)).requires_grad_()
    loss(standard, offset, features, labels).backward()
    slope = max(standard.grad.abs().max(), offset.grad.abs().max())
    assert slope < 1e-3, f"the gradient there is {slope:.1e}"
    right = ((features @ weight.T + bias > 0) == labels.bool()).float().mean()
    assert right > 0.95, f"{right:.2f} of the labels are predicted"


def test_the_scale_of_a_feature_changes_nothing():
    features, labels = data()
    scaled = features * torch.tensor([1000.0, 1, 1, 1, 1, 0.01])
    (weight, bias), (other, other_bias) = (fit_head(inputs.clone(), labels) for inputs in (features, scaled))
    logits, others = features @ weight.T + bias, scaled @ other.T + other_bias
    gap = (logits - others).abs().max() / logits.abs().max()
    assert gap < 1e-2, f"logits differ by {gap:.1e} of their maximum"


def test_images_that_are_taken_in_parts_give_the_same_head(monkeypatch):
    features, labels = data()
    whole = fit_head(features.clone(), labels)
    monkeypatch.setattr("src.training.head.ROWS", len(labels) // 3 + 1)
    gap = max(((one - other).abs().max() / one.abs().max()).item()
              for one, other in zip(whole, fit_head(features.clone(), labels)))
    assert gap < 1e-3, f"weights differ by {gap:.1e} of their maximum"


def test_a_class_that_no_image_shows_is_never_predicted():
    features, labels = data()
    weight, bias = fit_head(features.clone(), labels * torch.tensor([1.0, 1, 0]))
    logits = features @ weight.T + bias
    assert torch.isfinite(weight).all() and logits[:, 2].max() < 0, f"logits up to {logits[:, 2].max():.2f}"


@pytest.mark.parametrize("backbone, loaded, expected", [
    ("resnet18", ("conv1", "layer2.0.conv1", "layer3.1.bn2"), "layer3"),
    ("resnet18", ("conv1", "layer4.1.bn2"), "layer4"),
    ("resnet18", (), "layer4"),
    ("efficientnet_lite0", ("net.conv_stem", "net.blocks.4.0.conv_dw"), "blocks.4")])
def test_the_head_reads_the_deepest_stage_that_came_from_a_file(backbone, loaded, expected):
    with torch.device("meta"):
        net = build_backbone(backbone)
    assert deepest_loaded(net, loaded) == expected


@chain
def fitted_heads(folder, get):
    """Stage 1 without training on the toy data of the chain, from its trained backbone, by cam and by mixture."""
    copy(get("pipeline").folder, folder, without=("deeplab*", "walks", "scores"))
    base = ("run_train.py", "--stage", "1", "--backbone", "resnet18", "--pretrained",
            "output/stage1_resnet18/model_best.pth.tar", "--scales", "1.0", "--workers", "0", "--device", "cpu",
            "--precision", "fp32")
    run(folder, *base, "--method", "cam", "--head_only", "--output_dir", "head_cam", "--cam_dir", "cams_cam")
    run(folder, *base, "--output_dir", "head_mixture", "--cam_dir", "cams_mixture")
    run(folder, "run_inference.py", "--model_path", "head_mixture/model_best.pth.tar", "--output_dir", "masks",
        "--cam_dir", "cams_mixture", "--workers", "0")
    run(folder, "run_train.py", "--stage", 1, "--model_path", "head_mixture/model_best.pth.tar", "--output_dir",
        "adopted", "--cam_dir", "cams_adopted", "--workers", "0", "--device", "cpu")
    return folder


@pytest.mark.parametrize("name, bias", [("cam", True), ("mixture", True)])
def test_stage_1_fits_its_head_without_training(fitted_heads, name, bias):
    payload = load_checkpoint(fitted_heads / f"head_{name}/model_best.pth.tar", ("stage1",))
    record = payload["networks"]["classifier"]
    assert record["bias"] is bias and record["seed"]["name"] == name, f"{record['seed']}, bias {record['bias']}"
    assert not (fitted_heads / f"head_{name}/checkpoint.pth.tar").exists(), "there was a training"
    options = json.loads((fitted_heads / f"head_{name}/options.json").read_text())["options"]
    assert options["head_only"] and options["method"] == name, options
    cams = sorted((fitted_heads / f"cams_{name}").glob("*.npz"))
    maps = [np.load(path, allow_pickle=False)["cam"] for path in cams]
    assert maps and all(np.isfinite(one).all() for one in maps), f"{len(maps)} CAMs"


def test_an_adopted_classifier_keeps_its_method_whose_defaults_later_steps_take(fitted_heads):
    manifests = [json.loads((fitted_heads / name / "manifest.json").read_text()) for name in ("cams_mixture",
                                                                                             "cams_adopted")]
    methods = [manifest["options"]["method"] for manifest in manifests]
    assert methods == ["mixture", "mixture"], methods


def test_masks_come_from_a_checkpoint_of_stage_1_without_a_walk(fitted_heads):
    masks = list((fitted_heads / "masks").glob("*.png"))
    manifest = json.loads((fitted_heads / "masks/manifest.json").read_text())
    assert len(masks) == len(list((fitted_heads / "cams_mixture").glob("*.npz"))), f"{len(masks)} masks"
    assert manifest["identity"]["bg_alpha"] == 6.0, manifest["identity"]
    assert not list((fitted_heads / "head_mixture").glob("scores/walk*")), "there was a walk"


MIXTURE = ("run_train.py", "--stage", "1", "--backbone", "resnet18", "--pretrained",
           "output/stage1_resnet18/model_best.pth.tar", "--scales", "1.0", "--workers", "0", "--device", "cpu",
           "--precision", "fp32", "--output_dir", "head_mixture", "--cam_dir", "cams_mixture")


@pytest.fixture
def stopped(fitted_heads, tmp_path):
    """A run of step 1 by the mixture that was stopped among its CAMs: (folder, those that were made before)."""
    copy(fitted_heads, tmp_path, without=("head_cam", "cams_cam", "cams_adopted", "adopted", "masks"))
    cams = sorted((tmp_path / "cams_mixture").glob("*.npz"))
    for path in cams[2:]:
        path.unlink()
    manifest = json.loads((tmp_path / "cams_mixture/manifest.json").read_text())
    (tmp_path / "cams_mixture/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    return tmp_path, cams[:2]


def refusal(folder, *command):
    done = finish(start(folder, *command))
    assert done.returncode == 1, f"ended with {done.returncode}: {done.stderr}"
    return done.stderr


def bits_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npz"))}


def test_a_mixture_that_was_stopped_among_its_cams_goes_on_with_the_missing_ones(stopped, fitted_heads):
    folder, before = stopped
    best, times = folder / "head_mixture/model_best.pth.tar", [path.stat().st_mtime_ns for path in before]
    first = refusal(folder, *MIXTURE)
    assert "model_best.pth.tar is there already; pass --resume to go on from it, --overwrite" in first, first
    fitted = best.stat().st_mtime_ns
    said = run(folder, *MIXTURE, "--resume").stderr
    assert best.stat().st_mtime_ns == fitted and "features" not in said, said
    assert [path.stat().st_mtime_ns for path in before] == times, "finished CAMs were made again"
    assert bits_of(folder / "cams_mixture") == bits_of(fitted_heads / "cams_mixture"), "the CAMs are others"


def test_a_mixture_that_was_stopped_before_its_fit_is_fitted_when_it_goes_on(stopped, fitted_heads):
    folder, _ = stopped
    best = folder / "head_mixture/model_best.pth.tar"
    payload = load_checkpoint(best)
    payload["networks"]["classifier"]["state"]["seed.weight"].zero_()
    save_checkpoint(best, payload)
    run(folder, *MIXTURE, "--resume")
    assert bits_of(folder / "cams_mixture") == bits_of(fitted_heads / "cams_mixture"), "the CAMs are others"


@pytest.mark.parametrize("case, words", [
    ("seed", r"--resume: head_mixture/model_best\.pth\.tar was made with other options \(seed was 0, is 1\)"),
    ("labels", r"--resume: head_mixture/model_best\.pth\.tar was made from other images or labels than those in data"),
    ("photo", r"--resume: head_mixture/model_best\.pth\.tar was made from other images or labels than those in data"),
    ("nothing", r"--resume: there is no head_mixture/model_best\.pth\.tar to go on from; leave --resume out")])
def test_a_mixture_does_not_go_on_with_another_run(stopped, case, words):
    folder, _ = stopped
    best = folder / "head_mixture/model_best.pth.tar"
    if case == "labels":
        save_checkpoint(best, {**load_checkpoint(best), "data": "0" * 16})
    if case == "photo":
        photo = next((folder / DATA / "images").glob("*_1.jpg"))
        photo.write_bytes(photo.read_bytes() + b"more")
    if case == "nothing":
        best.unlink()
    said = refusal(folder, *MIXTURE, "--resume", *(("--seed", 1) if case == "seed" else ()))
    assert re.search(words, said), said


def test_a_head_leaves_no_checkpoint_of_an_earlier_training_to_resume(stopped):
    folder, _ = stopped
    earlier = folder / "head_mixture/checkpoint.pth.tar"
    earlier.write_bytes((folder / "output/stage1_resnet18/checkpoint.pth.tar").read_bytes())
    run(folder, *MIXTURE, "--overwrite")
    assert not earlier.exists()


def test_overlays_of_finished_masks_leave_the_masks_as_they_are(fitted_heads, tmp_path):
    copy(fitted_heads, tmp_path, without=("head_cam", "cams_cam", "cams_adopted", "adopted"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").glob("*.png")}
    run(tmp_path, "run_inference.py", "--model_path", "head_mixture/model_best.pth.tar", "--output_dir", "masks",
        "--cam_dir", "cams_mixture", "--workers", "0", "--save_overlays")
    made = {path.name for path in (tmp_path / "masks/overlays").glob("*.png")}
    assert made == {path.name for path in before}, f"{len(made)} overlays of {len(before)} masks"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "masks were written again"


def test_validation_without_a_readable_image_has_no_score(tmp_path):
    make_toy(tmp_path, train=2, test=1, classes=2, size=64)
    held = open_dataset(DataConfig("pet", str(tmp_path)))
    for i in range(len(held)):
        held.image_path(i).write_bytes(b"no image")
    network = build_network(kind="classifier", backbone="resnet18", classes=2).eval()
    found = train._mean_average_precision(network, held, 64, Machine(torch.device("cpu"), skip_bad=True))
    assert math.isnan(found["score"]), found
