"""Files of weights: what they are, what is loaded and reported, export and back, and every file that is refused."""
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from script_runs import ROOT, environment, finish
from test_mxnet_params import file_bytes
from torch import nn

from models.backbone import BACKBONES, BackbonePlug, build_backbone
from models.weights import Weights, check_pretrained, describe, export, load_model, load_pretrained, open_weights
from models.weights.__main__ import main
from models.weights.published import EXPORTS, from_mxnet
from models.weights.records import build_network, outline, pack, unpack, upgrade
from utils.checkpoint import FORMAT, OLD_FORMAT, load_checkpoint, save_checkpoint, save_tensors
from utils.errors import UserError
from utils.transforms import IMAGENET


@pytest.fixture(scope="module")
def published():
    """A state dict as torchvision publishes them."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.fixture
def backbone():
    torch.manual_seed(1)
    return build_backbone("resnet18")


def refusal(backbone, name, source):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_pretrained(backbone, name, str(source))
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"{len(changed)} tensors changed although the file was refused"
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


def test_a_published_state_dict_loads_and_its_classifier_is_ignored(tmp_path, published, backbone):
    torch.save(published, tmp_path / "w.pth")
    loaded, line = load_pretrained(backbone, "resnet18", str(tmp_path / "w.pth"))
    different = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, published[name])]
    assert not different, f"{len(different)} tensors were not loaded: {different[:3]}"
    assert loaded == {name.rsplit(".", 1)[0] for name in backbone.state_dict()}, len(loaded)
    assert "torchvision ResNet-18, into resnet18" in line and "random" not in line, line
    assert f"{len(backbone.state_dict())} loaded: bn1, conv1, layer1" in line and "2 ignored: fc" in line, line


def test_half_precision_and_a_missing_layer4_load_and_are_reported(tmp_path, published, backbone):
    part = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in published.items()
            if not name.startswith(("layer4", "fc"))}
    torch.save(part, tmp_path / "w.pth")
    fresh = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    loaded, line = load_pretrained(backbone, "resnet18", str(tmp_path / "w.pth"))
    for name, tensor in backbone.state_dict().items():
        expected = part.get(name, fresh[name]).to(fresh[name].dtype)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert "layer3.1.bn2" in loaded and not [name for name in loaded if name.startswith("layer4")]
    random = [name for name in fresh if name.startswith("layer4") and not name.endswith("num_batches_tracked")]
    assert f"{len(random)} missing, stay random: layer4" in line and "ignored" not in line, line


def test_a_layer_that_was_not_loaded_learns_its_statistics(tmp_path, published):
    part = {name: tensor for name, tensor in published.items() if not name.startswith("layer4")}
    torch.save(part, tmp_path / "w.pth")
    network = build_network("classifier", "resnet18", classes=2)
    loaded, _ = load_pretrained(network.backbone, "resnet18", str(tmp_path / "w.pth"))
    network.freeze(0, "auto", loaded).train()
    found = {name: getattr(network.backbone, name)[0].bn1.training for name in ("layer1", "layer3", "layer4")}
    assert found == {"layer1": False, "layer3": False, "layer4": True}, found


def test_none_loads_nothing_and_says_so(backbone):
    before = backbone.conv1.weight.clone()
    loaded, line = load_pretrained(backbone, "resnet18", "none")
    assert loaded == set() and line == "resnet18 starts from random weights", (loaded, line)
    assert torch.equal(backbone.conv1.weight, before)


@pytest.mark.parametrize("kind", ["classifier", "affinity", "deeplab"])
def test_our_own_checkpoint_serves_as_initial_weights(tmp_path, backbone, kind):
    network = build_network(kind, "resnet18", classes=3)
    record = pack(network, kind=kind, backbone="resnet18", classes=3)
    save_checkpoint(tmp_path / "c.pth.tar", {"step": "any", "networks": {kind: record}})
    loaded, line = load_pretrained(backbone, "resnet18", str(tmp_path / "c.pth.tar"))
    own = network.backbone.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in backbone.state_dict().items())
    assert len(loaded) > 30 and "checkpoint of this project" in line and "random" not in line, line


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, backbone):
    network = build_network("classifier", "resnet38", width=0.125, classes=2)
    record = pack(network, kind="classifier", backbone="resnet38", width=0.125, classes=2)
    save_checkpoint(tmp_path / "c.pth.tar", {"step": "stage1", "networks": {"classifier": record}})
    text = refusal(backbone, "resnet18", tmp_path / "c.pth.tar")
    assert "holds weights of resnet38" in text and "pass --backbone resnet38" in text, text


@pytest.mark.parametrize("content", [{}, {"encoder.weight": torch.ones(2)}])
def test_a_file_of_unknown_names_is_refused_with_what_is_known(tmp_path, backbone, content):
    torch.save(content, tmp_path / "w.pth")
    text = refusal(backbone, "resnet18", tmp_path / "w.pth")
    assert f"none of the known files of weights ({len(content)} tensors" in text and "PSA ResNet38" in text, text


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": [1]}, {"epoch": 3}, {3: torch.ones(2)},
                                     torch.ones(2)])
def test_a_file_that_is_no_dict_of_tensors_is_refused(tmp_path, backbone, content):
    torch.save(content, tmp_path / "w.pth")
    text = refusal(backbone, "resnet18", tmp_path / "w.pth")
    assert "is not a dict of tensors" in text and "pass a state dict" in text, text


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_weights_are_found_where_training_code_puts_them(tmp_path, published, backbone, key):
    parallel = {f"module.{name}": tensor for name, tensor in published.items()}
    torch.save({key: parallel, "epoch": 3}, tmp_path / "w.pth")
    load_pretrained(backbone, "resnet18", str(tmp_path / "w.pth"))
    assert torch.equal(backbone.conv1.weight, published["conv1.weight"])


def test_another_shape_is_refused_with_the_tensors_name(tmp_path, published, backbone):
    torch.save({**published, "layer2.0.conv1.weight": torch.ones(4, 4, 1, 1)}, tmp_path / "w.pth")
    text = refusal(backbone, "resnet18", tmp_path / "w.pth")
    assert "layer2.0.conv1.weight is (4, 4, 1, 1), but the network has (128, 64, 3, 3)" in text, text
    assert "pass weights of this backbone and width" in text, text


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_of_weights_is_refused_and_not_run(tmp_path, backbone):
    torch.save({"conv1.weight": backbone.conv1.weight, "trap": Trap(tmp_path / "ran")}, tmp_path / "w.pth")
    text = refusal(backbone, "resnet18", tmp_path / "w.pth")
    assert "could run code" in text and "plain tensors" in text, text
    assert not (tmp_path / "ran").exists(), "loading the weights ran their code"


def test_a_truncated_or_missing_file_is_refused(tmp_path, published, backbone):
    path = tmp_path / "w.pth"
    torch.save({name: tensor for name, tensor in published.items() if name.startswith("layer1")}, path)
    whole = path.read_bytes()
    for share in (0, 0.3, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        text = refusal(backbone, "resnet18", path)
        assert "damaged" in text, f"the first {share:.0%}: {text}"
    path.unlink()
    assert "no checkpoint" in refusal(backbone, "resnet18", path)


def test_imagenet_weights_of_resnet38_are_refused_with_both_remedies(backbone):
    text = refusal(backbone, "resnet38", "imagenet")
    assert "--pretrained PATH" in text and "--pretrained none" in text, text


def test_a_failed_download_names_the_address_and_both_remedies(monkeypatch, backbone):
    def offline(url, **_):
        raise OSError("no route to host")
    monkeypatch.setattr("models.resnet.load_state_dict_from_url", offline)
    text = refusal(backbone, "resnet18", "imagenet")
    for part in ("no route to host", "https://download.pytorch.org", "--pretrained PATH", "--pretrained none"):
        assert part in text, f"{part!r} not in {text!r}"


def test_imagenet_weights_are_torchvisions_first_version(monkeypatch, published, backbone):
    asked = []
    monkeypatch.setattr("models.resnet.load_state_dict_from_url", lambda url, **_: asked.append(url) or published)
    load_pretrained(backbone, "resnet18", "imagenet")
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url], asked
    assert torch.equal(backbone.conv1.weight, published["conv1.weight"])


class Toy(nn.Module):
    """A backbone of one convolution, whose output is scaled by a buffer that is in no file."""
    stages, stride, normalise = ("a", "b", "c"), 8, IMAGENET

    def __init__(self, output_stride=16, width=1.0, dilated=True):
        super().__init__()
        self.channels = dict.fromkeys(self.stages, 8)
        self.conv, self.bn = nn.Conv2d(3, 8, 9, 8, padding=4), nn.BatchNorm2d(8)
        self.register_buffer("scale", torch.full((8, 1, 1), 0.25), persistent=False)

    def forward(self, images):
        return dict.fromkeys(self.stages, self.bn(self.conv(images)) * self.scale)

    def blocks(self):
        return [[self.conv, self.bn]]

    def pairs(self):
        return [(self, "conv", "bn")]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", BackbonePlug(Toy))
    return build_backbone("toy")


def test_a_backbone_without_imagenet_weights_says_so_with_both_remedies(toy):
    text = refusal(toy, "toy", "imagenet")
    assert text == "no ImageNet weights of toy can be fetched; pass --pretrained PATH or --pretrained none", text


def test_imagenet_weights_come_from_where_the_backbone_was_registered_with(monkeypatch, toy):
    state = Toy().state_dict()
    plug = BackbonePlug(Toy, lambda: ("https://x/toy.pth", {**state, "fc.bias": state["bn.bias"]}))
    monkeypatch.setitem(BACKBONES, "toy", plug)
    loaded, line = load_pretrained(toy, "toy", "imagenet")
    assert loaded == {"conv", "bn"} and torch.equal(toy.conv.weight, state["conv.weight"]), loaded
    assert "https://x/toy.pth: ImageNet weights, into toy" in line and "1 ignored: fc" in line, line


def test_a_backbone_of_no_published_layout_loads_a_state_dict_by_its_own_names(tmp_path, toy):
    state = Toy().state_dict()
    whole = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    save_tensors(tmp_path / "w.pth", {**whole, "head.weight": torch.ones(2)})
    check_pretrained(str(tmp_path / "w.pth"), "toy")
    loaded, line = load_pretrained(toy, "toy", str(tmp_path / "w.pth"))
    assert loaded == {"conv", "bn"} and torch.equal(toy.conv.weight, state["conv.weight"]), loaded
    assert "state dict of toy, into toy" in line and "1 ignored: head" in line and "random" not in line, line
    save_tensors(tmp_path / "w.pth", {name: tensor for name, tensor in whole.items() if name != "bn.weight"})
    assert "none of the known files of weights" in refusal(toy, "toy", tmp_path / "w.pth")
    with pytest.raises(UserError, match="none of the known files of weights"):
        check_pretrained(str(tmp_path / "w.pth"), "toy")


def test_a_file_of_a_larger_resnet_is_not_read_as_a_smaller_ones(tmp_path, backbone):
    """All names of ResNet-18 are among those of ResNet-34, at the same shapes."""
    save_tensors(tmp_path / "w.pth", torchvision.models.resnet34(weights=None).state_dict())
    assert "holds weights of resnet34" in refusal(backbone, "resnet18", tmp_path / "w.pth")


RANK = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_weights import BACKBONES, BackbonePlug, Toy, UserError, load_pretrained
from utils import distributed

def imagenet():
    if distributed.is_main():
        time.sleep(0.5)
        Path("cache").touch()
    elif not Path("cache").exists():
        print("rank 1 came first", file=sys.__stdout__)
    if distributed.rank() == {failing}:
        raise UserError(f"rank {failing} is offline")
    return "address", Toy().state_dict()

distributed.start()
BACKBONES["toy"] = BackbonePlug(Toy, imagenet)
try:
    loaded = len(load_pretrained(Toy(), "toy", "imagenet")[0])
    print(f"loaded {{loaded}}", file=sys.__stdout__, flush=True)
except UserError as error:
    print(error, file=sys.__stdout__, flush=True)
distributed.stop()
"""


