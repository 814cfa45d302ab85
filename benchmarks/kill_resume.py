"""Kill -9 a toy training run at random moments, resume it each time, and compare its end with an uninterrupted run's.

    python -m benchmarks.kill_resume [--kills 20] [--seed 0]

A run of run_train.py --stage 1 saves its state at almost every step.  Every third kill waits for the next checkpoint
and falls while it is written; the others fall somewhere within one to four new steps.  Prints each kill, and at
the end one JSON line: kills, how many left a half-written file behind, and how many tensors of the weights, the best
weights and the momentum, or lines of the log, differ from those of an uninterrupted run (all should be 0).
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

from benchmarks.measure import ROOT, Parser
from data.make_toy import make_toy

DATA, RUN = "data/oxford-iiit-pet", "output/stage1_resnet18"
COMMAND = ("run_train.py", "--stage", "1", "--backbone", "resnet18", "--pretrained", "none", "--crop_size", "65",
           "--scales", "1", "--batch_size", "2", "--cutmix", "0.5", "--workers", "1", "--device", "cpu",
           "--save_every", "0.0005")
LOGGED = ("epoch", "step", "loss", "grad_norm", "mean", "validation")  # that do not depend on time
WAIT = 120  # seconds after which a run without progress has failed


def start(folder: Path, epochs: int) -> subprocess.Popen:
    """Start the training in a folder, or go on with it; its output goes to said.txt there."""
    # Killed before its first checkpoint, it may have left a model_best, which a new run must be allowed to replace.
    again = "--resume" if (folder / RUN / "checkpoint.pth.tar").is_file() else "--overwrite"
    command = [sys.executable, str(ROOT / COMMAND[0]), *COMMAND[1:], "--epochs", str(epochs), again]
    with open(folder / "said.txt", "a", encoding="utf-8") as said:
        # Bits depend on the number of threads: the same for all runs, whatever a caller's environment is meanwhile.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, env=environment)


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], folder: Path) -> bool:
    """Until a condition holds; False if the process ends first.  RuntimeError if neither happens."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"nothing new for {WAIT} s; see {folder / 'said.txt'}")
        time.sleep(0.001)
    return True


def kill(folder: Path, process: subprocess.Popen, rng: random.Random, in_writing: bool) -> bool:
    """Kill a run: while it writes its next checkpoint, or at a random moment.  Returns whether it still ran."""
    run, wanted = folder / RUN, _lines(folder) + rng.randrange(1, 4)
    alive = wait_for(process, lambda: _lines(folder) >= wanted, folder)
    if in_writing:
        alive = alive and wait_for(process, lambda: any(run.glob(".checkpoint.pth.tar.*.tmp")), folder)
    else:
        time.sleep(rng.uniform(0, 0.1))
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and alive


def interrupted(folder: Path, epochs: int, kills: int, seed: int) -> int:
    """Run to the end with so many kills; returns how many of them left a half-written file."""
    rng, halves = random.Random(seed), 0
    for done in range(kills):
        process = start(folder, epochs)
        if not kill(folder, process, rng, in_writing=done % 3 == 2):
            raise RuntimeError(f"the run ended before it was killed {kills} times; raise --epochs")
        left = _half_written(folder)
        halves += bool(left)
        print(f"kill {done + 1}: {_lines(folder)} lines in the log, {left} half-written files", flush=True)
    finish(folder, start(folder, epochs))
    return halves


def finish(folder: Path, process: subprocess.Popen) -> None:
    """Wait for a run; RuntimeError with its last words if it fails."""
    if process.wait() != 0:
        raise RuntimeError((folder / "said.txt").read_text(encoding="utf-8")[-2000:])


def _half_written(folder: Path) -> int:
    return len(list((folder / RUN).glob(".*.tmp")))


def _lines(folder: Path) -> int:
    log = folder / RUN / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def differences(one: Path, other: Path) -> dict[str, int]:
    """{what: how many of it differ} between two folders."""
    import torch

    def differing(a, b):
        return sum(not torch.equal(a[name], b[name]) for name in a)
    found = {}
    for file in ("checkpoint.pth.tar", "model_best.pth.tar"):
        pair = [torch.load(folder / RUN / file, weights_only=True) for folder in (one, other)]
        found[file] = differing(*(payload["networks"]["classifier"]["state"] for payload in pair))
        if "optimizer" in pair[0]:
            found["momentum"] = differing(*({key: moments["momentum_buffer"] for key, moments in
                                             payload["optimizer"]["state"].items()} for payload in pair))
    logs = [[{name: value for name, value in json.loads(line).items() if name in LOGGED}
             for line in (folder / RUN / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    found["log lines"] = sum(a != b for a, b in zip_longest(*logs))
    return found


def compare(home: str | Path, epochs: int, kills: int, seed: int = 0) -> dict:
    """Both runs in folders of `home`; returns what the JSON line says."""
    folders = [Path(home) / name for name in ("alone", "killed")]
    for folder in folders:
        make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    finish(folders[0], start(folders[0], epochs))
    halves = interrupted(folders[1], epochs, kills, seed)
    return {"case": "kill -9 and resume", "kills": kills, "half_written": halves,
            "left_behind": _half_written(folders[1]), "differing": differences(*folders)}


def main() -> int:
    parser = Parser("benchmarks.kill_resume", __doc__)
    parser.flag("kills", 20, "how often the run is killed", like="limit")
    parser.flag("epochs", 20, "of the run, 5 steps each")
    parser.flag("seed", 0, "of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        row = compare(home, args.epochs, args.kills, args.seed)
    print(json.dumps(row), flush=True)
    return int(any(row["differing"].values()))


if __name__ == "__main__":
    sys.exit(main())
