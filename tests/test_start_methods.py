"""Workers that are not forked: Windows and macOS spawn them, and from Python 3.14 on Linux asks a fork server for them.

What such a worker needs is pickled: a function inside another, or a lambda, would end the step with an error.
"""
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from script_runs import DATA, SMALL, chain, checkpoint, finish, read_json, run, start

from data.make_toy import make_toy
from utils.loader import _outlive_sigterm

WORKER = ("--device", "cpu", "--workers", 1, "--precision", "fp32")
TRAIN = (*SMALL, "--crop_size", 65, "--batch_size", 4, *WORKER)
MADE = "new/2/model_best.pth.tar"


def step2(out):
    return "run_train.py", "--stage", 2, *TRAIN, "--cam_dir", "new/cams", "--output_dir", out


def step5(out):
    return "train_deeplab.py", *TRAIN, "--mask_dir", "new/3", "--output_dir", out


STEPS = [("run_train.py", "--stage", 1, *TRAIN, "--scales", 1, "--cam_dir", "new/cams", "--output_dir", "new/1"),
         step2("new/2"),
         ("run_inference.py", "--model_path", MADE, "--output_dir", "new/3", *WORKER),
         ("run_eval.py", "--model_path", MADE, "--output_dir", "new/4", *WORKER),
         step5("new/5"),
         ("test_deeplab.py", "--model_path", "new/5/model_best.pth.tar", "--output_dir", "new/6", "--scales", 1,
          *WORKER)]


def started_by(method, folder, jobs):
    (folder / "jobs.json").write_text(json.dumps([list(map(str, job)) for job in jobs]))
    return run(folder, "tests/start_method.py", method, "tests/together.py", "jobs.json", timeout=300)


@chain
def unforked(folder, get):
    """The six steps by a fork server, then steps 2 and 5 once more by spawned workers.  Returns the folder."""
    make_toy(folder / DATA, train=12, test=2, classes=2, size=48)
    started_by("forkserver", folder, STEPS)
    started_by("spawn", folder, [step2("spawned/2"), step5("spawned/5")])
    return folder


@chain
def terminated(folder, get):
    """SIGTERM to the main process alone while a worker of a fork server reads images.  .done, .state, .gone: whether
    no process was left 10 seconds later."""
    make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    process = start(folder, "tests/start_method.py", "forkserver", *STEPS[0], "--epochs", 300, "--batch_size", 1)
    log, deadline = folder / "new/1/log.jsonl", time.monotonic() + 120
    while not log.is_file() or not log.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline, finish(process).stderr
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    done, gone = finish(process), gone_within(10, process.pid)
    return SimpleNamespace(done=done, state=checkpoint(folder / "new/1/checkpoint.pth.tar"), gone=gone)


def gone_within(seconds, group):
    """Whether no process of a group is left after so many seconds; what is left is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return False


@pytest.mark.parametrize("place, count", [("new/cams", 12), ("new/2/affinity_labels", 12), ("new/3", 12),
                                          ("new/6/masks", 2), ("spawned/2/affinity_labels", 12)])
def test_every_step_does_its_work_with_workers_that_are_not_forked(unforked, place, count):
    manifest = read_json(unforked / place / "manifest.json")
    assert manifest["complete"] and manifest["count"] == count, manifest["count"]


@pytest.mark.parametrize("step", [2, 5])
def test_the_start_method_changes_no_bit_of_what_is_learnt(unforked, step):
    one, other = (checkpoint(unforked / place / str(step) / "model_best.pth.tar") for place in ("new", "spawned"))
    (name, first), second = next(iter(one["networks"].items())), other["networks"]
    differing = [key for key, value in first["state"].items() if not torch.equal(value, second[name]["state"][key])]
    assert not differing, f"{len(differing)} of {len(first['state'])} tensors differ, such as {differing[0]}"


def test_sigterm_to_the_main_process_ends_the_workers_of_a_fork_server_too(terminated):
    done, state = terminated.done, terminated.state
    assert done.returncode == 128 + signal.SIGTERM and "--resume goes on from there" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert (0, 0) < (state["epoch"], state["step_in_epoch"]) < (300, 0), (state["epoch"], state["step_in_epoch"])
    assert terminated.gone, "processes were still there 10 seconds after the main one had ended"


def stay(pipe):
    """A worker that never ends by itself."""
    _outlive_sigterm(0, "info")
    pipe.send("ready")
    while True:
        time.sleep(1)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_outlives_one_sigterm_and_ends_at_the_second(method):
    """Whichever of its threads the system chooses to give the signal to: this file's imports have started some."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=stay, args=(theirs,), daemon=True)
    worker.start()
    try:
        assert ours.poll(60), "it did not start"
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(1)
        assert worker.is_alive(), f"the first signal ended it with {worker.exitcode}"
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM, f"exit code {worker.exitcode} after the second signal"
    finally:
        worker.kill()