@pytest.mark.parametrize("failing, said", [(0, "rank 0 is offline\n"), (1, "rank 1 is offline\n"), (-1, "loaded 2\n")])
def test_all_ranks_get_imagenet_weights_or_all_refuse_and_rank_0_fetches_them_first(tmp_path, failing, said):
    code = RANK.format(root=str(ROOT), tests=str(ROOT / "tests"), failing=failing)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {**environment(tmp_path), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(2)]
    done = [finish(process) for process in started]
    assert [one.stdout for one in done] == [said, said], [(one.stdout, one.stderr[-1000:]) for one in done]


# --- published files and export -------------------------------------------------------------------------------------

NETWORKS = {  # family -> how to build networks that it names
    "psa classifier": {"kind": "classifier", "backbone": "resnet38", "width": 0.125, "output_stride": 8, "classes": 3},
    "psa affinity": {"kind": "affinity", "backbone": "resnet38", "width": 0.125, "output_stride": 8, "classes": 0},
    "seamv1 deeplab": {"kind": "deeplab", "backbone": "resnet38", "width": 0.125, "output_stride": 8, "classes": 3},
    "mctformer deeplab": {"kind": "deeplab", "backbone": "resnet38", "width": 0.125, "output_stride": 8, "classes": 3,
                          "head": "mctformer"},
    "irn classifier": {"kind": "classifier", "backbone": "resnet50", "output_stride": 16, "dilated": False,
                       "classes": 3},
}
TITLES = {"psa classifier": "PSA ResNet38 classifier", "psa affinity": "PSA ResNet38 AffinityNet",
          "seamv1 deeplab": "DeepLabV1-ResNet38 with the seamv1 head", "irn classifier": "IRN ResNet-50 CAM classifier",
          "mctformer deeplab": "DeepLabV1-ResNet38 with MCTformer's head"}


