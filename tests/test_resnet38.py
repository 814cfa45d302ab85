"""Wide-ResNet38: PSA's names and sizes, strides, dilations, width, and a sound start from scratch."""
import pytest
import torch
from torch import nn

from models.resnet38 import ResNet38, scale_channels

# Facts of PSA's published network (network/resnet38d.py).
BLOCKS = ["b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2", "b4", "b4_1", "b4_2", "b4_3", "b4_4", "b4_5",
          "b5", "b5_1", "b5_2", "b6", "b7"]
PROJECTED = ("b2", "b3", "b4", "b5", "b6", "b7")
BOTTLENECKS = ("b6", "b7")
CONV_SHAPES = {
    "conv1a": (64, 3, 3), "b2.conv_branch2a": (128, 64, 3), "b3_2.conv_branch2b1": (256, 256, 3),
    "b4.conv_branch1": (512, 256, 1), "b4_5.conv_branch2a": (512, 512, 3), "b5.conv_branch2a": (512, 512, 3),
    "b5.conv_branch2b1": (1024, 512, 3), "b5_1.conv_branch2a": (512, 1024, 3), "b6.conv_branch2a": (512, 1024, 1),
    "b6.conv_branch2b1": (1024, 512, 3), "b6.conv_branch2b2": (2048, 1024, 1), "b7.conv_branch2a": (1024, 2048, 1),
    "b7.conv_branch2b1": (2048, 1024, 3), "b7.conv_branch2b2": (4096, 2048, 1), "b7.conv_branch1": (4096, 2048, 1),
}


def psa_names():
    modules = ["conv1a", "bn7"]
    for block in BLOCKS:
        parts = ["bn_branch2a", "conv_branch2a", "bn_branch2b1", "conv_branch2b1"]
        parts += ["conv_branch1"] if block in PROJECTED else []
        parts += ["bn_branch2b2", "conv_branch2b2"] if block in BOTTLENECKS else []
        modules += [f"{block}.{part}" for part in parts]
    tensors = {"conv": ["weight"], "bn": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]}
    return {f"{module}.{tensor}" for module in modules
            for tensor in tensors["bn" if module.split(".")[-1].startswith("bn") else "conv"]}


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return ResNet38()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return ResNet38(width=0.0625)


@pytest.mark.parametrize("width", [1.0, 0.25, 0.01])
def test_state_dict_names_are_those_of_psa_at_every_width(width):
    with torch.device("meta"):
        names = set(ResNet38(width).state_dict())
    difference = names ^ psa_names()
    assert not difference, f"width {width}: {len(difference)} names differ, such as {sorted(difference)[:5]}"
    assert len(names) == 228, f"{len(names)} tensors, PSA's network has 228"


def test_convolutions_have_the_published_sizes(full):
    for name, (outputs, inputs, kernel) in CONV_SHAPES.items():
        shape = tuple(full.get_submodule(name).weight.shape)
        assert shape == (outputs, inputs, kernel, kernel), f"{name} is {shape}, not {(outputs, inputs, kernel, kernel)}"


