"""What a run says: the environment it ran in, one JSON line per event, progress bars, TensorBoard."""
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError


def environment(device=None):
    """Facts that belong beside every number: git commit, dirty flag, torch version, device.  Plain types."""
    import torch
    commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "cpu"
    return {"git_commit": commit or None, "git_dirty": bool(dirty), "torch": torch.__version__, "device_name": name}


def _git(*words):
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def progress(iterable, description, total=None, unit="image"):
    """A bar on stderr with rate and time left; silent where stderr is not a terminal and the loop takes under 10 s."""
    return tqdm(iterable, desc=description, total=total, unit=unit, dynamic_ncols=True, file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def memory_gb(device):
    """GB in use: the most that this process's tensors took on a GPU, or what it has resident on a CPU (0: unknown)."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def duration(seconds):
    """Seconds in words of two units at most: 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class JsonLog:
    """log.jsonl: one object per line, appended and flushed at once.

    start: bytes of an earlier log to go on from; what it holds beyond was written after the state that is gone on from.
    """

    def __init__(self, path, start=0):
        self.path = path
        self.file = open(path, "r+b" if start and Path(path).is_file() else "wb")
        self.file.truncate(min(start, self.file.seek(0, os.SEEK_END)))
        self.file.seek(0, os.SEEK_END)
        self.started = time.time()

    def write(self, **fields):
        fields["seconds"] = round(time.time() - self.started, 2)
        try:
            self.file.write((json.dumps(fields) + "\n").encode())
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); make room, and go on with "
                            "--resume") from None

    def size(self):
        """Bytes written so far."""
        return self.file.tell()

    def close(self):
        with contextlib.suppress(OSError):  # what a full disk did not take
            self.file.close()


class NoLog:
    """What a process writes that leaves the writing to rank 0."""

    def write(self, **_):
        pass

    def size(self):
        return 0

    def close(self):
        pass


class NoBoard:
    """TensorBoard left out."""

    def add_scalar(self, *_):
        pass

    def close(self):
        pass


def tensorboard(folder, step):
    """A writer of TensorBoard events; what it wrote from `step` on, before a run was killed, is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package; run: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step)
