"""Label maps: the VOC palette, and masks that survive their files or are refused."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.labels import read_mask, save_mask, voc_palette

# VOC development kit: background, aeroplane, ..., tv monitor.
VOC_COLOURS = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128),
    (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128),
    (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128)]


def test_palette_has_the_known_voc_colours():
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8, f"{palette.shape} {palette.dtype}"
    wrong = [(k, tuple(palette[k])) for k, colour in enumerate(VOC_COLOURS) if tuple(palette[k]) != colour]
    assert not wrong, f"{len(wrong)} colours differ: {wrong}"
    assert tuple(palette[255]) == (224, 224, 192), f"ignore is {tuple(palette[255])}"
    assert len({tuple(colour) for colour in palette}) == 256, "two classes share a colour"


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_a_mask_survives_its_file_at_an_odd_size(tmp_path, dtype):
    mask = np.random.default_rng(0).integers(0, 256, (65, 97)).astype(dtype)
    save_mask(tmp_path / "a.png", mask)
    back = read_mask(tmp_path / "a.png")
    assert back.dtype == np.uint8 and back.shape == mask.shape, f"{back.dtype} {back.shape}"
    assert (back == mask).all(), f"{(back != mask).sum()} of {mask.size} pixels changed"


def test_a_mask_file_is_a_palette_png_in_voc_colours(tmp_path):
    save_mask(tmp_path / "a.png", np.array([[0, 1], [38, 255]], np.uint8))
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode) == ("PNG", "P"), f"{image.format} {image.mode}"
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    expected = voc_palette()[[0, 1, 38, 255]]
    assert (colours == expected).all(), f"{colours.tolist()}, not {expected.tolist()}"


def test_a_grey_mask_is_read_as_indices(tmp_path):
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(mask).save(tmp_path / "grey.png")
    assert (read_mask(tmp_path / "grey.png") == mask).all(), f"{read_mask(tmp_path / 'grey.png')}"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "I;16", "LA"])
def test_a_picture_that_is_no_mask_is_refused_with_its_name_and_the_remedy(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "colours.png")
    with pytest.raises(UserError, match=r"colours\.png.*mode.*save_mask"):
        read_mask(tmp_path / "colours.png")


@pytest.mark.parametrize("mask", [np.zeros((3, 4), np.float32), np.zeros((3, 4, 3), np.uint8), np.full((3, 4), 256),
                                  np.full((3, 4), -1), np.zeros((0, 4), np.uint8)])
def test_an_array_that_is_no_mask_is_refused_and_leaves_nothing_behind(tmp_path, mask):
    with pytest.raises(ValueError, match=r"a\.png"):
        save_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir()), f"left behind: {list(tmp_path.iterdir())}"


def test_a_failed_write_keeps_the_old_mask_and_no_temporary_file(tmp_path, monkeypatch):
    old = np.ones((3, 4), np.uint8)
    save_mask(tmp_path / "a.png", old)

    def fail(self, path, format):
        Path(path).write_bytes(b"half a pi")
        raise OSError("disk full")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_mask(tmp_path / "a.png", old + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], f"{list(tmp_path.iterdir())}"
    assert (read_mask(tmp_path / "a.png") == old).all(), "the old mask is gone"


def test_a_missing_mask_is_refused_with_its_path(tmp_path):
    with pytest.raises(UserError, match=r"no mask .*a\.png; run the step that writes it"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("cut", [0, 20, 90])
def test_a_damaged_mask_is_refused_with_its_path(tmp_path, cut):
    save_mask(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:len(whole) * cut // 100])
    with pytest.raises(UserError, match=r"cannot decode .*a\.png"):
        read_mask(tmp_path / "a.png")