def test_strides_and_dilations_are_the_published_ones(full):
    strided, dilations = set(), {}
    for name, module in full.named_modules():
        if isinstance(module, nn.Conv2d):
            strided |= {name} if module.stride != (1, 1) else set()
            dilations[name] = module.dilation[0]
            same = module.dilation[0] * (module.kernel_size[0] // 2)
            assert module.padding == (same, same), f"{name} pads {module.padding}, its kernel reaches {same}"
    expected = {f"{block}.{conv}" for block in ("b2", "b3", "b4") for conv in ("conv_branch2a", "conv_branch1")}
    assert strided == expected, f"strided: {sorted(strided)}"
    dilated = {name: dilation for name, dilation in dilations.items() if dilation > 1}
    assert dilated == {"b5.conv_branch2b1": 2, "b5_1.conv_branch2a": 2, "b5_1.conv_branch2b1": 2,
                       "b5_2.conv_branch2a": 2, "b5_2.conv_branch2b1": 2,
                       "b6.conv_branch2b1": 4, "b7.conv_branch2b1": 4}, f"dilated: {dilated}"


def test_dropout_rates_are_the_published_ones(full):
    rates = {name: module.p for name, module in full.named_modules() if isinstance(module, nn.Dropout2d)}
    expected = {"b6.dropout_2b1": 0.3, "b6.dropout_2b2": 0.3, "b7.dropout_2b1": 0.5, "b7.dropout_2b2": 0.5}
    assert rates == expected, f"dropout: {rates}"


@pytest.mark.parametrize("size, grid", [((65, 97), (9, 13)), ((64, 96), (8, 12)), ((33, 70), (5, 9))])
def test_maps_lie_on_the_stride_8_grid_at_odd_sizes(small, size, grid):
    with torch.no_grad():
        maps = small.eval()(torch.randn(2, 3, *size))
    assert tuple(maps) == small.stages, f"maps {tuple(maps)}"
    for stage, features in maps.items():
        expected = (2, small.channels[stage], *grid)
        assert tuple(features.shape) == expected, f"{stage} is {tuple(features.shape)}, not {expected}"
        assert features.min() >= 0, f"{stage} is not activated: minimum {features.min():.3f}"
    assert small.stride == 8


def test_named_maps_are_the_activated_inputs_of_b5_and_b6_and_the_output_of_b7(small):
    seen = {}
    small.eval()
    for name in ("b5", "b6"):
        getattr(small, name).bn_branch2a.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.clone()}))
    small.bn7.register_forward_hook(lambda module, inputs, output: seen.update(bn7=output.clone()))
    with torch.no_grad():
        maps = small(torch.randn(1, 3, 33, 41))
    for stage, expected in zip(small.stages, (seen["b5"], seen["b6"], seen["bn7"])):
        gap = (maps[stage] - expected.relu()).abs().max().item()
        assert gap == 0, f"{stage} differs by up to {gap:.2e}"


def test_blocks_without_projection_pass_their_input_on(small):
    torch.nn.init.zeros_(small.b4_1.conv_branch2b1.weight)
    x = torch.randn(2, small.channels["conv4"], 5, 7)
    kept, out = x.clone(), small.b4_1(x)
    assert torch.equal(out, kept), f"changed by up to {(out - kept).abs().max():.2e}"
    assert torch.equal(x, kept), "the block overwrote its input"


def test_blocks_cover_every_parameter_once_in_order_of_depth(full):
    blocks = full.blocks()
    assert [len(block) for block in blocks] == [1, 3, 3, 6, 3, 1, 2], f"{[len(block) for block in blocks]}"
    assert blocks[0] == [full.conv1a] and blocks[-1] == [full.b7, full.bn7] and blocks[3][-1] is full.b4_5
    listed = [id(parameter) for block in blocks for module in block for parameter in module.parameters()]
    everything = [id(parameter) for parameter in full.parameters()]
    assert sorted(listed) == sorted(everything), f"{len(listed)} listed, {len(everything)} in the network"


@pytest.mark.parametrize("width, channels", [(1.0, (512, 1024, 4096)), (0.25, (128, 256, 1024)), (0.1, (48, 104, 408))])
def test_width_scales_the_channels(width, channels):
    with torch.device("meta"):
        backbone = ResNet38(width)
    assert tuple(backbone.channels.values()) == channels, f"width {width}: {backbone.channels}"
    assert backbone.conv1a.out_channels == scale_channels(64, width)


def test_channels_are_multiples_of_8_and_at_least_8():
    scaled = {width: scale_channels(64, width) for width in (0.001, 0.1, 0.3, 0.5, 2.0)}
    assert scaled == {0.001: 8, 0.1: 8, 0.3: 16, 0.5: 32, 2.0: 128}, f"{scaled}"


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match="width must be positive"):
        ResNet38(width)


def test_activations_and_gradients_keep_their_scale_at_depth(small):
    deviations = {}
    for name in ("b2", "b4_5", "b5_2", "b7"):
        getattr(small, name).register_forward_hook(
            lambda module, inputs, output, name=name: deviations.update({name: output.std().item()}))
    features = small.train()(torch.randn(4, 3, 65, 65))["conv6"]
    assert all(0.5 < deviation < 4 for deviation in deviations.values()), f"deviations {deviations}"
    (features * torch.randn_like(features)).sum().backward()
    shallow, deep = (block.conv_branch2a.weight.grad.norm().item() for block in (small.b2, small.b7))
    assert 1 / 30 < shallow / deep < 30, f"gradient norms: b2 {shallow:.3g}, b7 {deep:.3g}"
