"""Initial weights: torchvision's names, our own checkpoints, what is reported, and every file that is refused."""
import pytest
import torch
import torchvision

from models.build import build_network, pack
from models.trunk import build_trunk
from models.weights import load_pretrained
from utils.checkpoint import save_checkpoint
from utils.errors import UserError


@pytest.fixture(scope="module")
def published():
    """A state dict as torchvision publishes them."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.fixture
def trunk():
    torch.manual_seed(1)
    return build_trunk("resnet18")


def refusal(trunk, backbone, source):
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_pretrained(trunk, backbone, str(source))
    changed = [name for name, tensor in trunk.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"{len(changed)} tensors changed although the file was refused"
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


def test_a_published_state_dict_loads_and_its_classifier_is_ignored(tmp_path, published, trunk):
    torch.save(published, tmp_path / "w.pth")
    loaded, line = load_pretrained(trunk, "resnet18", str(tmp_path / "w.pth"))
    different = [name for name, tensor in trunk.state_dict().items() if not torch.equal(tensor, published[name])]
    assert not different, f"{len(different)} tensors were not loaded: {different[:3]}"
    assert loaded == {name.rsplit(".", 1)[0] for name in trunk.state_dict()}, len(loaded)
    assert f"{len(trunk.state_dict())} tensors from" in line and "2 ignored: fc" in line and "random" not in line, line


def test_half_precision_and_a_missing_layer4_load_and_are_reported(tmp_path, published, trunk):
    part = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in published.items()
            if not name.startswith(("layer4", "fc"))}
    torch.save(part, tmp_path / "w.pth")
    fresh = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    loaded, line = load_pretrained(trunk, "resnet18", str(tmp_path / "w.pth"))
    for name, tensor in trunk.state_dict().items():
        expected = part.get(name, fresh[name]).to(fresh[name].dtype)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert "layer3.1.bn2" in loaded and not [name for name in loaded if name.startswith("layer4")]
    random = [name for name in fresh if name.startswith("layer4") and not name.endswith("num_batches_tracked")]
    assert f"{len(random)} stay random: layer4" in line and "ignored" not in line, line


def test_a_layer_that_was_not_loaded_learns_its_statistics(tmp_path, published):
    part = {name: tensor for name, tensor in published.items() if not name.startswith("layer4")}
    torch.save(part, tmp_path / "w.pth")
    network = build_network("classifier", "resnet18", classes=2)
    loaded, _ = load_pretrained(network.trunk, "resnet18", str(tmp_path / "w.pth"))
    network.freeze(0, "auto", loaded).train()
    found = {name: getattr(network.trunk, name)[0].bn1.training for name in ("layer1", "layer3", "layer4")}
    assert found == {"layer1": False, "layer3": False, "layer4": True}, found


def test_none_loads_nothing_and_says_so(trunk):
    before = trunk.conv1.weight.clone()
    loaded, line = load_pretrained(trunk, "resnet18", "none")
    assert loaded == set() and line == "resnet18 starts from random weights", (loaded, line)
    assert torch.equal(trunk.conv1.weight, before)


@pytest.mark.parametrize("kind", ["classifier", "affinity", "deeplab"])
def test_our_own_checkpoint_serves_as_initial_weights(tmp_path, trunk, kind):
    network = build_network(kind, "resnet18", classes=3)
    record = pack(kind, network, "resnet18", 1.0, 16, 3)
    save_checkpoint(tmp_path / "c.pth.tar", {"step": "any", "networks": {kind: record}})
    loaded, line = load_pretrained(trunk, "resnet18", str(tmp_path / "c.pth.tar"))
    own = network.trunk.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in trunk.state_dict().items())
    assert len(loaded) > 30 and "random" not in line and "ignored" not in line, line


def test_a_checkpoint_without_our_trunk_is_refused(tmp_path, trunk):
    network = build_network("classifier", "resnet38", width=0.125, classes=2)
    record = pack("classifier", network, "resnet38", 0.125, 8, 2)
    save_checkpoint(tmp_path / "c.pth.tar", {"step": "stage1", "networks": {"classifier": record}})
    text = refusal(trunk, "resnet18", tmp_path / "c.pth.tar")
    assert "holds no tensor of resnet18" in text and "--backbone" in text, text


@pytest.mark.parametrize("content", [{}, {"encoder.weight": torch.ones(2)}])
def test_a_file_without_a_fitting_tensor_is_refused(tmp_path, trunk, content):
    torch.save(content, tmp_path / "w.pth")
    text = refusal(trunk, "resnet18", tmp_path / "w.pth")
    assert f"holds no tensor of resnet18 ({len(content)} others" in text and "pass another --pretrained" in text, text


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"conv1.weight": torch.ones(2)}}, torch.ones(2)])
def test_a_file_that_is_no_dict_of_tensors_is_refused(tmp_path, trunk, content):
    torch.save(content, tmp_path / "w.pth")
    text = refusal(trunk, "resnet18", tmp_path / "w.pth")
    assert "is not a dict of tensors" in text and "torchvision's names" in text, text


def test_another_shape_is_refused_with_the_tensors_name(tmp_path, published, trunk):
    torch.save({**published, "layer2.0.conv1.weight": torch.ones(4, 4, 1, 1)}, tmp_path / "w.pth")
    text = refusal(trunk, "resnet18", tmp_path / "w.pth")
    assert "layer2.0.conv1.weight is (4, 4, 1, 1), but resnet18 has (128, 64, 3, 3)" in text, text
    assert "pass the weights of this backbone and width" in text, text


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_of_weights_is_refused_and_not_run(tmp_path, trunk):
    torch.save({"conv1.weight": trunk.conv1.weight, "trap": Trap(tmp_path / "ran")}, tmp_path / "w.pth")
    text = refusal(trunk, "resnet18", tmp_path / "w.pth")
    assert "could run code" in text and "plain tensors" in text, text
    assert not (tmp_path / "ran").exists(), "loading the weights ran their code"


def test_a_truncated_or_missing_file_is_refused(tmp_path, published, trunk):
    path = tmp_path / "w.pth"
    torch.save({name: tensor for name, tensor in published.items() if name.startswith("layer1")}, path)
    whole = path.read_bytes()
    for share in (0, 0.3, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        text = refusal(trunk, "resnet18", path)
        assert "damaged" in text, f"the first {share:.0%}: {text}"
    path.unlink()
    assert "no checkpoint" in refusal(trunk, "resnet18", path)


def test_imagenet_weights_of_resnet38_are_refused_with_both_remedies(trunk):
    text = refusal(trunk, "resnet38", "imagenet")
    assert "--pretrained PATH" in text and "--pretrained none" in text, text


def test_a_failed_download_names_the_address_and_both_remedies(monkeypatch, trunk):
    def offline(url, **_):
        raise OSError("no route to host")
    monkeypatch.setattr("models.weights.load_state_dict_from_url", offline)
    text = refusal(trunk, "resnet18", "imagenet")
    for part in ("no route to host", "https://download.pytorch.org", "--pretrained PATH", "--pretrained none"):
        assert part in text, f"{part!r} not in {text!r}"


def test_imagenet_weights_are_torchvisions_first_version(monkeypatch, published, trunk):
    asked = []
    monkeypatch.setattr("models.weights.load_state_dict_from_url", lambda url, **_: asked.append(url) or published)
    load_pretrained(trunk, "resnet18", "imagenet")
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url], asked
    assert torch.equal(trunk.conv1.weight, published["conv1.weight"])
