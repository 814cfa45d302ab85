"""Ctrl-C and --resume through the real script: an interrupted run ends where an uninterrupted one does."""
import json
from types import SimpleNamespace

import pytest
import torch
from script_runs import DATA, chain, checkpoint, finish, interrupt, read_json, run, start

from data.make_toy import make_toy
from src.training.resume import resumed
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

COMMAND = ("run_train.py", "--stage", 1, "--backbone", "resnet18", "--pretrained", "none", "--crop_size", 65,
           "--scales", 1, "--epochs", 3, "--batch_size", 2, "--cutmix", 0.5, "--workers", 1, "--device", "cpu",
           "--precision", "fp32")
RUN = "output/stage1_resnet18"


@chain
def uninterrupted(folder, get):
    make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    run(folder, *COMMAND)
    return folder


@chain
def interrupted(folder, get):
    """Stopped after a few steps, refused twice, then resumed.  What each run said, and what lay there in between."""
    make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    none = finish(start(folder, *COMMAND, "--resume"))
    stopped = interrupt(start(folder, *COMMAND), folder / RUN / "log.jsonl", lines=4)
    state = checkpoint(folder / RUN / "checkpoint.pth.tar")
    cams = (folder / "data" / "cams").exists()
    other = finish(start(folder, *COMMAND, "--resume", "--lr", 0.003))
    resumed = run(folder, *COMMAND, "--resume")
    return SimpleNamespace(folder=folder, none=none, stopped=stopped, state=state, cams=cams, other=other,
                           resumed=resumed)


def test_ctrl_c_ends_with_130_keeps_the_state_and_says_how_to_go_on(interrupted):
    done, state = interrupted.stopped, interrupted.state
    assert done.returncode == 130, f"status {done.returncode}: {done.stderr}"
    assert "--resume" in done.stderr and f"{RUN}/checkpoint.pth.tar" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    at = state["epoch"], state["step_in_epoch"]
    assert (0, 0) < at < (3, 0), f"saved at epoch and step {at}: the run was not interrupted in its midst"
    assert not interrupted.cams, "CAMs were written though training was stopped"


def test_ctrl_c_is_announced_once_however_many_processes_it_reaches(interrupted):
    times = interrupted.stopped.stderr.count("finishing this step")
    assert times == 1, f"said {times} times:\n{interrupted.stopped.stderr}"


def test_a_resumed_run_ends_with_the_same_bits_as_an_uninterrupted_one(uninterrupted, interrupted):
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        whole, resumed = (checkpoint(folder / RUN / name) for folder in (uninterrupted, interrupted.folder))
        assert whole["epoch"] == resumed["epoch"], f"{name}: epoch {whole['epoch']} and {resumed['epoch']}"
        one, other = (payload["networks"]["classifier"]["state"] for payload in (whole, resumed))
        assert one.keys() == other.keys()
        differing = [key for key in one if not torch.equal(one[key], other[key])]
        assert not differing, f"{name}: {len(differing)} of {len(one)} tensors differ, such as {differing[0]}"
    one, other = (checkpoint(folder / RUN / "checkpoint.pth.tar")["optimizer"]["state"]
                  for folder in (uninterrupted, interrupted.folder))
    differing = [key for key in one if not torch.equal(one[key]["momentum_buffer"], other[key]["momentum_buffer"])]
    assert one.keys() == other.keys() and not differing, f"momentum differs in {len(differing)} of {len(one)} tensors"


def test_a_resumed_run_says_where_it_goes_on_and_logs_every_step_once(uninterrupted, interrupted):
    at, said = interrupted.state, interrupted.resumed.stderr
    assert f"at epoch {at['epoch'] + 1}, step {at['step_in_epoch']}" in said, said
    one, other = (_steps(folder) for folder in (uninterrupted, interrupted.folder))
    assert one == other, f"steps and losses of the uninterrupted run {one}, of the resumed one {other}"


def _steps(folder):
    lines = [json.loads(line) for line in (folder / RUN / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_resumed_run_makes_the_same_cams(uninterrupted, interrupted):
    one, other = (read_json(folder / "data/cams/manifest.json") for folder in (uninterrupted, interrupted.folder))
    assert one["complete"] and other["complete"]
    assert one["identity"] == other["identity"], f"{one['identity']} and {other['identity']}"


def test_resume_with_another_option_is_refused_and_names_it(interrupted):
    done = interrupted.other
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and error.startswith("Error: ") and "Traceback" not in done.stderr, done.stderr
    assert "lr was 0.01, is 0.003" in error and "pass the same" in error, error


def test_resume_without_a_checkpoint_is_refused_and_leaves_nothing(interrupted):
    done = interrupted.none
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and error.startswith("Error: ") and "Traceback" not in done.stderr, done.stderr
    assert f"there is no {RUN}/checkpoint.pth.tar to go on from; leave --resume out" in error, error


def test_a_model_best_under_the_name_of_a_training_state_is_refused_with_what_it_lacks(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, {"step": "stage1", "options": {}, "epoch": 1, "networks": {"classifier": {}}})
    with pytest.raises(UserError, match=f"checkpoint {path} has no valid optimizer, step_in_epoch, sums, best; it is"):
        resumed(path, "stage1", {})