def checkpoint(path, *hows):
    """A checkpoint of ours with networks of random weights and statistics."""
    records = {}
    for how in hows:
        network = build_network(**how)
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
        records[how["kind"]] = pack(network, **how)
    save_checkpoint(path, {"step": "stage1", "classes": ["a", "b", "c"], "options": {}, "networks": records})
    return str(path)


@pytest.mark.parametrize("case", NETWORKS)
def test_export_and_import_give_the_same_bits(tmp_path, capsys, case):
    family, kind = case.split()
    ours, out = checkpoint(tmp_path / "ours.pth.tar", NETWORKS[case]), str(tmp_path / "theirs.pth")
    assert main([ours, "--export", family, out]) == 0
    assert f"under {family}'s names" in capsys.readouterr().out
    assert describe(open_weights(out)).startswith(f"{out}: {TITLES[case]}"), describe(open_weights(out))
    before, after = (load_model(path, None)["networks"][kind] for path in (ours, out))
    assert {name: after[name] for name in NETWORKS[case]} == NETWORKS[case], f"built as {list(after.items())[:6]}"
    assert after.get("seed") == ({"name": "cam"} if kind == "classifier" else None), after.get("seed")
    different = [name for name, tensor in before["state"].items() if not torch.equal(tensor, after["state"][name])]
    assert not different, f"{len(different)} tensors differ: {different[:3]}"
    assert not unpack(after).training


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_every_torchvision_resnet_is_told_and_a_backbone_exports_to_its_names(tmp_path, backbone):
    how = {"kind": "affinity", "backbone": backbone}
    network = build_network(**how)
    state, left = export(Weights("x", "ours", {"affinity": pack(network, **how)}), "torchvision")
    assert {name.split(".")[0] for name in left} == {"heads", "fuse"}, left
    other = getattr(torchvision.models, backbone)(weights=None)
    result = other.load_state_dict(state, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys, result
    save_tensors(tmp_path / "w.pth", other.state_dict())
    weights = open_weights(tmp_path / "w.pth")
    assert weights.title == f"torchvision ResNet-{backbone[6:]}" and weights.ignored == ["fc.weight", "fc.bias"]


def test_irns_file_holds_its_backbone_under_all_of_its_names(tmp_path):
    path = checkpoint(tmp_path / "c.pth.tar", NETWORKS["irn classifier"])
    state, left = export(open_weights(path), "irn")
    assert len(state) == 956, f"{len(state)} tensors, IRN's network has 956"
    for names in (("resnet50.layer2.0.conv1.weight", "stage2.0.0.conv1.weight", "backbone.1.0.0.conv1.weight"),
                  ("resnet50.bn1.running_var", "stage1.1.running_var", "backbone.0.1.running_var"),
                  ("classifier.weight", "newly_added.0.weight")):
        assert len({state[name].data_ptr() for name in names}) == 1, names
    assert not left, left


def test_a_seam_classifier_loses_its_background_row_and_its_own_heads(tmp_path):
    path = checkpoint(tmp_path / "c.pth.tar", NETWORKS["psa classifier"])
    state, _ = export(open_weights(path), "psa")
    extra = {"f8_3.weight": torch.zeros(2), "f8_4.weight": torch.zeros(2), "f9.weight": torch.zeros(2)}
    with_background = torch.cat([torch.ones_like(state["fc8.weight"][:1]), state["fc8.weight"]])
    save_tensors(tmp_path / "seam.pth", {**state, **extra, "fc8.weight": with_background})
    weights = open_weights(tmp_path / "seam.pth")
    assert weights.title == "SEAM ResNet38 classifier" and sorted(weights.ignored) == sorted(extra), weights.ignored
    record = load_model(tmp_path / "seam.pth", ("stage1",))["networks"]["classifier"]
    assert record["classes"] == 3, record["classes"]
    assert torch.equal(record["state"]["head.weight"], state["fc8.weight"])


MXNET = {
    "arg:conv1a_weight": "conv1a.weight",
    "arg:res2a_branch2a_weight": "b2.conv_branch2a.weight",
    "arg:res4b5_branch2b1_weight": "b4_5.conv_branch2b1.weight",
    "arg:res6a_branch2b2_weight": "b6.conv_branch2b2.weight",
    "arg:res7a_branch1_weight": "b7.conv_branch1.weight",
    "arg:bn3b2_branch2a_gamma": "b3_2.bn_branch2a.weight",
    "arg:bn5a_branch2b1_beta": "b5.bn_branch2b1.bias",
    "aux:bn6a_branch2b2_moving_mean": "b6.bn_branch2b2.running_mean",
    "arg:bn7_gamma": "bn7.weight",
    "aux:bn7_moving_var": "bn7.running_var",
    "arg:linear1000_weight": "linear1000_weight",
    "arg:res9a_branch2a_weight": "res9a_branch2a_weight",
}


@pytest.mark.parametrize("theirs", MXNET)
def test_mxnet_names_become_psas(theirs):
    assert from_mxnet(theirs) == MXNET[theirs]


def mxnet_name(name):
    """The inverse of `from_mxnet`, written for this test: the names in ademxapp's symbols."""
    *block, layer, tensor = name.split(".")
    word = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}[tensor]
    stem = (block[0][1] + (f"b{block[0][3]}" if "_" in block[0] else "a") + "_" + layer.split("_")[1]) if block else "7"
    if layer.startswith("conv"):
        return f"arg:res{stem}_weight" if block else "arg:conv1a_weight"
    return f"{'aux' if 'running' in tensor else 'arg'}:bn{stem}_{word}"


