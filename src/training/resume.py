"""The state of a training run on the disk: what checkpoint.pth.tar holds, and taking it up again to the same result."""
from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils import distributed
from utils.checkpoint import check_parts, load_checkpoint, remove_leftovers
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.files import short_hash
from utils.log import say
from utils.options import RESUME_FREE
from utils.store import BEST, NEWEST

if TYPE_CHECKING:
    from src.training.loop import Run

STATE = ("optimizer", "epoch", "step_in_epoch", "sums", "best")  # what `restore` takes up besides the network


def check_run_dir(run_dir: str | Path, resume: bool, overwrite: bool, state: str = NEWEST) -> None:
    """UserError, before any work, if a training would be overwritten that neither --resume nor --overwrite names.

    state: the file that --resume goes on from.
    """
    found = [path for path in (Path(run_dir) / name for name in (NEWEST, BEST))
             if path.is_file()]
    if found and not resume and not overwrite:
        resumable = "--resume to go on from it, " if found[0].name == state else ""
        raise UserError(f"{found[0]} is there already; pass {resumable}--overwrite to start anew, or another "
                        "--output_dir")


def state_of(run: Run, log_size: int) -> dict[str, object]:
    """All that a run needs to go on as if it had never stopped, in tensors and plain types.

    Samples, their order and all draws of a step depend on (seed, epoch, step) alone, so that this position is the
    sampler's and the schedule's state; generators are kept too, for losses that draw from them otherwise.
    """
    return {"optimizer": run.optimiser.state_dict(), "step_in_epoch": run.step,
            "steps_per_epoch": run.steps_per_epoch, "sums": run.sums, "best": run.best, "failures": run.failures,
            "processes": distributed.world(), "log_size": log_size, "generators": generators(),
            "data": data_hash(run.task.samples.dataset), "targets": run.task.targets}


def data_hash(dataset: Dataset) -> str:
    """16 hex digits of the ids and labels of the images that a run learns from, in their order."""
    labels = b"" if dataset.labels is None else dataset.labels.tobytes()
    return short_hash("\0".join(dataset.ids).encode(), labels)


def files_hash(dataset: Dataset) -> str:
    """16 hex digits of the bytes that the files of the images have, which a copy of them elsewhere has too."""
    return short_hash(str(dataset.file_sizes()).encode())


def restore(run: Run, path: Path) -> int:
    """Take up the state of a checkpoint; UserError if it was made with other options.  Returns the log's size then."""
    payload = resumed(path, run.task.step, run.options, run.task.targets)
    steps = payload.get("steps_per_epoch", run.steps_per_epoch)
    if steps != run.steps_per_epoch:
        raise UserError(f"--resume: {path} was made with {steps} steps an epoch, and now there are "
                        f"{run.steps_per_epoch}: other images, or another number of processes; pass the same ones, or "
                        "leave --resume out to start anew")
    check_same_data(payload, path, run.task.samples.dataset)
    name = next(iter(payload["networks"]))
    run.network.load_state_dict(payload["networks"][name]["state"])
    run.optimiser.load_state_dict(payload["optimizer"])
    run.epoch, run.step = payload["epoch"], payload["step_in_epoch"]
    run.sums, run.best = payload["sums"], payload["best"]
    run.failures = payload.get("failures", {})
    set_generators(payload.get("generators"))
    if distributed.is_main():
        remove_leftovers(path)
        remove_leftovers(path.with_name(BEST))
    say(f"Resuming {path} at epoch {run.epoch + 1}, step {run.step}")
    if payload.get("processes", 1) != distributed.world():
        say(f"It was made by {payload.get('processes', 1)} processes and goes on with {distributed.world()}: the "
            "same batches, rounded otherwise")
    return payload.get("log_size", sys.maxsize)


def resumed(path: Path, step: str, options: Mapping[str, object], targets: str | None = None) -> dict[str, object]:
    """The checkpoint that a run of a step goes on from.

    targets: see `Task`; None where they are not known yet.
    UserError if there is none, or one made with other options or targets.
    """
    if not path.is_file():
        raise UserError(f"--resume: there is no {path} to go on from; leave --resume out to start")
    payload = load_checkpoint(path, steps=(step,))
    check_parts(payload, ("options", "networks", *(STATE if path.name == NEWEST else ())), path)
    before = payload["options"]
    changed = [f"{name} was {_told(before[name])}, is {_told(value)}" for name, value in options.items()
               if name not in RESUME_FREE and name in before and before[name] != value]
    if changed:
        raise UserError(f"--resume: {path} was made with other options ({'; '.join(changed)}); pass the same ones, "
                        "or leave --resume out to start anew")
    if targets is not None and payload.get("targets", targets) != targets:
        raise UserError(f"--resume: {path} was made from other masks or affinity labels than those that are there now; "
                        "put them back, or leave --resume out to start anew")
    return payload


def check_same_data(payload: Mapping[str, object], path: Path, dataset: Dataset) -> None:
    """UserError if the checkpoint that a run would go on from was made from other classes, images or labels."""
    if list(payload.get("classes") or dataset.classes) != list(dataset.classes):
        raise UserError(f"--resume: {path} was made with the classes {', '.join(payload['classes'][:4])}, ..., and "
                        f"{dataset.root} has {', '.join(dataset.classes[:4])}, ...; pass the same data, or leave "
                        "--resume out to start anew")
    if payload.get("data") not in (None, data_hash(dataset)) \
            or "files" in payload and payload["files"] != files_hash(dataset):
        raise UserError(f"--resume: {path} was made from other images or labels than those in {dataset.root}; pass the "
                        "same ones, or leave --resume out to start anew")


def _told(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def generators() -> dict[str, object]:
    """The states of the global generators of torch, CUDA, numpy and Python, in tensors and plain types."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest], "python": [version, list(words), gauss]}


def set_generators(states: dict[str, object] | None) -> None:
    """Put the states of `generators` back; nothing for None, of a checkpoint that has none."""
    if states is None:
        return
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
