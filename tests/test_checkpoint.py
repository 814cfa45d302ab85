"""Checkpoints: plain types come back as they were, nothing is executed, and every other file is refused in one line."""
import pickle

import pytest
import torch

from utils.checkpoint import FORMAT, OLD_FORMAT, is_checkpoint, load_checkpoint, read_tensors, save_checkpoint
from utils.errors import UserError

PAYLOAD = {"step": "stage1", "epoch": 3, "options": {"lr": 0.1, "scales": (0.5, 1.0), "flip": True, "ids": None},
           "classes": ["cat", "dog"], "sums": {"loss": 1.5}}


def tensors():
    return {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7), "half": torch.ones(2).half()}


def refusal(path, read=load_checkpoint, **keywords):
    with pytest.raises(UserError) as caught:
        read(path, **keywords)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text, f"not one line with the path: {text!r}"
    return text


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "new" / "c.pth.tar", {**PAYLOAD, "state": tensors()})
    found = load_checkpoint(tmp_path / "new" / "c.pth.tar", steps=("stage1", "stage2"))
    assert {name: found[name] for name in PAYLOAD} == PAYLOAD, found
    for name, tensor in tensors().items():
        assert torch.equal(found["state"][name], tensor) and found["state"][name].dtype == tensor.dtype, name


def test_a_checkpoint_loads_with_weights_only_and_leaves_no_temporary(tmp_path):
    save_checkpoint(tmp_path / "c.pth.tar", {**PAYLOAD, "state": tensors()})
    assert torch.load(tmp_path / "c.pth.tar", weights_only=True)["format"] == FORMAT
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth.tar"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(path, PAYLOAD)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(path, {"step": "stage1", "epoch": 4, "loss": lambda: 0})
    assert load_checkpoint(path)["epoch"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pth.tar"], "a temporary file is left"


def test_another_step_is_refused_with_the_steps_that_serve(tmp_path):
    save_checkpoint(tmp_path / "c.pth.tar", PAYLOAD)
    text = refusal(tmp_path / "c.pth.tar", steps=("stage2", "deeplab"))
    assert "comes from stage1" in text and "stage2 or deeplab is needed" in text and "--model_path" in text, text


def test_a_checkpoint_that_does_not_name_its_step_is_refused(tmp_path):
    for step in ({}, {"step": 3}):
        save_checkpoint(tmp_path / "c.pth.tar", {**{name: PAYLOAD[name] for name in PAYLOAD if name != "step"}, **step})
        for steps in (None, ("stage1",)):
            text = refusal(tmp_path / "c.pth.tar", steps=steps)
            assert "has no valid step; it is damaged or cut down: make it again" in text, text


def test_a_missing_checkpoint_is_refused(tmp_path):
    for path in (tmp_path / "gone.pth", tmp_path):
        assert "no checkpoint" in refusal(path) and "run the step that writes it" in refusal(path), refusal(path)


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1, 2], torch.ones(3), {"format": "other"}])
def test_a_foreign_file_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    text = refusal(tmp_path / "c.pth")
    assert "not a checkpoint of this project" in text and "--model_path" in text, text


def test_a_checkpoint_of_the_old_format_is_known_but_its_training_is_not_taken_up(tmp_path):
    torch.save({"format": OLD_FORMAT, **PAYLOAD}, tmp_path / "c.pth")
    assert is_checkpoint(read_tensors(tmp_path / "c.pth"))
    text = refusal(tmp_path / "c.pth", steps=("stage1",))
    assert "older version" in text and "leave --resume out to start anew" in text, text


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_is_refused_wherever_it_ends(tmp_path, zipped):
    path = tmp_path / "c.pth"
    torch.save({"format": FORMAT, **PAYLOAD, "state": tensors()}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 1, 2, 10, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        text = refusal(path)
        assert "damaged" in text, f"{length} of {len(whole)} bytes: {text}"


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 no zip", b"\x00" * 200, b"\x80\x02."])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    assert "damaged" in refusal(tmp_path / "c.pth", read=read_tensors)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, save):
    save({"format": FORMAT, "step": "stage1", "trap": Trap(tmp_path / "ran")}, tmp_path / "c.pth")
    text = refusal(tmp_path / "c.pth")
    assert "damaged" in text and ("could run code" in text or "cannot read" in text), text
    assert not (tmp_path / "ran").exists(), "loading the checkpoint ran its code"


@pytest.mark.parametrize("wrap", [lambda tensor: tensor, lambda tensor: {"a": [1, {"b": (tensor,)}]}])
def test_a_tensor_of_a_trillion_elements_on_one_stored_is_refused(tmp_path, wrap):
    torch.save(wrap(torch.zeros(1, dtype=torch.float16).expand(10 ** 6, 10 ** 6)), tmp_path / "c.pth")
    text = refusal(tmp_path / "c.pth", read=read_tensors)
    assert "(1000000, 1000000)" in text and "not as many values" in text, text


def test_a_tensor_whose_storage_claims_a_trillion_elements_is_refused(tmp_path):
    torch.save(torch.zeros(300), tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "c.pth").read_bytes()
    # Pickle writes a whole number as BININT2 or, if it is large, as LONG1.
    short, huge = b"M" + (300).to_bytes(2, "little"), b"\x8a\x06" + (10 ** 12).to_bytes(6, "little")
    assert content.count(short) == 2, f"{content.count(short)} places that tell the size"  # storage and shape
    (tmp_path / "c.pth").write_bytes(content.replace(short, huge))
    assert "damaged" in refusal(tmp_path / "c.pth", read=read_tensors)


def test_views_of_one_storage_are_no_harm(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"all": whole, "part": whole[1:], "turned": whole.T, "empty": whole[:0]}, tmp_path / "c.pth")
    found = read_tensors(tmp_path / "c.pth")
    assert torch.equal(found["turned"], whole.T) and torch.equal(found["part"], whole[1:]), found
