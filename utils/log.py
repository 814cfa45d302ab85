"""What a run reports: lines, progress, its environment, one JSON line per event, TensorBoard.  No torch at the top."""
from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from tqdm import tqdm

from utils import distributed
from utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter

Item = TypeVar("Item")


# --- lines on stderr -------------------------------------------------------------------------------------------------

LEVELS = ("error", "warning", "info", "debug")
LINE_SECONDS = 30
_shown = {"level": "info"}


def set_level(level: str) -> None:
    """Choose what this process prints on stderr besides errors: one of LEVELS, with all before it."""
    _shown["level"] = level


def worker_level() -> str:
    """The level of processes that this one starts: its own, but of a rank above 0 errors alone, as of itself."""
    return _shown["level"] if distributed.is_main() else "error"


def shows(level: str) -> bool:
    """Whether lines of a level are printed."""
    return LEVELS.index(level) <= LEVELS.index(_shown["level"])


def say(text: str) -> None:
    """Print what a run does and from what, a line that nobody has to read."""
    if shows("info"):
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a line that may mean that a result is not what the user expects."""
    if shows("warning"):
        print(text, file=sys.stderr, flush=True)


# --- what a run reports ----------------------------------------------------------------------------------------------

def environment(device: torch.device | None = None) -> dict[str, str | bool | None]:
    """What is recorded beside every result: git commit, whether there were uncommitted changes, torch version, device.
    """
    import torch
    commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "cpu"
    return {"git_commit": commit or None, "git_dirty": bool(dirty), "torch": torch.__version__, "device_name": name}


def commit_told(facts: Mapping[str, object]) -> str:
    """The commit of `environment`, in ten digits, and whether there were changes."""
    return (facts["git_commit"] or "none")[:10] + (" with changes" if facts["git_dirty"] else "")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def progress(iterable: Iterable[Item], description: str, total: int | None = None, unit: str = "image"
             ) -> tqdm[Item] | Lines[Item]:
    """Iterate with a bar on stderr: count, rate and time left; where stderr is no terminal, with `Lines`.

    total: length of the iterable, if it has no len() of its own.  Below the level "info" nothing is shown.
    """
    if sys.stderr.isatty() or not shows("info"):
        return tqdm(iterable, desc=description, total=total, unit=unit, dynamic_ncols=True, file=sys.stderr,
                    mininterval=0.5, disable=not shows("info"))
    return Lines(iterable, description, total, f"{unit}s")


class Lines(Generic[Item]):
    """Progress for files and logs: one whole line per half minute, and one at the end."""

    def __init__(self, iterable: Iterable[Item], description: str, total: int | None, units: str):
        self.iterable, self.description, self.units, self.more = iterable, description, units, ""
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total

    def __iter__(self) -> Iterator[Item]:
        started = told = time.monotonic()
        count = 0
        for count, item in enumerate(self.iterable, start=1):
            yield item
            now = time.monotonic()
            if now - told >= LINE_SECONDS and count != self.total:
                told = now
                self._tell(count, now - started)
        if count:
            self._tell(count, time.monotonic() - started, done=True)

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """What the next line ends with."""
        self.more = f" | {text}"

    def _tell(self, count: int, seconds: float, done: bool = False) -> None:
        rate = count / max(seconds, 1e-9)
        speed = f"{rate:.1f} {self.units}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        of = f"/{self.total}" if self.total is not None else ""
        if done:
            left = f", {duration(seconds)}"
        else:
            left = f", {duration((self.total - count) / rate)} left" if self.total is not None else ""
        say(f"{self.description}: {count}{of} {self.units}, {speed}{left}{self.more}")


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
    """A writer of TensorBoard events that drops what an earlier, killed run wrote from `step` on, the next to come.

    Raises UserError if the tensorboard package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package; run: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step)
