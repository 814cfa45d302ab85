"""Fixtures that several files share, chains of script runs made in the background, and what two workers share."""
import functools
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from script_runs import CHAINS, DATA, MACHINE, SMALL, STAGE2, chain, start_cold
from script_runs import run as run_script
from torch.utils._python_dispatch import TorchDispatchMode
from trees import make_coco, make_folder, make_pet

from data.make_toy import make_toy

AT_A_TIME = 2  # each run keeps one core busy, half of the time with importing torch


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is none; group tests for the workers of pytest-xdist.

    One worker begins with the tests of all chains, which are made in processes of their own; the others take the other
    tests, file by file.
    """
    items.sort(key=lambda item: not CHAINS.keys() & set(item.fixturenames))
    for item in items:
        chained = CHAINS.keys() & set(item.fixturenames)
        item.add_marker(pytest.mark.xdist_group("chains" if chained else item.path.stem))
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


class NoDraws(TorchDispatchMode):
    """A chain runs in a thread: what it drew would be missing from a test's numbers after `torch.manual_seed`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.nondeterministic_seeded not in func.tags, f"a chain draws ({func}): use `random_weights`"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def background(request):
    """Function: name of a chain -> its result.  The chains that the collected tests use are started together."""
    named = {name for item in request.session.items for name in item.fixturenames}
    wanted = {name for name in CHAINS if name in named} | {"pipeline"}  # others start from it
    with tempfile.TemporaryDirectory(prefix="wsss-tests-", ignore_cleanup_errors=True) as home:
        pool, futures, slots = ThreadPoolExecutor(len(wanted)), {}, threading.Semaphore(AT_A_TIME)
        submitted, over = threading.Event(), threading.Event()

        def build(name):
            submitted.wait()
            with slots, NoDraws():
                return None if over.is_set() else CHAINS[name](Path(home) / name, get)

        def get(other):
            """For a chain that goes on from another one: its slot is free for others while it waits."""
            slots.release()
            try:
                return futures[other].result()
            finally:
                slots.acquire()
        # The pipeline first: others wait for it.
        for name in sorted((name for name in CHAINS if name in wanted), key="pipeline".__ne__):
            (Path(home) / name).mkdir()
            futures[name] = pool.submit(build, name)
        submitted.set()
        yield lambda name: futures[name].result()
        over.set()
        pool.shutdown()


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
