"""Dense CRF: what it does to a noisy edge, its symmetries, its presets and its refusals."""
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from utils import crf
from utils.crf import BACKENDS, PRESETS, CRFParams, dense_crf

HEIGHT, WIDTH = 25, 32


@pytest.fixture(params=BACKENDS)
def refine(request):
    """dense_crf by one backend and then by the other."""
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf cannot be imported; torch's CRF is tested alone")
    return partial(dense_crf, backend=request.param)


def noisy_edge():
    """A grey image with a bright right half, and two-class probabilities that follow it with noise."""
    rng = np.random.default_rng(0)
    truth = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    truth[:, WIDTH // 2 :] = 1
    image = np.repeat((60 + 120 * truth)[..., None], 3, axis=2).astype(np.uint8)
    right = np.clip(np.where(truth, 0.6, 0.4) + rng.normal(0, 0.15, truth.shape), 0.05, 0.95)
    return image, np.stack([1 - right, right]).astype(np.float32), truth


def random_probabilities(classes, seed=0):
    values = np.random.default_rng(seed).random((classes, HEIGHT, WIDTH)).astype(np.float32)
    return values / values.sum(axis=0)


@pytest.mark.parametrize("preset", ["psa", "irn", "seamv1", "avc"])
def test_a_noisy_edge_is_sharpened(preset, refine):
    image, probabilities, truth = noisy_edge()
    before = (probabilities.argmax(axis=0) != truth).mean()
    after = (refine(image, probabilities, PRESETS[preset]).argmax(axis=0) != truth).mean()
    assert before > 0.15 and after < 0.02, f"{preset}: wrong pixels {before:.3f} before, {after:.3f} after"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_posterior_is_a_float32_distribution(preset, refine):
    image, *_ = noisy_edge()
    found = refine(image, random_probabilities(4), PRESETS[preset])
    error = abs(found.sum(axis=0) - 1).max()
    assert (found.dtype, found.shape) == (np.float32, (4, HEIGHT, WIDTH)), f"{found.dtype} {found.shape}"
    assert error < 1e-4 and found.min() >= 0, f"{preset}: sums are off by {error:.2e}, least value {found.min()}"


def test_permuting_the_classes_permutes_the_posterior(refine):
    image, *_ = noisy_edge()
    probabilities, order = random_probabilities(5), [3, 0, 4, 2, 1]
    found = refine(image, probabilities[order], PRESETS["psa"])
    error = abs(found - refine(image, probabilities, PRESETS["psa"])[order]).max()
    assert error < 1e-4, f"largest difference {error:.2e}"


def test_permuting_the_colour_channels_changes_nothing(refine):
    image = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    probabilities = random_probabilities(3)
    found = refine(image[..., ::-1], probabilities, PRESETS["mctformer"])
    error = abs(found - refine(image, probabilities, PRESETS["mctformer"])).mean()
    assert error < 0.02, f"mean difference {error:.4f}"  # the lattice of the filter is not symmetric in its axes


def test_without_iterations_the_clipped_probabilities_come_back(refine):
    image, probabilities, _ = noisy_edge()
    probabilities[:, 0, 0] = 0, 1
    found = refine(image, probabilities, replace(PRESETS["psa"], iterations=0))
    error = abs(found - probabilities).max()
    assert 0 < found[0, 0, 0] < 2e-5 and error < 2e-5, f"zero became {found[0, 0, 0]:.2e}, largest change {error:.2e}"


def test_without_pairwise_weights_the_probabilities_come_back(refine):
    image, *_ = noisy_edge()
    probabilities = random_probabilities(3)
    error = abs(refine(image, probabilities, CRFParams(3, 0, 80, 13, 0, 10)) - probabilities).max()
    assert error < 1e-4, f"largest change {error:.2e}"


def test_a_class_ruled_out_can_come_back(refine):
    image, probabilities, truth = noisy_edge()
    probabilities[:, 12, 28] = 1, 0
    found = refine(image, probabilities, PRESETS["psa"])
    assert found[:, 12, 28].argmax() == truth[12, 28] == 1, f"posterior {found[:, 12, 28]}"


def test_one_class_comes_back_as_it_is(refine):
    image, *_ = noisy_edge()
    found = refine(image, np.ones((1, HEIGHT, WIDTH)), PRESETS["psa"])
    assert found.dtype == np.float32 and (found == 1).all(), f"{found.dtype}, {found.min()}..{found.max()}"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_memory_order_dtype_and_read_only_buffers_do_not_matter(dtype, refine):
    image, probabilities, _ = noisy_edge()
    expected = refine(image, probabilities.astype(dtype).astype(np.float32), PRESETS["irn"])
    frozen = np.asarray(Image.fromarray(image))
    strided = np.asfortranarray(np.repeat(image, 2, axis=0))[::2]
    given = np.asfortranarray(probabilities.astype(dtype))
    assert not strided.flags.c_contiguous and not given.flags.c_contiguous
    for name, variant in {"PIL": frozen, "strided": strided}.items():
        error = abs(refine(variant, given, PRESETS["irn"]) - expected).max()
        assert error < 1e-6, f"{name}: largest difference {error:.2e}"


def test_the_inputs_are_left_alone(refine):
    image, probabilities, _ = noisy_edge()
    before = image.copy(), probabilities.copy()
    refine(image, probabilities, PRESETS["seamv1"])
    assert (image == before[0]).all() and (probabilities == before[1]).all(), "dense_crf wrote on its inputs"


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (9, 1), (17, 23)])
def test_odd_sizes_work(height, width, refine):
    found = refine(np.zeros((height, width, 3), np.uint8), np.full((2, height, width), 0.5), PRESETS["avc"])
    error = abs(found - 0.5).max()
    assert found.shape == (2, height, width) and error < 1e-4, f"{found.shape}, off by {error:.2e}"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=np.zeros((HEIGHT, WIDTH), np.uint8)), r"give uint8 \(H, W, 3\)"),
        (dict(image=np.zeros((HEIGHT, WIDTH, 4), np.uint8)), r"give uint8 \(H, W, 3\)"),
        (dict(image=np.zeros((HEIGHT, WIDTH, 3), np.float32)), r"give uint8 \(H, W, 3\)"),
        (dict(image=np.zeros((WIDTH, HEIGHT, 3), np.uint8)), "resize them"),
        (dict(probabilities=np.ones((HEIGHT, WIDTH))), r"give floats \(C, H, W\)"),
        (dict(probabilities=np.ones((1, HEIGHT, WIDTH), np.uint8)), r"give floats \(C, H, W\)"),
        (dict(probabilities=np.zeros((0, HEIGHT, WIDTH))), "do not fit"),
        (dict(probabilities=np.full((2, HEIGHT, WIDTH), 0.4)), "sum to 0.800"),
        (dict(probabilities=np.full((2, HEIGHT, WIDTH), np.nan)), "not finite"),
        (dict(probabilities=np.stack([np.full((HEIGHT, WIDTH), p) for p in (-0.5, 1.5)])), "negative"),
    ],
)
def test_wrong_arguments_are_refused(change, message, refine):
    image, probabilities, _ = noisy_edge()
    with pytest.raises(ValueError, match=message):
        refine(**{**dict(image=image, probabilities=probabilities, params=PRESETS["psa"]), **change})


@pytest.mark.parametrize("change", [dict(gaussian_sxy=0), dict(bilateral_srgb=-1), dict(iterations=-1)])
def test_wrong_settings_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        replace(PRESETS["psa"], **change)


def test_the_settings_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        PRESETS["psa"].iterations = 1


def test_a_missing_pydensecrf_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    image, probabilities, _ = noisy_edge()
    with pytest.raises(ImportError, match="pip install pydensecrf2, or pass --crf_backend torch"):
        dense_crf(image, probabilities, PRESETS["psa"])


def test_workers_that_import_crf_parallel_and_metrics_do_not_load_torch():
    code = "import sys, utils.crf, utils.parallel, utils.metrics; sys.exit('torch' in sys.modules)"
    root = crf.__file__.rsplit("utils", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=root)
    assert done.returncode == 0, f"exit status {done.returncode}: torch was imported"
