"""Grouped convolutions on CPUs: outputs and gradients against float64 by autograd, in every geometry and memory format.
"""
import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from models.grouped import speed_up

CASES = [  # channels in, channels out, groups, side of the kernel, further options
    ("depthwise", 6, 6, 6, 3, {"padding": 1}),
    ("depthwise, dilated", 6, 6, 6, 5, {"padding": 4, "dilation": 2}),
    ("depthwise, strided", 6, 6, 6, 5, {"padding": 2, "stride": 2}),
    ("depthwise, without padding", 6, 6, 6, 3, {}),
    ("depthwise, padded beyond its kernel", 6, 6, 6, 3, {"padding": 4}),
    ("depthwise, oblong", 6, 6, 6, (3, 5), {"padding": (1, 2), "dilation": (1, 2)}),
    ("two outputs a channel", 6, 12, 6, 3, {"padding": 1}),
    ("groups", 12, 8, 4, 3, {"padding": 2, "dilation": 2}),
    ("groups, strided", 12, 8, 4, 3, {"padding": 1, "stride": 2})]


def gradients(conv: nn.Conv2d, x: torch.Tensor, half: bool = False) -> dict[str, torch.Tensor]:
    """The output of a convolution, and the gradients of a sum of its squares."""
    conv.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        out = conv(x)
    out.to(x.dtype).square().sum().backward()
    found = {"output": out.detach(), "input": x.grad, "weight": conv.weight.grad}
    return found if conv.bias is None else {**found, "bias": conv.bias.grad}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two tensors, in norms of the second."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_outputs_and_gradients_of_grouped_convolutions_are_those_of_float64(case, kind, half):
    _, inputs, outputs, groups, kernel, options = case
    conv = kind(inputs, outputs, kernel, groups=groups, **options)
    x = torch.randn(2, inputs, 13, 17)
    exact = gradients(copy.deepcopy(conv).double(), x.double())
    speed_up(conv)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = gradients(conv, x.contiguous(memory_format=layout), half)
        assert found["output"].dtype is (torch.bfloat16 if half else torch.float32)
        for name, tensor in found.items():
            gap = off(tensor, exact[name])
            assert gap < (0.02 if half else 1e-5), f"{name}, {layout}: off by {gap:.2g} of its norm"


def test_only_the_gradients_that_are_asked_for_are_computed():
    for part in ("x", "weight", "bias"):
        conv, x = nn.Conv2d(4, 4, 3, padding=1, groups=4).requires_grad_(False), torch.randn(1, 4, 9, 9)
        speed_up(conv)
        asked = {"x": x, "weight": conv.weight, "bias": conv.bias}
        assert not conv(x).requires_grad
        asked[part].requires_grad_()
        conv(x).sum().backward()
        assert [name for name, tensor in asked.items() if tensor.grad is not None] == [part]


def test_convolutions_keep_their_names_and_weights_and_others_are_left_alone():
    network = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8,
                                                                                     padding_mode="reflect"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    types = [type(module) for module in network]
    speed_up(network)
    assert [type(module) is kind for module, kind in zip(network, types)] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