def test_a_params_file_fills_every_tensor_of_the_resnet38(tmp_path):
    torch.manual_seed(0)
    source, backbone = build_backbone("resnet38", width=0.125), build_backbone("resnet38", width=0.125)
    arrays = {mxnet_name(name): tensor.numpy() for name, tensor in source.state_dict().items()
              if not name.endswith("num_batches_tracked")}
    arrays |= {"arg:linear1000_weight": np.zeros((5, 4), np.float32), "arg:linear1000_bias": np.zeros(5, np.float32)}
    (tmp_path / "a1.params").write_bytes(file_bytes(arrays, "legacy"))
    loaded, table = load_pretrained(backbone, "resnet38", str(tmp_path / "a1.params"))
    assert "as MXNet .params" in table and "random" not in table and "2 ignored" in table, table
    expected = source.state_dict()
    different = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, expected[name])]
    assert not different, f"{len(different)} tensors differ: {different[:3]}"
    assert {"conv1a", "b7.bn_branch2b2", "bn7"} <= loaded


def test_a_backbone_alone_is_no_model_and_the_way_to_use_it_is_told(tmp_path, published):
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(UserError, match="torchvision ResNet-18, no trained network; pass it as --pretrained"):
        load_model(tmp_path / "w.pth", ("stage1",))


