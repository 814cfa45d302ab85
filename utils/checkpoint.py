"""Checkpoints: plain types and tensors only, written whole or not at all, read without unpickling code."""
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from utils.errors import UserError
from utils.files import atomic_path, check_checkpoint_file

FORMAT = "wsss-checkpoint-2"
PARTS = {"step": str, "options": dict, "classes": (list, tuple, type(None)), "networks": dict}  # their types
OLD_FORMAT = "wsss-checkpoint-1"  # its networks are renamed by `models.weights`; its training cannot be taken up


def save_checkpoint(path: str | Path, payload: Mapping[str, object]) -> None:
    """Write a checkpoint of ours: a dict of plain types and tensors."""
    save_tensors(path, {"format": FORMAT, **payload})


def save_tensors(path: str | Path, value: object) -> None:
    """Write tensors and plain types to `path`; a reader sees the old file or the new one, never a part.

    Both the file and its new name are on the disk when this returns.  Raises UserError if they cannot be written; what
    was there before is then still there.
    """
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(Path(path).parent)
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error) from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network disks have no such call for folders
        pass
    finally:
        os.close(handle)


def _not_written(path: str | Path, error: Exception) -> Exception:
    """A UserError for a failed save; an error that is not the system's is given back as it is."""
    reason = error
    while not isinstance(reason, OSError):  # torch's writer raises an error of its own over the system's
        reason = reason.__context__
        if reason is None:
            return error
    kept = "; the one written before is kept" if Path(path).is_file() else ""
    return UserError(f"cannot write {path} ({reason.strerror}){kept}; make room, or let this user write there, and go "
                     "on with --resume")


def remove_leftovers(path: str | Path) -> None:
    """Delete what killed runs left of unfinished files for `path`."""
    for leftover in Path(path).parent.glob(f".{Path(path).name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def is_checkpoint(value: object) -> bool:
    """Whether what `read_tensors` read is a checkpoint of ours, of either format."""
    return isinstance(value, dict) and value.get("format") in (FORMAT, OLD_FORMAT)


def load_checkpoint(path: str | Path, steps: Sequence[str] | None = None) -> dict[str, object]:
    """Read a checkpoint of ours onto the CPU, with the state of its training.

    steps: names of the steps it may come from ("stage1", "stage2", "deeplab"); None for any.
    Raises UserError if the file is missing, damaged, holds more than tensors and plain types, is of another step, or of
    the old format: `models.weights.open_weights` reads the networks of that.
    """
    payload = read_tensors(path)
    if not is_checkpoint(payload):
        raise UserError(f"{path} is not a checkpoint of this project; pass one from output/ with --model_path")
    if payload["format"] == OLD_FORMAT:
        raise UserError(f"{path} was written by an older version, whose training cannot be taken up; leave --resume "
                        "out to start anew, or pass another --output_dir (it still serves as --model_path)")
    check_parts(payload, ("step",), path)
    check_step(payload, steps, path)
    return payload


def check_parts(payload: Mapping[str, object], needed: Sequence[str], path: str | Path) -> None:
    """UserError unless a checkpoint of ours has these parts, those of `PARTS` each of its type."""
    wrong = [name for name in needed if name not in payload
             or not isinstance(payload[name], PARTS.get(name, object))]
    if wrong:
        raise UserError(f"checkpoint {path} has no valid {', '.join(wrong)}; it is damaged or cut down: make it again, "
                        "or pass another")


def check_step(payload: Mapping[str, object], steps: Sequence[str] | None, path: str | Path) -> None:
    """UserError unless a checkpoint comes from one of `steps` (None: any)."""
    if steps is not None and payload["step"] not in steps:
        raise UserError(f"{path} comes from {payload['step']}, but a checkpoint of {' or '.join(steps)} is needed; "
                        f"pass another with --model_path")


def read_tensors(path: str | Path) -> object:
    """torch.load restricted to tensors and plain types, or a `.safetensors` file, with errors in one line."""
    check_checkpoint_file(path)
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds Python objects besides tensors and is refused, as loading it "
                        "could run code; pass a checkpoint of plain tensors") from None
    except Exception as error:  # on damaged bytes torch raises nearly anything: IndexError, AssertionError, ...
        reason = (str(error).splitlines() or ["no data"])[0]
        raise UserError(f"cannot read checkpoint {path} ({type(error).__name__}: {reason}); it is damaged or foreign: "
                        "make or fetch it again") from None
    _check_extent(value, path)
    return value


def _check_extent(value: object, path: str | Path) -> None:
    """UserError if a tensor claims more elements than the file holds for it: a copy of it would fill the memory."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path} holds a tensor of shape {tuple(value.shape)} but not as many values; it is "
                            "damaged or made to harm: fetch it again from where you trust it")
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_extent(item, path)
