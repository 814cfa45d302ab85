"""What a script says or refuses before it imports torch, which takes seconds: here torch cannot be imported."""
import json
import os
import subprocess
import sys

import pytest
from script_runs import ROOT
from trees import make_pet

DATA = ("--data_root", "pet")


@pytest.fixture
def without_torch(tmp_path):
    """A function that runs a script in an empty folder where `import torch` fails: command -> the finished process."""
    (tmp_path / "poison" / "torch").mkdir(parents=True)
    (tmp_path / "poison" / "torch" / "__init__.py").write_text("raise OSError('torch was imported')\n")

    def run(script, *flags):
        return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=tmp_path, capture_output=True,
                              text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(tmp_path / "poison")})
    return run


def write_cams(folder):
    """A manifest of CAMs that names the data, and no more."""
    (folder / "cams").mkdir()
    options = {"dataset": "pet", "data_root": "pet", "model_path": "none"}
    record = {"step": "cam", "complete": True, "options": options, "identity": {}, "stamps": {}}
    (folder / "cams" / "manifest.json").write_text(json.dumps(record))
    return "cams"


@pytest.mark.parametrize("step, line", [
    ("run_train.py --stage 1 --data_root pet", "Split trainval of pet: 3 images, 3 classes"),
    ("run_train.py --stage 2 --cam_dir cams", "Split trainval of pet: 3 images, 3 classes"),
    ("train_deeplab.py --data_root pet --mask_dir gt", "Split trainval of pet: 3 images, 3 classes"),
    ("run_inference.py --model_path some.pth.tar", "Using some.pth.tar"),
    ("run_eval.py --model_path some.pth.tar", "Using some.pth.tar"),
    ("test_deeplab.py --model_path some.pth.tar", "Using some.pth.tar"),
])
def test_a_script_says_what_it_works_on_before_torch_is_imported(without_torch, tmp_path, step, line):
    make_pet(tmp_path / "pet")
    write_cams(tmp_path)
    (tmp_path / "some.pth.tar").write_bytes(b"")
    said = without_torch(*step.split()).stderr.splitlines()
    assert line in said and said[-1] == "Error: torch was imported", said
    assert said.index(line) < len(said) - 1


@pytest.mark.parametrize("step, words", [
    ("run_train.py --stage 1 --data_root missing", "no data folder missing; pass --data_root"),
    ("run_train.py --stage 1 --model_path missing.pth", "no checkpoint missing.pth; run the step"),
    ("run_train.py --stage 2 --cam_dir missing", "missing"),
    ("run_inference.py", "no checkpoint output/stage2_resnet50/model_best.pth.tar; run the step"),
    ("run_eval.py --mask_dir missing", "missing"),
    ("train_deeplab.py", "output/inference"),
    ("test_deeplab.py", "no checkpoint output/deeplab_*/model_best.pth.tar; run: python train_deeplab.py"),
])
def test_what_is_missing_is_refused_before_torch_is_imported(without_torch, step, words):
    done = without_torch(*step.split())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("Error: ") and words in line, line


def test_every_help_comes_without_torch(without_torch):
    for script in ("run_train.py", "run_inference.py", "run_eval.py", "train_deeplab.py", "test_deeplab.py"):
        done = without_torch(script, "--help")
        assert done.returncode == 0 and "--precision {auto,fp32,bf16}" in done.stdout, (script, done.stderr[-300:])


RELEASE = """
import re, sys
from pathlib import Path
from utils.runtime import keep_memory, release_memory
keep_memory()
import numpy as np
held, last = [np.ones(4_000_000) for _ in range(8)], np.ones(1)
del held
resident = lambda: int(re.search("VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = resident()
release_memory()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_that_is_kept_for_the_next_step_can_be_given_back():
    done = subprocess.run([sys.executable, "-c", RELEASE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200, f"{done.stdout.strip()} of 256 MB were given back"