def test_a_published_model_of_another_step_is_refused_with_what_it_is(tmp_path):
    path = checkpoint(tmp_path / "c.pth.tar", NETWORKS["seamv1 deeplab"])
    save_tensors(tmp_path / "d.pth", export(open_weights(path), "seamv1")[0])
    with pytest.raises(UserError, match="seamv1 head. comes from deeplab, but a checkpoint of stage1 is needed"):
        load_model(tmp_path / "d.pth", ("stage1",))


@pytest.mark.parametrize("spoil, words", [
    (lambda state: state.pop("b5_1.conv_branch2a.weight"), "lacks 1 tensors of its network, such as backbone.b5_1."),
    (lambda state: state.update({"b5.conv_branch1.weight": torch.ones(1)}), "backbone.b5.conv_branch1.weight is (1,)"),
    (lambda state: state.update({"fc8.weight": torch.zeros(())}), "head.weight is ()"),
])
def test_a_published_model_that_is_incomplete_or_misshapen_is_refused(tmp_path, spoil, words):
    state, _ = export(open_weights(checkpoint(tmp_path / "c.pth.tar", NETWORKS["psa classifier"])), "psa")
    spoil(state)
    save_tensors(tmp_path / "p.pth", state)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "p.pth", None)
    assert words in str(caught.value) and "p.pth" in str(caught.value), f"{caught.value}"


