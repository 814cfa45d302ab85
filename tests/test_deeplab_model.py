"""DeepLabV1: parameter count, shapes, the published head, and its loss against a pixel loop."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.deeplab import DeepLab, segmentation_loss
from models.resnet38 import ResNet38
from src.pipeline import DeepLabPipeline
from utils.config import Machine, MapConfig


class Stub(nn.Module):
    """A backbone of one convolution at stride 8."""
    stages, stride = ("first", "second", "third"), 8

    def __init__(self, last=24):
        super().__init__()
        self.conv = nn.Conv2d(3, last, 7, 8, padding=3)
        self.channels = {"first": last, "second": last, "third": last}

    def forward(self, x):
        return dict.fromkeys(self.stages, self.conv(x))

    def blocks(self):
        return [[self.conv]]


def brute_force(logits, target, ignore_index=255):
    """Mean cross-entropy by a loop over pixels, with align_corners bilinear sampling written out."""
    batch, _, h, w = logits.shape
    _, height, width = target.shape
    terms = []
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                label = int(target[b, row, column])
                if label == ignore_index:
                    continue
                y, x = row * (h - 1) / (height - 1), column * (w - 1) / (width - 1)
                y0, x0 = min(int(y), h - 2), min(int(x), w - 2)
                fy, fx = y - y0, x - x0
                corners = logits[b, :, y0:y0 + 2, x0:x0 + 2].double()
                weights = torch.tensor([[(1 - fy) * (1 - fx), (1 - fy) * fx], [fy * (1 - fx), fy * fx]]).double()
                scores = (corners * weights).sum(dim=(1, 2))
                terms.append(torch.logsumexp(scores, 0).item() - scores[label].item())
    return sum(terms) / len(terms)


def random_batch(classes=4, size=(9, 13), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, classes, 3, 4, generator=generator)
    target = torch.randint(0, classes, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return logits, target


def test_full_width_resnet38_deeplab_has_the_published_parameter_count():
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in DeepLab(ResNet38(), classes=21).parameters()) / 1e6
    assert abs(millions - 124.2) < 0.05, f"{millions:.2f} M parameters, 124.2 M published"


def test_head_has_the_published_names_sizes_and_dilation():
    with torch.device("meta"):
        head = DeepLab(ResNet38(), classes=21).head
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {
        "conv_fov.weight": (512, 4096, 3, 3), "bn_fov.weight": (512,), "bn_fov.bias": (512,),
        "conv_fov2.weight": (512, 512, 1, 1), "bn_fov2.weight": (512,), "bn_fov2.bias": (512,),
        "cls_conv.weight": (21, 512, 1, 1), "cls_conv.bias": (21,)}, f"{shapes}"
    assert head.conv_fov.dilation == head.conv_fov.padding == (12, 12), f"dilation {head.conv_fov.dilation}"
    assert head.dropout1.p == 0.5, f"dropout {head.dropout1.p}"


def test_mctformers_head_has_the_published_sizes_and_no_normalisation():
    with torch.device("meta"):
        model = DeepLab(ResNet38(), classes=21, head="mctformer")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.head.named_parameters()}
    assert shapes == {"conv_fov.weight": (512, 4096, 3, 3), "conv_fov.bias": (512,), "cls_conv.weight": (21, 512, 3, 3),
                      "cls_conv.bias": (21,)}, f"{shapes}"
    assert model.head.conv_fov.dilation == model.head.cls_conv.dilation == (12, 12), f"{model.head}"


def test_an_unknown_head_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'aspp'; choose from seamv1, mctformer"):
        DeepLab(Stub(), classes=3, head="aspp")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("merge", ["mean", "max"])
def test_scales_are_merged_as_published(merge, flip):
    torch.manual_seed(0)
    model, grid = DeepLab(Stub(), classes=3).eval(), (5, 7)
    views = [torch.randn(3, 33, 49), torch.randn(3, 65, 97)]
    payload, machine = {"networks": {}, "classes": []}, Machine(torch.device("cpu"))
    pipeline = DeepLabPipeline(payload, MapConfig(flip=flip), merge, machine)
    pipeline.deeplab = model
    found = pipeline.merged(views, grid)
    with torch.no_grad():
        maps = [model(view[None]) for view in views]
        maps += [model(view.flip(-1)[None]).flip(-1) for view in views if flip]
    stack = torch.cat([F.interpolate(one, size=grid, mode="bilinear", align_corners=True) for one in maps])
    expected = stack.mean(dim=0).softmax(dim=0) if merge == "mean" else stack.softmax(dim=1).amax(dim=0)
    gap = np.abs(found - (expected / expected.sum(dim=0)).numpy()).max()
    assert gap < 1e-6, f"{merge}, flip {flip}: differs by up to {gap:.1e}"


@pytest.mark.parametrize("size, grid", [((65, 97), (9, 13)), ((64, 71), (8, 9))])
def test_logits_lie_on_the_backbones_grid_at_odd_sizes(size, grid):
    model = DeepLab(ResNet38(width=0.05), classes=5).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size))
    assert tuple(logits.shape) == (2, 5, *grid), f"{tuple(logits.shape)}"


@pytest.mark.parametrize("last, hidden", [(24, 24), (512, 512), (2048, 512)])
def test_head_is_as_wide_as_the_backbone_but_at_most_512(last, hidden):
    with torch.device("meta"):
        width = DeepLab(Stub(last), classes=3).head.conv_fov.out_channels
    assert width == hidden, f"{width} channels behind a backbone of {last}, not {hidden}"


def test_dilation_and_dropout_can_be_set():
    head = DeepLab(Stub(), classes=3, dropout=0.1, dilation=6).head
    assert head.conv_fov.dilation == (6, 6) and head.dropout1.p == 0.1, f"{head.conv_fov.dilation} {head.dropout1.p}"


def test_one_image_equals_its_batch_in_eval_mode():
    torch.manual_seed(0)
    model, images = DeepLab(Stub(), classes=3).eval(), torch.randn(3, 3, 65, 97)
    with torch.no_grad():
        gap = (model(images)[1:2] - model(images[1:2])).abs().max().item()
    assert gap < 1e-5, f"differs by {gap:.2e}"


def test_classes_start_alike():
    torch.manual_seed(0)
    model = DeepLab(Stub(), classes=21)
    loss = segmentation_loss(model(torch.randn(2, 3, 65, 65)), torch.randint(0, 21, (2, 65, 65))).item()
    assert abs(loss - math.log(21)) < 0.1, f"first loss {loss:.3f}, log(21) = {math.log(21):.3f}"


def test_head_still_learns_when_the_backbone_is_frozen():
    model = DeepLab(Stub(), classes=3).freeze(blocks=1, bn="frozen").train()
    segmentation_loss(model(torch.randn(2, 3, 33, 33)), torch.randint(0, 3, (2, 33, 33))).backward()
    missing = [name for name, parameter in model.head.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    assert model.backbone.conv.weight.grad is None and model.head.bn_fov.training


@pytest.mark.parametrize("size", [(9, 13), (17, 25), (10, 11)])
def test_loss_matches_a_loop_over_pixels_with_ignored_ones(size):
    logits, target = random_batch(size=size)
    loss, expected = segmentation_loss(logits, target).item(), brute_force(logits, target)
    assert abs(loss - expected) < 1e-4, f"loss {loss:.6f}, pixel loop {expected:.6f}"


def test_ignored_pixels_do_not_weigh_on_the_mean():
    logits, target = random_batch()
    one, _ = random_batch(seed=1)
    ignored = torch.full_like(target, 255)
    both = segmentation_loss(torch.cat([logits, one]), torch.cat([target, ignored])).item()
    alone = segmentation_loss(logits, target).item()
    assert abs(both - alone) < 1e-5, f"{both:.6f} with a batch of ignored pixels, {alone:.6f} without"


def test_another_ignore_index_is_honoured():
    logits, target = random_batch()
    target[target == 255] = -1
    loss, expected = segmentation_loss(logits, target, ignore_index=-1).item(), brute_force(logits, target, -1)
    assert abs(loss - expected) < 1e-4, f"loss {loss:.6f}, pixel loop {expected:.6f}"


def test_a_batch_without_labels_gives_zero_and_a_zero_gradient():
    logits = random_batch()[0].requires_grad_()
    loss = segmentation_loss(logits, torch.full((2, 9, 13), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum().item() == 0, f"loss {loss.item()}, gradient {logits.grad}"


def test_loss_is_computed_in_float32():
    logits, target = random_batch()
    half = logits.bfloat16()
    loss, expected = segmentation_loss(half, target), segmentation_loss(half.float(), target)
    assert loss.dtype == torch.float32, f"{loss.dtype}"
    assert loss.item() == expected.item(), f"{loss.item()} from bfloat16, {expected.item()} from the same in float32"


@pytest.mark.parametrize("target", [torch.zeros(9, 13).long(), torch.zeros(1, 9, 13).long(),
                                    torch.zeros(2, 1, 9, 13).long()])
def test_a_target_that_does_not_fit_the_logits_is_refused(target):
    with pytest.raises(ValueError, match="with the same B"):
        segmentation_loss(torch.zeros(2, 4, 3, 4), target)
