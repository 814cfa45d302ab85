"""Backbones: the registry, ResNet's shapes and equality with torchvision, what stays frozen, and folding."""
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import efficientnet_lite
from models.backbone import BACKBONES, BackbonePlug, Network, build_backbone, for_inference, training_format
from models.resnet import ResNet
from models.weights.records import build_network
from src.split_map import network_threads
from utils.errors import UserError
from utils.parallel import in_threads
from utils.transforms import IMAGENET, Normalise

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
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_named_stages_have_their_channels_and_strides_at_odd_sizes(name, output_stride):
    height, width = 65, 97
    with SHAPES_ALONE:
        backbone = build_backbone(name, output_stride)
        maps = backbone(torch.empty(1, 3, height, width))
    assert tuple(maps) == backbone.stages == ("layer2", "layer3", "layer4"), tuple(maps)
    assert backbone.stride == output_stride, backbone.stride
    for stage, channels in zip(backbone.stages, CHANNELS[name]):
        stride = 8 if stage == "layer2" else output_stride
        expected = (1, channels, -(-height // stride), -(-width // stride))
        assert maps[stage].shape == expected, f"{stage}: {tuple(maps[stage].shape)}, not {expected}"
        assert backbone.channels[stage] == channels, f"{stage}: {backbone.channels[stage]} channels are announced"


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (32, 33)])
def test_grids_are_sides_divided_by_the_stride_and_rounded_up(size):
    for output_stride in (8, 16):
        with SHAPES_ALONE:
            maps = build_backbone("resnet18", output_stride)(torch.empty(1, 3, *size))
        for stage, stride in (("layer2", 8), ("layer4", output_stride)):
            expected = tuple(-(-side // stride) for side in size)
            assert maps[stage].shape[-2:] == expected, f"{stage} of {size}: {tuple(maps[stage].shape[-2:])}"


@pytest.mark.parametrize("output_stride, replaced", [(8, (False, True, True)), (16, (False, False, True))])
def test_a_dilated_resnet50_equals_torchvisions(output_stride, replaced):
    net = moved_statistics(torchvision.models.resnet50(weights=None, replace_stride_with_dilation=replaced)).eval()
    backbone = build_backbone("resnet50", output_stride).eval()
    backbone.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        found, expected = backbone(image()), torchvision_maps(net, image())
    for stage in backbone.stages:
        difference = (found[stage] - expected[stage]).abs().max() / expected[stage].abs().max()
        assert difference < 1e-5, f"{stage} at stride {output_stride} differs by {difference:.1e} of its maximum"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_up_to_layer2_nothing_differs_from_the_undilated_network(name):
    net = moved_statistics(getattr(torchvision.models, name)(weights=None)).eval()
    backbone = build_backbone(name, 8).eval()
    backbone.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        found, expected = backbone(image())["layer2"], torchvision_maps(net, image())["layer2"]
    assert torch.allclose(found, expected, atol=1e-5), f"differs by {(found - expected).abs().max():.1e}"


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_a_dilated_basic_block_looks_as_far_as_the_undilated_one(name):
    """Every other 3x3 after the lost stride has its dilation doubled: else the receptive field would shrink."""
    with SHAPES_ALONE:
        layer = build_backbone(name, 8).layer4
    dilations = [module.dilation[0] for block in layer for module in (block.conv1, block.conv2)]
    assert dilations == [2, 2] + [4] * (2 * len(layer) - 2), dilations


@pytest.mark.parametrize("name", CHANNELS)
def test_names_are_torchvisions_without_the_classifier(name):
    with SHAPES_ALONE:
        own = build_backbone(name).state_dict()
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    assert theirs.keys() - own.keys() == {"fc.weight", "fc.bias"} and not own.keys() - theirs.keys()
    different = [key for key in own if own[key].shape != theirs[key].shape]
    assert not different, f"other shapes: {different[:3]}"


def test_impossible_backbones_are_refused_with_the_choices():
    with pytest.raises(UserError, match="unknown backbone 'resnet5'; pass --backbone with one of resnet18, .*resnet38"):
        build_backbone("resnet5")
    with pytest.raises(ValueError, match="unknown ResNet 'resnet38'; choose from resnet18"):
        ResNet("resnet38")
    with pytest.raises(ValueError, match="output stride must be 8 or 16, not 32"):
        build_backbone("resnet18", 32)
    for name in ("resnet18", "efficientnet_lite2", "convnext_atto"):
        with pytest.raises(UserError, match=f"{name} has no other width than its own, not 0.5 times.*pass --width 1"):
            build_backbone(name, width=0.5)


def test_every_backbone_can_be_built_and_lists_all_its_parts_in_blocks():
    for name in BACKBONES:
        with SHAPES_ALONE:
            backbone = build_backbone(name)
        listed = {id(p) for block in backbone.blocks() for part in block for p in part.parameters()}
        missed = [key for key, p in backbone.named_parameters() if id(p) not in listed]
        assert not missed and len(backbone.stages) == 3, f"{name}: {missed[:3]} are in no block"
        expected = efficientnet_lite.PIXELS if name in efficientnet_lite.LITES else IMAGENET
        assert backbone.normalise == expected, f"{name}: {backbone.normalise}"


class Toy(nn.Module):
    """A backbone of three stride-2 stages, whose module is made by `stage(inputs, outputs)`."""
    stages, stride, normalise = ("a", "b", "c"), 8, Normalise((0.5,) * 3, (0.5,) * 3)

    def __init__(self, stage, output_stride=16, width=1.0, dilated=True):
        super().__init__()
        self.options = (output_stride, width, dilated)
        self.channels = dict(zip(self.stages, (4, 8, 16)))
        self.layers = nn.ModuleList(stage(inputs, outputs) for inputs, outputs in ((3, 4), (4, 8), (8, 16)))

    def forward(self, x):
        maps = {}
        for name, layer in zip(self.stages, self.layers):
            x = maps[name] = layer(x)
        return maps

    def blocks(self):
        return [[layer] for layer in self.layers]

    def pairs(self):
        return ()


class PreActivation(nn.Module):
    """bn1 takes the input and conv1 its output; its names are those of a block that normalises after convolving."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, inputs, 3, 2, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class LayerNormed(nn.Module):
    """A convolution and a layer normalisation over the channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 2, 2), nn.LayerNorm(outputs)

    def forward(self, x):
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_backbone_registered_in_one_line_is_built_with_the_options_by_name(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", BackbonePlug(partial(Toy, PreActivation)))
    backbone = build_backbone("toy", 8, dilated=False)
    assert backbone.options == (8, 1.0, False), backbone.options
    for kind, outputs in (("classifier", (2, 5)), ("affinity", (2, 448, 5, 7)), ("deeplab", (2, 6, 5, 7))):
        shape = build_network(kind, "toy", classes=5)(torch.randn(2, 3, 33, 49)).shape
        assert shape == outputs, f"{kind}: {tuple(shape)}, not {outputs}"


# --- freezing ------------------------------------------------------------------------------------------------------

class Mean(Network):
    """The smallest network on a backbone."""

    def forward(self, images):
        return self.backbone(images)["layer4"].mean()


def norms(network):
    return {name: module for name, module in network.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}


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
        network = Mean(build_backbone("resnet18"))
    assert network.freeze(blocks, bn, LOADED) is network
    assert network.eval() is network and network.train() is network and network.training
    for name, norm in norms(network).items():
        frozen = POLICIES[bn](name, blocks)
        assert norm.training != frozen, f"{name}: training is {norm.training} with bn={bn}, {blocks} blocks"
        assert norm.weight.requires_grad != frozen and norm.bias.requires_grad != frozen, f"{name} with bn={bn}"
    for name, module in network.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            learns = block_of(name) >= blocks
            assert module.weight.requires_grad == learns, f"{name} with {blocks} frozen blocks"
    assert not any(norm.training for norm in norms(network.eval()).values())


@pytest.mark.parametrize("bn", POLICIES)
def test_a_step_moves_what_learns_and_nothing_that_is_frozen(bn):
    network, blocks = Mean(build_backbone("resnet18")), 2
    network.freeze(blocks, bn, LOADED).train()
    before = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    network(torch.cat([image((33, 33)), image((33, 33), 1)])).backward()
    for name, parameter in network.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, f"{name}: gradient {parameter.grad is not None}"
    for name in norms(network):
        moved = not torch.equal(before[f"{name}.running_mean"], network.backbone.state_dict()[f"{name}.running_mean"])
        assert moved != POLICIES[bn](name, blocks), f"statistics of {name} moved: {moved}, with bn={bn}"


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_normalisation_of_any_kind_is_frozen(kind):
    network = Mean(Toy(lambda inputs, outputs: nn.Sequential(nn.Conv2d(inputs, outputs, 1), kind(outputs))))
    norms = [layer[1] for layer in network.backbone.layers]
    for bn, frozen in (("frozen", [True] * 3), ("train", [True, False, False]), ("auto", [True, False, True])):
        network.requires_grad_(True).freeze(1, bn, {"layers.2.1"}).train()
        found = [not norm.training and not norm.weight.requires_grad for norm in norms]
        assert found == frozen, f"bn={bn}: frozen {found}, not {frozen}"


@pytest.mark.parametrize("bn", POLICIES)
def test_layer_normalisation_is_left_to_learn_outside_the_frozen_blocks(bn):
    network = Mean(Toy(LayerNormed)).freeze(1, bn, {"layers.0.norm", "layers.1.norm"}).train()
    found = [layer.norm.weight.requires_grad for layer in network.backbone.layers]
    assert found == [False, True, True] and all(layer.norm.training for layer in network.backbone.layers), found


def test_an_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="policy 'off'; choose from auto, frozen, train"), SHAPES_ALONE:
        Mean(build_backbone("resnet18")).freeze(bn="off")


# --- folding -------------------------------------------------------------------------------------------------------

# (network, normalisations that stay: those that follow a sum)
NETWORKS = [({"kind": kind, "backbone": backbone, "classes": 3, "width": width, "head": head}, stay)
            for kind, backbone, width, head, stay in (
                ("classifier", "resnet18", 1, "seamv1", 0), ("affinity", "resnet50", 1, "seamv1", 0),
                ("classifier", "resnet38", 0.125, "seamv1", 18), ("deeplab", "resnet38", 0.125, "seamv1", 18),
                ("deeplab", "resnet38", 0.125, "mctformer", 18))]


def random_network(how):
    """A network in eval mode whose normalisations are far from the identity."""
    torch.manual_seed(0)
    network = build_network(**how).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2)):
                nn.init.uniform_(tensor, low, high)
    return network