def test_tensors_that_the_network_does_not_have_are_told_and_left_out(tmp_path, capsys):
    state, _ = export(open_weights(checkpoint(tmp_path / "c.pth.tar", NETWORKS["psa classifier"])), "psa")
    save_tensors(tmp_path / "p.pth", {**state, "fc9.weight": torch.ones(2)})
    record = load_model(tmp_path / "p.pth", None)["networks"]["classifier"]
    said = capsys.readouterr().err
    assert "229 loaded: backbone, head" in said and "1 ignored: fc9" in said, said
    assert "backbone.fc9.weight" not in record["state"]


def test_half_precision_and_missing_counters_are_made_good(tmp_path):
    state, _ = export(open_weights(checkpoint(tmp_path / "c.pth.tar", NETWORKS["psa affinity"])), "psa")
    old = {name: tensor.half() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    save_tensors(tmp_path / "p.pth", old)
    record = load_model(tmp_path / "p.pth", None)["networks"]["affinity"]
    assert record["state"]["fuse.weight"].dtype == torch.float32
    assert record["state"]["backbone.bn7.num_batches_tracked"].dtype == torch.int64
    unpack(record)


def test_a_checkpoint_of_two_networks_tells_both_and_exports_the_one_asked_for(tmp_path):
    path = checkpoint(tmp_path / "c.pth.tar", NETWORKS["psa affinity"], NETWORKS["psa classifier"])
    text = describe(open_weights(path))
    for part in ("checkpoint of this project, stage1", "affinity on resnet38, width 0.125:", "3 classes",
                 "classes: a, b, c"):
        assert part in text, f"{part!r} not in {text}"
    assert "f9.weight" in export(open_weights(path), "psa")[0]
    assert "fc8.weight" in export(open_weights(path), "psa", "classifier")[0]
    with pytest.raises(UserError, match="holds no deeplab; it holds affinity, classifier"):
        export(open_weights(path), "psa", "deeplab")


def test_a_checkpoint_of_stage_2_whose_affinitynet_has_no_classes_is_described_and_exported(tmp_path, capsys):
    backbone = {"backbone": "resnet38", "width": 0.125, "output_stride": 8, "dilated": True}  # as `run_stage2` packs it
    path = checkpoint(tmp_path / "c.pth.tar", {"kind": "affinity", **backbone},
                      {"kind": "classifier", **backbone, "classes": 3})
    assert "classes" not in load_checkpoint(path)["networks"]["affinity"]
    assert main([path]) == 0
    said = capsys.readouterr().out
    for part in ("affinity on resnet38, width 0.125:", "classifier on resnet38, width 0.125, 3 classes:"):
        assert part in said, f"{part!r} not in {said}"
    assert main([path, "--export", "psa", str(tmp_path / "psa.pth")]) == 0
    assert "f9.weight" in torch.load(tmp_path / "psa.pth")


@pytest.mark.parametrize("case, family", [("psa classifier", "torchvision"), ("seamv1 deeplab", "mctformer"),
                                          ("psa affinity", "irn"), ("mctformer deeplab", "psa")])
def test_an_export_to_names_the_network_does_not_have_is_refused(tmp_path, case, family):
    weights = open_weights(checkpoint(tmp_path / "c.pth.tar", NETWORKS[case]))
    with pytest.raises(UserError, match=f"no file of {family} .* it can be exported as: {case.split()[0]}"):
        export(weights, family)


def test_a_dilated_resnet50_is_not_exported_as_irns(tmp_path):
    how = {"kind": "classifier", "backbone": "resnet50", "classes": 3}
    weights = open_weights(checkpoint(tmp_path / "c.pth.tar", how))
    with pytest.raises(UserError, match="built like this one; it can be exported as: torchvision"):
        export(weights, "irn")


def test_a_network_on_a_backbone_of_no_family_is_not_exported_and_the_reason_is_told(tmp_path, toy):
    weights = open_weights(checkpoint(tmp_path / "c.pth.tar", {"kind": "classifier", "backbone": "toy", "classes": 3}))
    assert "classifier on toy, 3 classes" in describe(weights), describe(weights)
    for family in EXPORTS:
        with pytest.raises(UserError, match=f"no file of {family} holds a classifier on toy .* exported as: nothing"):
            export(weights, family)


def test_an_export_overwrites_nothing_and_unknown_names_are_refused(tmp_path, capsys):
    path = checkpoint(tmp_path / "c.pth.tar", NETWORKS["psa affinity"])
    with pytest.raises(UserError, match="is there already"):
        main([path, "--export", "psa", path])
    assert load_checkpoint(path)["step"] == "stage1"
    with pytest.raises(SystemExit) as caught:
        main([path, "--export", "caffe", str(tmp_path / "new.pth")])
    assert caught.value.code == 2 and ", ".join(EXPORTS) in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pth.tar"]


# --- records -------------------------------------------------------------------------------------------------------

def attach(network, seed):
    """A seed as src/seeds attaches it: a module that reads the backbone."""
    network.seed = nn.Linear(network.backbone.channels[network.backbone.stages[-1]], seed["dims"])


def seeded(backbone):
    """(a classifier with a seed, its record)"""
    how, seed = {"kind": "classifier", "backbone": backbone, "classes": 3}, {"name": "some", "dims": 4}
    network = build_network(**how)
    attach(network, seed)
    return network.eval(), pack(network, **how, seed=seed)


def test_a_classifier_comes_back_with_its_seed(tmp_path, toy):
    network, record = seeded("toy")
    save_checkpoint(tmp_path / "c.pth.tar", {"step": "stage1", "networks": {"classifier": record}})
    again = unpack(load_checkpoint(tmp_path / "c.pth.tar")["networks"]["classifier"], attach)
    assert torch.equal(again.seed.weight, network.seed.weight) and not again.training
    assert outline(record, attach).seed.weight.is_meta
    with pytest.raises(UserError, match="unknown tensors .2, such as seed.weight"):
        unpack(record)
    with pytest.raises(UserError, match="seed.weight is .4, 8., but the network has .5, 8."):
        unpack({**record, "seed": {"name": "some", "dims": 5}}, attach)
    with pytest.raises(UserError, match="record of its classifier makes no network .'dims'"):
        unpack({**record, "seed": {"name": "some"}}, attach)


@pytest.mark.parametrize("backbone", ["toy", "resnet18"])
def test_unpacking_restores_buffers_that_are_in_no_file_and_moves_no_generator(toy, backbone):
    (network, record), x = seeded(backbone), torch.ones(1, 3, 33, 33)
    before = torch.get_rng_state()
    again = unpack(record, attach)
    assert torch.equal(torch.get_rng_state(), before), "torch's generator moved"
    for (name, buffer), (_, other) in zip(network.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(buffer, other), f"{name}: {other.flatten()[:5]}, not {buffer.flatten()[:5]}"
    assert torch.equal(again(x), network(x)) and not again.training


def test_a_record_of_other_shapes_is_refused_before_its_network_is_built(monkeypatch, toy):
    how = {"kind": "classifier", "backbone": "toy", "classes": 3}
    record, devices = pack(build_network(**how), **how), []

    def build(**_):
        devices.append(torch.empty(0).device.type)
        return Toy()

    monkeypatch.setitem(BACKBONES, "toy", BackbonePlug(build))
    with pytest.raises(UserError, match="head.weight is .3, 8, 1, 1., but the network has .1000000000000, 8, 1, 1."):
        unpack({**record, "classes": 10 ** 12})
    assert devices == ["meta"], devices
    unpack(record)
    assert devices == ["meta", "meta", "cpu"], devices


# --- incomplete checkpoints ------------------------------------------------------------------------------------------

def spoilt(path, change):
    """A checkpoint of stage 1 on whose content a function was called."""
    payload = load_checkpoint(checkpoint(path, NETWORKS["psa classifier"]))
    change(payload)
    save_tensors(path, payload)
    return str(path)


@pytest.mark.parametrize("change, words", [
    (lambda payload: payload.pop("step"), "no valid step;"),
    (lambda payload: payload.pop("networks"), "no valid networks;"),
    (lambda payload: payload.update(networks=[1]), "no valid networks;"),
    (lambda payload: payload.update(networks={}), "holds no network;"),
    (lambda payload: payload.update(networks={"classifier": 1}), "no valid kind, backbone, state of its classifier;"),
    (lambda payload: payload["networks"]["classifier"].pop("state"), "no valid state of its classifier;"),
    (lambda payload: payload["networks"]["classifier"].update(state={"a": 1}), "no valid tensors of its classifier;"),
    (lambda payload: payload["networks"]["classifier"].pop("backbone"), "no valid backbone of its classifier;")])
def test_a_checkpoint_without_its_networks_is_refused_wherever_it_is_opened(tmp_path, backbone, change, words):
    path = spoilt(tmp_path / "c.pth.tar", change)
    for use in (open_weights, lambda path: load_model(path, ("stage1",)), lambda path: main([path]),
                lambda path: load_pretrained(backbone, "resnet18", path)):
        with pytest.raises(UserError, match=f"checkpoint {path} (has )?{words} it is damaged or cut down") as caught:
            use(path)
        assert "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("change, words", [
    (lambda payload: payload.pop("classes"), "has no valid classes;"),
    (lambda payload: payload.pop("options"), "has no valid options;"),
    (lambda payload: payload.update(options=[1], classes=3), "has no valid options, classes;"),
    (lambda payload: payload.update(step="stage2"), "of stage2 holds no affinity, but classifier;")])
