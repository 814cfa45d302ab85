"""A linear head on stored features: the optimum of its penalised loss, and stage 1 with --head_only."""
import json

import numpy as np
import pytest
import torch
from script_runs import chain, copy, run

from models.backbone import build_backbone
from src.train import deepest_loaded
from src.training.head import PENALTY, fit_head
from utils.checkpoint import load_checkpoint


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
