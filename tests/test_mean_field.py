"""The mean field in torch: against a dense kernel matrix, against pydensecrf, and several images or fields at once."""
import sys
from dataclasses import replace

import numpy as np
import pytest

from utils.crf import PRESETS, CRFParams, dense_crf
from utils.crf import mean_field as module
from utils.crf.mean_field import mean_field


def scene(height, width, classes=2, seed=0):
    """An image with a bright ellipse, and noisy class probabilities of which the last follows it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((y / height - 0.5) / 0.3) ** 2 + ((x / width - 0.45) / 0.35) ** 2 < 1
    image = np.clip(70 + 110 * inside[..., None] + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    scores = rng.random((classes, height, width)) + 0.05
    scores[-1] += 0.5 * inside
    return image, (scores / scores.sum(axis=0)).astype(np.float32)


def energy(probabilities):
    return -np.log(probabilities.clip(1e-5, 1))[None]


def dense_mean_field(image, probabilities, params):
    """Algorithm 1 with the kernels as full (N, N) matrices, in float64."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    places = np.stack([x, y], axis=-1).reshape(-1, 2)
    bilateral = np.concatenate([places / params.bilateral_sxy, image.reshape(-1, 3) / params.bilateral_srgb], axis=1)
    total = 0
    gaussian = places / params.gaussian_sxy
    for features, compat in ((gaussian, params.gaussian_compat), (bilateral, params.bilateral_compat)):
        kernel = np.exp(-((features[:, None] - features[None]) ** 2).sum(axis=2) / 2)
        scale = 1 / np.sqrt(kernel.sum(axis=1))
        total = total + compat * scale[:, None] * kernel * scale
    unary = energy(probabilities)[0].reshape(len(probabilities), -1).astype(np.float64)
    belief = np.exp(-unary)
    for _ in range(params.iterations):
        logits = belief @ total - unary
        belief = np.exp(logits - logits.max(axis=0))
        belief /= belief.sum(axis=0)
    return belief.reshape(probabilities.shape)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("params", [CRFParams(3, 3, 20, 13, 4, 5), CRFParams(2, 1, 6, 30, 2, 1)])
def test_it_is_close_to_the_dense_kernel_matrix(params, classes):
    image, probabilities = scene(17, 23, classes)
    found, expected = dense_crf(image, probabilities, params, "torch"), dense_mean_field(image, probabilities, params)
    same = (found.argmax(axis=0) == expected.argmax(axis=0)).mean()
    error = abs(found - expected).mean()
    assert same > 0.97 and error < 0.03, f"argmax agrees on {same:.1%}, the posterior differs by {error:.4f} on average"


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("size, classes", [((65, 97), 2), ((61, 40), 5)])
def test_it_agrees_with_pydensecrf(preset, size, classes):
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf cannot be imported, so there is no oracle")
    image, probabilities = scene(*size, classes)
    found, expected = (dense_crf(image, probabilities, PRESETS[preset], backend) for backend in ("torch", "pydensecrf"))
    same = (found.argmax(axis=0) == expected.argmax(axis=0)).mean()
    error = abs(found - expected).max()
    assert same >= 0.999 and error < 0.02, f"{preset}: argmax agrees on {same:.2%}, posterior within {error:.1e}"


def test_one_row_of_pixels_agrees_with_pydensecrf():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf cannot be imported, so there is no oracle")
    image, probabilities = scene(1, 57, 3)
    found, expected = (dense_crf(image, probabilities, PRESETS["psa"], backend) for backend in ("torch", "pydensecrf"))
    error = abs(found - expected).max()
    assert error < 1e-3, f"largest difference {error:.1e}"


@pytest.mark.parametrize("backend", ["pydensecrf", "torch"])
def test_fields_over_one_image_come_out_as_each_alone(backend):
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf cannot be imported")
    image, _ = scene(33, 47)
    fields = np.stack([scene(33, 47, 3, seed)[1] for seed in range(3)])
    together = dense_crf(image, fields, PRESETS["psa"], backend)
    for field, found in zip(fields, together):
        alone = dense_crf(image, field, PRESETS["psa"], backend)
        error = abs(alone - found).max()
        assert error == 0 if backend == "pydensecrf" else error < 1e-4, f"{backend}: differ by {error:.1e}"


def test_images_of_several_sizes_and_numbers_of_classes_come_out_as_each_alone():
    scenes = [scene(33, 47, 2), scene(20, 61, 4, 1), scene(1, 9, 1, 2), scene(33, 47, 3, 3)]
    images, energies = [image for image, _ in scenes], [energy(probabilities) for _, probabilities in scenes]
    for (image, probabilities), found in zip(scenes, mean_field(images, energies, PRESETS["psa"])):
        (alone,) = mean_field([image], [energy(probabilities)], PRESETS["psa"])
        error = abs(alone - found).max()
        assert found.shape == (1, *probabilities.shape) and error < 1e-3, f"{found.shape}: differ by {error:.1e}"
        assert abs(found.sum(axis=1) - 1).max() < 1e-5


@pytest.mark.filterwarnings("error")
def test_images_that_cannot_be_written_to_are_taken_without_a_warning():
    image, probabilities = scene(12, 19)
    (expected,) = mean_field([image], [energy(probabilities)], PRESETS["psa"])
    image.flags.writeable = False
    (found,) = mean_field([image], [energy(probabilities)], PRESETS["psa"])
    assert (found == expected).all(), f"largest difference {abs(found - expected).max():.1e}"


def test_images_of_one_size_share_the_lattice_of_places():
    module._gaussian.cache_clear()
    for seed in range(3):
        image, probabilities = scene(12, 19, seed=seed)
        mean_field([image], [energy(probabilities)], PRESETS["psa"])
    assert module._gaussian.cache_info()[:2] == (2, 1), module._gaussian.cache_info()


def test_widths_far_below_a_pixel_are_refused():
    image, probabilities = scene(9, 9)
    with pytest.raises(ValueError, match="give larger widths"):
        dense_crf(image, probabilities, replace(PRESETS["psa"], bilateral_srgb=1e-6), "torch")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'numpy'; give one of pydensecrf, torch"):
        dense_crf(*scene(9, 9), PRESETS["psa"], "numpy")


def test_torch_does_without_pydensecrf(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    found = dense_crf(*scene(9, 9), PRESETS["psa"], "torch")
    assert found.shape == (2, 9, 9)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_gpu_finds_what_the_cpu_finds(preset):
    image, probabilities = scene(131, 97, 3)
    found, expected = (dense_crf(image, probabilities, PRESETS[preset], "torch", device) for device in ("cuda", "cpu"))
    same = (found.argmax(axis=0) == expected.argmax(axis=0)).mean()
    assert same >= 0.999, f"{preset}: argmax agrees on {same:.2%}, posterior within {abs(found - expected).max():.1e}"