def test_a_checkpoint_without_options_or_classes_is_described_but_is_no_model(tmp_path, change, words):
    path = spoilt(tmp_path / "c.pth.tar", change)
    with pytest.raises(UserError, match=f"checkpoint {path} {words} .*damaged or cut down: make it again"):
        load_model(path, ("stage1", "stage2"))


# --- checkpoints of format 1 ---------------------------------------------------------------------------------------

def old(record, affinity=0, fitted=False):
    """The record of a classifier as format 1 had it: a common-object head always, an AVC head with affinity_dims."""
    state = {name.replace("backbone.", "trunk.", 1): tensor for name, tensor in record["state"].items()}
    if record["kind"] == "classifier":
        state |= {"common.weight": torch.full((8,), 2.0), "common.bias": torch.tensor(3.0),
                  "common.fitted": torch.tensor(fitted)}
    avc = {"affinity_dims": affinity, "affinity_steps": 2, "affinity_colour": 0.5} if affinity else {}
    state |= {"avc.mean": torch.ones(8), "avc.project.weight": torch.ones(affinity, 8, 1, 1)} if affinity else {}
    return {**record, **avc, "state": state}


def old_checkpoint(path, *records):
    save_tensors(path, {"format": OLD_FORMAT, "step": "stage1", "classes": ["a", "b", "c"], "options": {"lr": 0.1},
                        "networks": {record["kind"]: record for record in records}})
    return str(path)


