"""ResNet trunks: shapes, equality with torchvision, and what stays frozen."""
import pytest
import torch
import torchvision
from torch import nn

from models.resnet import ResNet
from models.trunk import BACKBONES, Network, build_trunk

CHANNELS = {"resnet18": (128, 256, 512), "resnet34": (128, 256, 512), "resnet50": (512, 1024, 2048),
            "resnet101": (512, 1024, 2048)}


SHAPES_ALONE = torch.device("meta")  # tensors without values: what is asked there is their shapes and names


def image(size=(65, 97), seed=0):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def torchvision_maps(net, x):
    """Outputs of layer2, layer3 and layer4 of a torchvision ResNet."""
    x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
    maps = {}
    for name in ("layer2", "layer3", "layer4"):
        x = maps[name] = getattr(net, name)(x)
    return maps


def moved_statistics(network):
    """Batch-norm statistics as after training, so that equality is not one of fresh layers alone."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_named_stages_have_their_channels_and_strides_at_odd_sizes(name, output_stride):
    height, width = 65, 97
    with SHAPES_ALONE:
        trunk = build_trunk(name, output_stride)
        maps = trunk(torch.empty(1, 3, height, width))
    assert tuple(maps) == trunk.stages == ("layer2", "layer3", "layer4"), tuple(maps)
    assert trunk.stride == output_stride, trunk.stride
    for stage, channels in zip(trunk.stages, CHANNELS[name]):
        stride = 8 if stage == "layer2" else output_stride
        expected = (1, channels, -(-height // stride), -(-width // stride))
        assert maps[stage].shape == expected, f"{stage}: {tuple(maps[stage].shape)}, not {expected}"
        assert trunk.channels[stage] == channels, f"{stage}: {trunk.channels[stage]} channels are announced"


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (32, 33)])
def test_grids_are_sides_divided_by_the_stride_and_rounded_up(size):
    for output_stride in (8, 16):
        with SHAPES_ALONE:
            maps = build_trunk("resnet18", output_stride)(torch.empty(1, 3, *size))
        for stage, stride in (("layer2", 8), ("layer4", output_stride)):
            expected = tuple(-(-side // stride) for side in size)
            assert maps[stage].shape[-2:] == expected, f"{stage} of {size}: {tuple(maps[stage].shape[-2:])}"


@pytest.mark.parametrize("output_stride, replaced", [(8, (False, True, True)), (16, (False, False, True))])
def test_a_dilated_resnet50_equals_torchvisions(output_stride, replaced):
    net = moved_statistics(torchvision.models.resnet50(weights=None, replace_stride_with_dilation=replaced)).eval()
    trunk = build_trunk("resnet50", output_stride).eval()
    trunk.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        found, expected = trunk(image()), torchvision_maps(net, image())
    for stage in trunk.stages:
        difference = (found[stage] - expected[stage]).abs().max() / expected[stage].abs().max()
        assert difference < 1e-5, f"{stage} at stride {output_stride} differs by {difference:.1e} of its maximum"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_up_to_layer2_nothing_differs_from_the_undilated_network(name):
    net = moved_statistics(getattr(torchvision.models, name)(weights=None)).eval()
    trunk = build_trunk(name, 8).eval()
    trunk.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        found, expected = trunk(image())["layer2"], torchvision_maps(net, image())["layer2"]
    assert torch.allclose(found, expected, atol=1e-5), f"differs by {(found - expected).abs().max():.1e}"


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_a_dilated_basic_block_looks_as_far_as_the_undilated_one(name):
    """Every other 3x3 after the lost stride has its dilation doubled: else the receptive field would shrink."""
    with SHAPES_ALONE:
        layer = build_trunk(name, 8).layer4
    dilations = [module.dilation[0] for block in layer for module in (block.conv1, block.conv2)]
    assert dilations == [2, 2] + [4] * (2 * len(layer) - 2), dilations


@pytest.mark.parametrize("name", CHANNELS)
def test_names_are_torchvisions_without_the_classifier(name):
    with SHAPES_ALONE:
        own = build_trunk(name).state_dict()
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    assert theirs.keys() - own.keys() == {"fc.weight", "fc.bias"} and not own.keys() - theirs.keys()
    different = [key for key in own if own[key].shape != theirs[key].shape]
    assert not different, f"other shapes: {different[:3]}"


def test_impossible_trunks_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown backbone 'vgg16'; choose from .*resnet38"):
        build_trunk("vgg16")
    with pytest.raises(ValueError, match="unknown ResNet 'resnet38'; choose from resnet18"):
        ResNet("resnet38")
    with pytest.raises(ValueError, match="output stride must be 8 or 16, not 32"):
        build_trunk("resnet18", 32)


def test_every_backbone_can_be_built_and_lists_all_its_parts_in_blocks():
    for name in BACKBONES:
        with SHAPES_ALONE:
            trunk = build_trunk(name, width=0.125)
        listed = {id(p) for block in trunk.blocks() for part in block for p in part.parameters()}
        missed = [key for key, p in trunk.named_parameters() if id(p) not in listed]
        assert not missed and len(trunk.stages) == 3, f"{name}: {missed[:3]} are in no block"


# --- freezing ------------------------------------------------------------------------------------------------------

class Mean(Network):
    """The smallest network on a trunk."""

    def forward(self, images):
        return self.trunk(images)["layer4"].mean()


def norms(network):
    return {name: module for name, module in network.trunk.named_modules() if isinstance(module, nn.BatchNorm2d)}


def block_of(name):
    return 0 if name in ("conv1", "bn1") else int(name.split(".")[0].removeprefix("layer"))


LOADED = {"bn1", "layer1.0.bn1", "layer3.1.bn2"}
POLICIES = {
    "frozen": lambda name, blocks: True,
    "train": lambda name, blocks: block_of(name) < blocks,
    "auto": lambda name, blocks: block_of(name) < blocks or name in LOADED,
}


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_frozen_parts_stay_frozen_whatever_train_is_told(bn, blocks):
    with SHAPES_ALONE:
        network = Mean(build_trunk("resnet18"))
    assert network.freeze(blocks, bn, LOADED) is network
    assert network.eval() is network and network.train() is network and network.training
    for name, norm in norms(network).items():
        frozen = POLICIES[bn](name, blocks)
        assert norm.training != frozen, f"{name}: training is {norm.training} with bn={bn}, {blocks} blocks"
        assert norm.weight.requires_grad != frozen and norm.bias.requires_grad != frozen, f"{name} with bn={bn}"
    for name, module in network.trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            learns = block_of(name) >= blocks
            assert module.weight.requires_grad == learns, f"{name} with {blocks} frozen blocks"
    assert not any(norm.training for norm in norms(network.eval()).values())


@pytest.mark.parametrize("bn", POLICIES)
def test_a_step_moves_what_learns_and_nothing_that_is_frozen(bn):
    network, blocks = Mean(build_trunk("resnet18")), 2
    network.freeze(blocks, bn, LOADED).train()
    before = {name: tensor.clone() for name, tensor in network.trunk.state_dict().items()}
    network(torch.cat([image((33, 33)), image((33, 33), 1)])).backward()
    for name, parameter in network.trunk.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, f"{name}: gradient {parameter.grad is not None}"
    for name in norms(network):
        moved = not torch.equal(before[f"{name}.running_mean"], network.trunk.state_dict()[f"{name}.running_mean"])
        assert moved != POLICIES[bn](name, blocks), f"statistics of {name} moved: {moved}, with bn={bn}"


def test_an_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="policy 'off'; choose from auto, frozen, train"):
        with SHAPES_ALONE:
            Mean(build_trunk("resnet18")).freeze(bn="off")
