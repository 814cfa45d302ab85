"""What a run says: the environment it ran in, one JSON line per event, and progress bars."""
import json
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm


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


class JsonLog:
    """log.jsonl: one object per line, appended and flushed at once."""

    def __init__(self, path, append=False):
        self.file = open(path, "a" if append else "w", encoding="utf-8")
        self.started = time.time()

    def write(self, **fields):
        fields["seconds"] = round(time.time() - self.started, 2)
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()