@pytest.mark.parametrize("how, seed, tensors", [
    ({"affinity": 4}, {"name": "avc", "dims": 4, "power": 2, "colour": 0.5},
     {"seed.head.mean": (8,), "seed.head.project.weight": (4, 8, 1, 1)}),
    ({"affinity": 4, "fitted": True}, {"name": "avc", "dims": 4, "power": 2, "colour": 0.5},
     {"seed.head.mean": (8,), "seed.head.project.weight": (4, 8, 1, 1)}),
    ({"fitted": True}, {"name": "common"}, {"seed.weight": (8,), "seed.bias": ()}),
    ({}, {"name": "cam"}, {}),
])
def test_a_classifier_of_the_old_format_becomes_one_of_the_new(tmp_path, toy, how, seed, tensors):
    built = {"kind": "classifier", "backbone": "toy", "classes": 3}
    record = pack(build_network(**built), **built)
    payload = load_model(old_checkpoint(tmp_path / "c.pth.tar", old(record, **how)), ("stage1",))
    found = payload["networks"]["classifier"]
    assert payload["format"] == FORMAT and payload["options"] == {"lr": 0.1}, payload["format"]
    assert {name: value for name, value in found.items() if name != "state"} == {**built, "seed": seed}, found.keys()
    added = {name: tuple(tensor.shape) for name, tensor in found["state"].items() if name not in record["state"]}
    assert added == tensors, f"{added}"
    different = [name for name, tensor in record["state"].items() if not torch.equal(tensor, found["state"][name])]
    assert not different, different
    assert upgrade(payload) is payload


def test_an_old_checkpoint_of_two_networks_is_described_loaded_and_exported(tmp_path, capsys):
    hows = [NETWORKS["psa affinity"], NETWORKS["psa classifier"]]
    records = [pack(build_network(**how), **how) for how in hows]
    path, out = old_checkpoint(tmp_path / "c.pth.tar", *map(old, records)), tmp_path / "out.pth"
    assert main([path, "--export", "psa", str(out), "--network", "classifier"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint of this project, stage1" in said and "have none there" not in said, said
    assert torch.equal(torch.load(out)["conv1a.weight"], records[1]["state"]["backbone.conv1a.weight"])
    backbone = build_backbone("resnet38", width=0.125)
    assert "random" not in load_pretrained(backbone, "resnet38", path)[1]
    assert torch.equal(backbone.conv1a.weight, records[0]["state"]["backbone.conv1a.weight"])
    for kind, record in load_model(path, None)["networks"].items():
        assert not unpack(record).training, kind