def relative_gap(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("how, stay", NETWORKS)
@torch.no_grad()
def test_a_folded_network_gives_the_same_outputs(how, stay):
    network, x = random_network(how), torch.randn(2, 3, 65, 97)
    before = network(x)
    folded = for_inference(network)
    gap = relative_gap(folded(x), before)
    assert gap < 1e-5, f"differs by {gap:.1e} of the largest output"
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == stay, f"{len(left)} normalisations stay: {left[:3]}"
    assert not [name for name, parameter in folded.named_parameters() if parameter.requires_grad]


def test_a_network_in_training_mode_is_not_folded():
    with pytest.raises(ValueError, match="eval mode"):
        for_inference(build_network("classifier", "resnet18", classes=2))


@torch.no_grad()
def test_pre_activation_blocks_that_declare_no_pairs_are_left_exact(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", BackbonePlug(partial(Toy, PreActivation)))
    network, x = random_network({"kind": "classifier", "backbone": "toy", "classes": 3}), torch.randn(2, 3, 33, 49)
    before, weights = network(x), {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = for_inference(network)
    changed = [name for name, tensor in folded.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert not changed and folded.state_dict().keys() == weights.keys(), f"{len(changed)} tensors: {changed[:3]}"
    gap = relative_gap(folded(x), before)  # of another memory format alone
    assert gap < 1e-5, f"differs by {gap:.1e} of the largest output"
    monkeypatch.setattr(Toy, "pairs", lambda self: [(layer, "conv1", "bn1") for layer in self.layers])
    wrong = relative_gap(for_inference(network)(x), before)
    assert wrong > 0.1, f"paired by name it differs by {wrong:.1e} only: these blocks tell nothing"


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, partial(nn.BatchNorm2d, affine=False)])
def test_a_declared_pair_is_folded_once_whatever_its_names(norm):
    class Declared(Toy):
        def pairs(self):
            return ((layer, "first", "second") for layer in self.layers)

    def stage(inputs, outputs):
        return nn.Sequential(OrderedDict(first=nn.Conv2d(inputs, outputs, 3, 2, padding=1), second=norm(outputs)))

    torch.manual_seed(0)
    network, x = Mean(moved_statistics(Declared(stage))).eval(), torch.randn(2, 3, 33, 49)
    before = network.backbone(x)["c"]
    for _ in range(2):
        gap = relative_gap(for_inference(network).backbone(x)["c"], before)
        assert gap < 1e-5, f"differs by {gap:.1e} of the largest output"
        assert all(isinstance(layer.second, nn.Identity) for layer in network.backbone.layers)


@pytest.mark.parametrize("name, precision, device, expected", [
    ("resnet38", "fp32", "cpu", torch.contiguous_format), ("resnet38", "bf16", "cpu", torch.channels_last),
    ("resnet38", "fp32", "cuda", torch.channels_last), ("resnet18", "fp32", "cpu", torch.channels_last),
    ("efficientnet_lite0", "fp32", "cpu", torch.channels_last)])
def test_a_network_trains_in_the_memory_format_that_was_measured_to_be_fastest(name, precision, device, expected):
    with torch.device("meta"):
        network = Network(build_backbone(name))
    assert training_format(network, torch.device(device), precision) == expected


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "resnet38"])
def test_a_backbone_that_threads_share_gives_each_the_maps_of_its_own_image(name):
    torch.manual_seed(0)
    net = for_inference(build_backbone(name, **({"width": 0.125} if name == "resnet38" else {})).eval())
    images = [torch.randn(1, 3, 33 + 16 * (i % 3), 65) for i in range(12)]

    def maps(image):
        with torch.no_grad():
            return net(image)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [maps(image) for image in images]
    finally:
        torch.set_num_threads(before)
    assert net.reentrant
    for i, (one, other) in enumerate(zip(alone, in_threads(maps, images, 4), strict=True)):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), f"image {i}"


def test_networks_are_run_at_once_on_cpus_alone_and_only_if_they_keep_nothing():
    net, cpu, before = build_backbone("resnet18"), torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = network_threads(net, cpu), network_threads(net, torch.device("cuda")), network_threads(net.layer1, cpu)
    finally:
        torch.set_num_threads(before)
    assert found == (2, 1, 1), found
