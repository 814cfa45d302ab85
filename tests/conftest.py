"""Fixtures that several files share, and the GPU marker."""
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from script_runs import DATA, MACHINE, SMALL, STAGE2, chain, start_cold
from script_runs import run as run_script
from trees import make_coco, make_folder, make_pet

from data.make_toy import make_toy


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors: on a busy machine, threads that wait for each other cost many times what they gain."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def fp32():
    """In this process --precision auto is fp32 on every CPU; the scripts' runs are told by MACHINE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.precision.cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def chain_home():
    """A folder for the chains of this process."""
    with tempfile.TemporaryDirectory(prefix="wsss-tests-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def pet(tmp_path):
    """The root of a tree of Pet."""
    return make_pet(tmp_path / "pet")


@pytest.fixture
def folder(tmp_path):
    """The root of a plain folder."""
    return make_folder(tmp_path / "own")


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """The root of a tree of COCO; the working directory is elsewhere."""
    monkeypatch.chdir(tmp_path)  # for output/cache
    make_coco(tmp_path / "coco")
    return tmp_path / "coco"


@chain
def pipeline(folder, get):
    """The six steps on a toy dataset.  .folder is where they ran (copy it before changing it), .runs what they said."""
    make_toy(folder / DATA, train=12, test=6, classes=3, size=56)
    train = (*SMALL, "--crop_size", "65", "--epochs", "4", "--batch_size", "2")
    run = functools.partial(run_script, start=start_cold)  # as from a shell, imports and all
    inherited = SMALL  # what it does not name, the later steps take from the records of the earlier ones
    runs = {
        1: run(folder, "run_train.py", "--stage", 1, *train, "--scales", 1),
        2: run(folder, "run_train.py", "--stage", 2, *inherited),
        3: run(folder, "run_inference.py", "--model_path", STAGE2, "--save_overlays", "--save_walk", *MACHINE),
        4: run(folder, "run_eval.py", *MACHINE),
        5: run(folder, "train_deeplab.py", *inherited),
        6: run(folder, "test_deeplab.py", "--scales", 1, "--save_overlays", *MACHINE),
    }
    return SimpleNamespace(folder=folder, runs=runs)
