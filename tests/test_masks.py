"""Masks of single images, and what lies beside them in their folder."""
import numpy as np
import pytest

from data.make_toy import make_toy
from src.eval import WRITTEN, remove_earlier
from src.masks import MaskConfig, overlay_path, read_checked, write_mask
from utils.config import DataConfig
from utils.datasets import open_split
from utils.errors import UserError
from utils.files import contents_hash, save_scores
from utils.labels import save_mask


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(image id, that image alone as a split)."""
    root = tmp_path_factory.mktemp("toy")
    make_toy(root, train=3, test=3, classes=3, size=48)
    split = open_split(DataConfig("pet", str(root), "trainval"))
    return split.ids[0], split.subset([0])


def test_a_mask_that_is_made_again_without_overlay_takes_the_old_overlay_away(tmp_path, one):
    image_id, split = one
    save_scores(tmp_path / "scores", image_id, [0], np.full((2, 6, 6), 0.5), split.size(0))
    masks, how = tmp_path / "masks", MaskConfig(None, 48)
    write_mask(one, tmp_path / "scores", masks, how, overlays=True)
    assert overlay_path(masks, image_id).is_file()
    write_mask(one, tmp_path / "scores", masks, MaskConfig(None, 48, bg_threshold=0.9), overlays=False)
    assert not overlay_path(masks, image_id).exists(), "it shows the mask of before"


def test_scores_and_pictures_of_an_earlier_run_go_and_other_files_stay(tmp_path):
    for name in (*WRITTEN, "report.html", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    remove_earlier(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "report.html"]


def test_masks_of_equal_size_with_other_contents_are_told_apart(tmp_path):
    for folder, order in (("a", [1, 2]), ("b", [2, 1]), ("c", [1, 2])):
        save_mask(tmp_path / folder / "photo.png", np.array([order, order], np.uint8))
    a, b, c = (tmp_path / folder / "photo.png" for folder in "abc")
    assert a.stat().st_size == b.stat().st_size
    assert contents_hash([a]) == contents_hash([c]) != contents_hash([b])


def test_pixels_of_no_class_are_refused_with_the_reason_where_masks_are_scored(tmp_path):
    save_mask(tmp_path / "photo.png", np.array([[0, 1], [255, 1]], np.uint8))
    with pytest.raises(UserError, match=r"photo.png holds pixels of no class \(255\), which cannot be scored; give"):
        read_checked(tmp_path / "photo.png", (2, 2), classes=3)
    assert read_checked(tmp_path / "photo.png", (2, 2), classes=3, ignore=True).max() == 255
