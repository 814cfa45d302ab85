"""Checkpoints: plain types and tensors only, written whole or not at all, read without unpickling code."""
import os
import pickle
from pathlib import Path

import torch

from utils.artifacts import atomic_path
from utils.errors import UserError

FORMAT = "wsss-checkpoint-1"


def save_checkpoint(path, payload):
    """Write a dict of plain types and tensors to `path`; a reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **payload}, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, steps=None):
    """Read a checkpoint of ours onto the CPU.

    steps: names of the steps it may come from ("stage1", "stage2", "deeplab"); None for any.
    Raises UserError if the file is missing, damaged, holds more than tensors and plain types, or is of another step.
    """
    payload = read_tensors(path)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project; pass one from output/ with --model_path")
    if steps is not None and payload["step"] not in steps:
        raise UserError(f"{path} comes from {payload['step']}, but a checkpoint of {' or '.join(steps)} is needed; "
                        f"pass another with --model_path")
    return payload


def read_tensors(path):
    """torch.load restricted to tensors and plain types, with errors in one line."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}; run the step that writes it, or pass its path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds Python objects besides tensors and is refused, as loading it "
                        "could run code; pass a checkpoint of plain tensors") from None
    except Exception as error:  # on damaged bytes torch raises nearly anything: IndexError, AssertionError, ...
        reason = (str(error).splitlines() or ["no data"])[0]
        raise UserError(f"cannot read checkpoint {path} ({type(error).__name__}: {reason}); it is damaged or foreign: "
                        "make or fetch it again") from None
