"""What a run reports: its environment, one JSON line per event, progress bars, TensorBoard.  No torch at the top."""
from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter

Item = TypeVar("Item")


def environment(device: torch.device | None = None) -> dict[str, str | bool | None]:
    """What is recorded beside every result: git commit, whether there were uncommitted changes, torch version, device.
    """
    import torch
    commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "cpu"
    return {"git_commit": commit or None, "git_dirty": bool(dirty), "torch": torch.__version__, "device_name": name}


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def progress(iterable: Iterable[Item], description: str, total: int | None = None, unit: str = "image") -> tqdm[Item]:
    """Iterate with a bar on stderr: count, rate and time left; where stderr is a file, one line per half minute.

    total: length of the iterable, if it has no len() of its own.
    """
    return tqdm(iterable, desc=description, total=total, unit=unit, dynamic_ncols=True, file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def memory_gb(device: torch.device) -> float:
    """Memory of this process in GB: the peak of its tensors on a GPU, or its resident memory on a CPU (0: unknown)."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def duration(seconds: float) -> str:
    """Format seconds in at most two units: 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class JsonLog:
    """log.jsonl: one object per line, appended and flushed at once.

    start: bytes of an earlier log to keep when a run is resumed; the rest was written after the checkpoint.
    """

    def __init__(self, path: str | Path, start: int = 0):
        self.path = path
        self.file = open(path, "r+b" if start and Path(path).is_file() else "wb")
        self.file.truncate(min(start, self.file.seek(0, os.SEEK_END)))
        self.file.seek(0, os.SEEK_END)
        self.started = time.time()

    def write(self, **fields: object) -> None:
        """Append a line of JSON values, with `seconds` since the start.  Raises UserError if the disk is full."""
        fields["seconds"] = round(time.time() - self.started, 2)
        try:
            self.file.write((json.dumps(fields) + "\n").encode())
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); make room, and go on with "
                            "--resume") from None

    def size(self) -> int:
        """Bytes written so far."""
        return self.file.tell()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            self.file.close()


class NoLog:
    """The log of every rank but 0: nothing is written."""

    def write(self, **_: object) -> None:
        pass

    def size(self) -> int:
        return 0

    def close(self) -> None:
        pass


class NoBoard:
    """The TensorBoard writer of a run without --tensorboard."""

    def add_scalar(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def tensorboard(folder: str | Path, step: int) -> SummaryWriter:
    """A writer of TensorBoard events that drops what an earlier, killed run wrote from `step` on.

    Raises UserError if the tensorboard package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package; run: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step)
