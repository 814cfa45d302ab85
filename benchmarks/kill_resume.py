"""Kill -9 a toy training run at random moments, resume it each time, and compare its end with that of an unhurt run.

    python -m benchmarks.kill_resume [--kills 20] [--seed 0]

A run of run_train.py --stage 1 saves its state at almost every step.  Every third kill waits for the next checkpoint
and falls while it is written; the others fall somewhere within one to four new steps.  Prints each kill, and at
the end one JSON line: kills, how many left a half-written file behind, and how many tensors of the weights, the best
weights and the momentum, or lines of the log, differ from those of a run that was left alone (all should be 0).
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA, RUN = "data/oxford-iiit-pet", "output/stage1_resnet18"
COMMAND = ("run_train.py", "--stage", "1", "--backbone", "resnet18", "--pretrained", "none", "--crop_size", "65",
           "--scales", "1", "--batch_size", "2", "--cutmix", "0.5", "--workers", "1", "--device", "cpu",
           "--save_every", "0.0005")
WAIT = 120  # seconds after which a run that does not get on has failed


def start(folder, epochs, resume):
    """Start the training in a folder; what it says goes to said.txt there."""
    command = [sys.executable, str(ROOT / COMMAND[0]), *COMMAND[1:], "--epochs", str(epochs), *["--resume"] * resume]
    with open(folder / "said.txt", "a", encoding="utf-8") as said:
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)


def wait_for(process, condition, folder):
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


def kill(folder, process, rng, in_writing):
    """Kill a run: while it writes its next checkpoint, or at a random moment.  Returns whether it still ran."""
    run, wanted = folder / RUN, _lines(folder) + rng.randrange(1, 4)
    alive = wait_for(process, lambda: _lines(folder) >= wanted, folder)
    if in_writing:
        alive = alive and wait_for(process, lambda: any(run.glob(".checkpoint.pth.tar.*.tmp")), folder)
    else:
        time.sleep(rng.uniform(0, 0.1))
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and alive


def hurt(folder, epochs, kills, seed):
    """Run to the end with so many kills; returns (kills, those that left a half-written file)."""
    rng, done, halves = random.Random(seed), 0, 0
    while done < kills:
        newest = folder / RUN / "checkpoint.pth.tar"
        process = start(folder, epochs, newest.is_file())
        if not kill(folder, process, rng, in_writing=done % 3 == 2):
            raise RuntimeError(f"the run ended before it was killed {kills} times; raise --epochs")
        done += 1
        left = len(list((folder / RUN).glob(".*.tmp")))
        halves += bool(left)
        print(f"kill {done}: {_lines(folder)} lines in the log, {left} half-written files", flush=True)
    finish(folder, start(folder, epochs, True))
    return done, halves


def finish(folder, process):
    if process.wait() != 0:
        raise RuntimeError((folder / "said.txt").read_text(encoding="utf-8")[-2000:])


def _lines(folder):
    log = folder / RUN / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def differences(one, other):
    """{what: how many of it differ} between two folders."""
    import torch
    found = {}
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        pair = [torch.load(folder / RUN / name, weights_only=True) for folder in (one, other)]
        states = [payload["networks"]["classifier"]["state"] for payload in pair]
        found[name] = sum(not torch.equal(states[0][key], states[1][key]) for key in states[0])
        if "optimizer" in pair[0]:
            moments = [payload["optimizer"]["state"] for payload in pair]
            found["momentum"] = sum(not torch.equal(moments[0][key]["momentum_buffer"],
                                                    moments[1][key]["momentum_buffer"]) for key in moments[0])
    logs = [[_timeless(line) for line in (folder / RUN / "log.jsonl").read_text().splitlines()]
            for folder in (one, other)]
    found["log lines"] = abs(len(logs[0]) - len(logs[1])) + sum(a != b for a, b in zip(*logs))
    return found


def _timeless(line):
    record = json.loads(line)
    return {name: record[name] for name in ("epoch", "step", "loss", "grad_norm", "mean", "validation")
            if name in record}


def compare(home, epochs, kills, seed=0):
    """Both runs in folders of `home`; returns what the JSON line says."""
    from data.make_toy import make_toy
    folders = [Path(home) / name for name in ("alone", "hurt")]
    for folder in folders:
        make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    finish(folders[0], start(folders[0], epochs, False))
    done, halves = hurt(folders[1], epochs, kills, seed)
    leftovers = len(list((folders[1] / RUN).glob(".*.tmp")))
    return {"case": "kill -9 and resume", "kills": done, "half_written": halves, "left_behind": leftovers,
            "differing": differences(*folders)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (default: 20)")
    parser.add_argument("--epochs", type=int, default=20, help="of the run, 5 steps each (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        row = compare(home, args.epochs, args.kills, args.seed)
    print(json.dumps(row), flush=True)
    return int(any(row["differing"].values()))


if __name__ == "__main__":
    sys.exit(main())
