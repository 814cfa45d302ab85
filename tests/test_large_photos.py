"""Photos larger than the networks use: decoded smaller, with masks at full size all the same."""
import json

import numpy as np
import pytest
from PIL import Image
from script_runs import MACHINE, STAGE2, run

from src import masks
from utils.crf import CRF, PRESETS
from utils.grids import resize_image
from utils.images import read_image, read_reduced

SIZE = (480, 720)


def drawn(size=SIZE):
    """A picture of smooth colours and sharp edges, uint8 (H, W, 3)."""
    y, x = np.mgrid[:size[0], :size[1]] / max(size)
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(5 * y - x), np.sin(3 * x * y)], axis=-1) * 60 + 120
    waves[(y - 0.3) ** 2 + (x - 0.5) ** 2 < 0.02] += 70
    return waves.clip(0, 255).astype(np.uint8)


def written(path, **keywords):
    Image.fromarray(drawn()).save(path, **keywords)
    return path


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp"])
@pytest.mark.parametrize("used, factor", [(None, 1), (720, 1), (181, 1), (180, 2), (91, 2), (90, 4), (45, 8), (1, 8)])
def test_a_picture_comes_smaller_if_twice_what_is_used_remains(tmp_path, name, used, factor):
    path = written(tmp_path / name, quality=95)
    reduced, size = read_reduced(path, used)
    assert size == SIZE and reduced.shape == (SIZE[0] // factor, SIZE[1] // factor, 3), (size, reduced.shape)
    assert used is None or factor == 1 or max(reduced.shape) >= 2 * used, f"{reduced.shape} for {used}"
    small = (20, 30)
    gap = abs(resize_image(reduced, small).astype(int) - resize_image(read_image(path), small).astype(int))
    assert gap.max() <= 3, f"up to {gap.max()} of 255 from the picture at full size"


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_a_turned_photo_comes_smaller_and_turned(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    path = written(tmp_path / name, exif=exif)
    reduced, size = read_reduced(path, 90, displayed=True)
    assert size == SIZE[::-1] and reduced.shape[:2] == (180, 120), (size, reduced.shape)
    stored, _ = read_reduced(path, 90)
    assert (reduced == np.rot90(stored, -1)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_other_kinds_of_pictures_come_smaller_too(tmp_path, mode):
    grey = Image.fromarray(drawn()[..., 0])
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    path = tmp_path / f"photo.{'jpg' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    reduced, size = read_reduced(path, 90)
    full = resize_image(read_image(path), reduced.shape[:2]).astype(int)
    gap = abs(reduced - full).mean()
    assert size == SIZE and reduced.shape == (120, 180, 3) and gap < 2, (size, reduced.shape, gap)


@pytest.mark.parametrize("crf", [None, CRF(PRESETS["psa"], "torch", "cpu")])
def test_the_mask_of_a_small_copy_is_that_of_the_photo_and_is_made_in_bands(monkeypatch, crf):
    image, keys = drawn(), np.array([2, 5])
    scores = np.random.default_rng(1).random((3, 30, 45), np.float32)
    scores /= scores.sum(axis=0)
    whole = masks.decide(image, keys, scores, crf, 90, 0.4)
    small = resize_image(image, (60, 90))
    monkeypatch.setattr(masks, "BAND", 3 * 720 * 7)  # seven rows
    banded = masks.decide(small, keys, scores, crf, 90, 0.4, image.shape[:2])
    assert whole.shape == banded.shape == SIZE
    differ = (whole != banded).mean()
    assert differ < 1e-4, f"{differ:.2%} of the pixels differ"


def test_a_large_photo_gets_a_mask_of_its_size_and_an_overlay_of_a_part_of_it(pipeline, tmp_path):
    Image.fromarray(drawn((3000, 4400))).save(tmp_path / "large.jpg")
    run(tmp_path, "run_inference.py", "--images", "large.jpg", "--model_path", pipeline.folder / STAGE2, *MACHINE)
    out = tmp_path / "output" / "images"
    with Image.open(out / "large.png") as mask, Image.open(out / "large_overlay.png") as overlay:
        assert mask.size == (4400, 3000) and overlay.size[0] == 2200 and overlay.size[1] >= 1500, overlay.size
    assert "large.png" in json.loads((out / "wsss_images.json").read_text())["results"]
