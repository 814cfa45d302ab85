"""docs/flags.md is what the parsers say."""
import os
import re
import subprocess
import sys

import pytest
from script_runs import ROOT

from src.seeds import SEED_FLAGS
from utils.options import FLAGS
from workflow.steps import STEPS

PAGE = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
ROWS = {cells[1]: cells for cells in (re.split(r"(?<!\\) ?\| ?", line) for line in PAGE.splitlines()
                                      if line.startswith("| `--") and line.count(" | ") >= 4)}
PRINT = ("import sys; from workflow.flags_doc import document; print(document(), end=''); "
         "assert 'torch' not in sys.modules")


@pytest.mark.parametrize("cores", [1, 64])
def test_the_page_is_what_the_generator_writes_on_any_machine_and_without_torch(cores):
    code = f"import os; os.cpu_count = lambda: {cores}; {PRINT}"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8",
                           env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert found.returncode == 0, found.stderr
    assert found.stdout == PAGE, "docs/flags.md is out of date; run: make docs"


def test_every_flag_has_one_row_whose_steps_are_those_that_take_it():
    names = [*FLAGS, *(name for own in SEED_FLAGS.values() for name in own)]
    assert sorted(ROWS) == sorted(f"`--{name}`" for name in names), set(ROWS) ^ {f"`--{name}`" for name in names}
    for number, step in STEPS.items():
        told = {name for name in names if str(number) in re.findall(r"\d", ROWS[f"`--{name}`"][4])}
        taken = {action.dest for action in step.parser()._actions} & set(names)
        assert told == taken, f"step {number}: {told ^ taken}"


@pytest.mark.parametrize("name, column, text", [
    ("workers", 3, "one for each CPU core, at most 8"), ("epochs", 3, "`6`, by `--dataset` (2)"),
    ("epochs", 3, "by `--head` (5)"), ("scales", 2, "one or more: number, above 0"), ("long_side", 2, "2 of: "),
    ("bg_threshold", 2, "number, at least 0 and at most 1"), ("dataset", 2, "`folder`"), ("crf", 2, "on, off"),
    ("radius", 4, "2, 3\\*, 4\\*"), ("save_walk", 5, "&lt;output_dir>/walks")])
def test_a_row_tells_values_default_steps_and_meaning(name, column, text):
    assert text in ROWS[f"`--{name}`"][column], ROWS[f"`--{name}`"]


def test_the_defaults_of_datasets_methods_and_heads_are_told_as_they_are_typed():
    for line in ("| `mixture` | 3, 4 | `--bg_alpha 6.0 --walk_steps 8 --crf_preset irn` |",
                 "| `pet` | 1, 2, 3, 4, 5, 6 | `--data_root data/oxford-iiit-pet --max_size 512` |"):
        assert line in PAGE, f"no line {line}"
    assert re.search(r"\| `mctformer` \| 6 \| `.*--no-flip --merge max", PAGE), "no defaults of step 6's other head"
