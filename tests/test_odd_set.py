"""One dataset with every harmless oddity at once, through the six steps, to scores that are right by construction."""
import json
import shutil
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from script_runs import MACHINE, SMALL, STAGE2, chain, copy, files, finish, read_json, run, start
from trees import draw, opened

from utils.labels import read_mask, save_mask

CLASSES = ["$x^2$", "chât", "two words"]
ODD = {"a": ".png", "img.v1": ".JPG", "two words": ".tif", "#5": ".webp", "ü": ".png", "grey": ".png", "twelve": ".tif",
       "clear": ".png", "f": ".gif", "test 1": ".bmp", "test.2": ".jpeg"}
TESTED = ("test 1", "test.2")
DATA = "data/mine"


def save_odd(path, image, number):
    """Save displayed pixels in a way of their own: turned with a note in EXIF, grey, of 12 bits, with a palette."""
    picture = Image.fromarray(image[..., 0].astype(np.uint16) * 16 if path.stem == "twelve" else image)
    if path.stem == "grey":
        picture = picture.convert("L")
    if path.stem == "clear":
        picture = picture.convert("RGBA")
    exif, keywords = picture.getexif(), {}
    if path.suffix in (".JPG", ".jpeg", ".webp", ".png"):
        exif[0x0112] = (6, 3, 8, 1)[number % 4]
        picture = picture.transpose({6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180,
                                     8: Image.Transpose.ROTATE_270}[exif[0x0112]]) if number % 4 != 3 else picture
        keywords = {"exif": exif}
    if path.suffix in (".JPG", ".jpeg"):
        keywords.update(quality=95, format="JPEG")
    picture.save(path, **keywords)


def make_odd(root):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    rows = []
    for number, (image_id, suffix) in enumerate(ODD.items()):
        image, ((top, left, bottom, right),) = draw(rng, [number % 3])
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[top:bottom, left:right] = number % 3 + 1
        stem = unicodedata.normalize("NFD", image_id)
        save_odd(root / "images" / f"{stem}{suffix}", image, number)
        save_mask(root / "masks" / f"{stem}.png", mask)
        name = f"{image_id}{suffix}" if number % 2 else image_id
        rows.append(f'"{name}", {CLASSES[number % 3]} ' if number % 3 else f"{name},{CLASSES[0]};")
    (root / "labels.csv").write_bytes(("\ufeff# made by hand\r\n\r\nimage_id,classes\r\n" + "\r\n".join(rows)).encode())
    (root / "train.txt").write_text("\n".join(image_id for image_id in ODD if image_id not in TESTED))
    (root / "test.txt").write_text("\n".join(TESTED))
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(root / "images" / "._a.png")
    (root / "images" / "notes.txt").write_text("x")
    (root / "images" / "inner").mkdir()


@chain
def odd_run(folder, get):
    make_odd(folder / DATA)
    data = ("--dataset", "folder", "--data_root", DATA)
    first = (*SMALL, "--crop_size", 65, "--batch_size", 4, "--scales", 1)
    shutil.copytree(folder / DATA / "masks", folder / "drawn")
    runs = {1: run(folder, "run_train.py", "--stage", 1, *data, *first),
            2: run(folder, "run_train.py", "--stage", 2, *SMALL, "--batch_size", 4),
            3: run(folder, "run_inference.py", "--model_path", STAGE2, *MACHINE),
            4: run(folder, "run_eval.py", "--mask_dir", "output/inference", *MACHINE),
            "drawn": run(folder, "run_eval.py", "--mask_dir", "drawn", *data, *MACHINE, "--output_dir", "output/drawn"),
            5: run(folder, "train_deeplab.py", *data, "--mask_dir", "drawn", *SMALL, "--batch_size", 4,
                   "--crop_size", 65),
            6: run(folder, "test_deeplab.py", "--scales", 1, *MACHINE),
            "images": run(folder, "test_deeplab.py", "--images", f"{DATA}/images", "--scales", 1, *MACHINE)}
    return SimpleNamespace(folder=folder, runs=runs, root=folder / DATA)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def brute_force_iou(pairs, classes):
    """IoU of each class, counted pixel by pixel over (mask, truth) pairs."""
    found = []
    for k in range(classes + 1):
        both = sum(int(((mask == k) & (truth == k)).sum()) for mask, truth in pairs)
        either = sum(int(((mask == k) | (truth == k)).sum()) for mask, truth in pairs)
        found.append(both / either if either else None)
    return found


def truth_of(root, image_id):
    return read_mask(root / "masks" / f"{unicodedata.normalize('NFD', image_id)}.png")


def test_what_was_drawn_scores_1(odd_run):
    record = read_json(odd_run.folder / "output/drawn/scores.json")
    assert record["classes"] == CLASSES and record["images"] == len(ODD) - len(TESTED), record["classes"]
    assert record["scores"]["masks"]["fixed"]["miou"] == 1, record["scores"]["masks"]


@pytest.mark.parametrize("home, masks, split", [("eval", "inference", "train"),
                                                ("deeplab_test", "deeplab_test/masks", "test")])
def test_scores_are_those_counted_pixel_by_pixel_on_the_displayed_photos(odd_run, home, masks, split):
    record, out = read_json(odd_run.folder / "output" / home / "scores.json"), odd_run.folder / "output"
    ids = [image_id for image_id in ODD if (image_id in TESTED) == (split == "test")]
    assert record["split"] == split and sorted(record["image_fg_iou"]) == sorted(ids)
    pairs = [(read_mask(out / masks / f"{image_id}.png"), truth_of(odd_run.root, image_id)) for image_id in ids]
    assert all(mask.shape == truth.shape for mask, truth in pairs)
    last = list(record["scores"])[-1]
    expected = brute_force_iou(pairs, len(CLASSES))
    for iou, known in zip(record["scores"][last]["fixed"]["iou"], expected):
        assert iou == known or abs(iou - known) < 1e-6, (record["scores"][last]["fixed"]["iou"], expected)


def test_a_missing_mask_stops_step_6_before_its_work(odd_run, tmp_path):
    folder = copy(odd_run.folder, tmp_path / "copy", without=("deeplab_test",))
    (folder / DATA / "masks" / "test 1.png").unlink()
    done = finish(start(folder, "test_deeplab.py", "--scales", 1, *MACHINE))
    said = "1 of the 2 images of split test in data/mine have no ground truth, such as test 1"
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1], done.stderr
    assert not (folder / "output/deeplab_test").exists()


def test_each_photo_is_read_as_it_is_displayed(odd_run):
    rng, dataset = np.random.default_rng(0), opened("folder", odd_run.root, "all")
    assert dataset.ids == list(ODD), dataset.ids
    for number, image_id in enumerate(ODD):
        image, _ = draw(rng, [number % 3])
        found = dataset.image(number).astype(int)
        grey = image_id in ("grey", "twelve")
        expected = np.asarray(Image.fromarray(image).convert("L"))[..., None] if image_id == "grey" else image
        expected = image[..., :1] if image_id == "twelve" else expected
        bound = 1 if ODD[image_id].lower() not in (".jpg", ".jpeg", ".webp", ".gif") else 40
        assert found.shape == image.shape and np.median(abs(found - expected)) <= bound, (image_id, grey)
        assert np.array_equal(np.flatnonzero(dataset.labels[number]), [number % 3])


def test_each_oddity_is_said_at_most_once_a_run(odd_run):
    for step, finished in odd_run.runs.items():
        lines = [line for line in finished.stderr.splitlines() if line.startswith(("WARNING", "Note", "Left out"))]
        assert len(lines) == len(set(lines)) and len(lines) <= 3, (step, lines)
    assert "Left out in data/mine/images, as they are no image files: inner/, notes.txt" in \
        odd_run.runs["images"].stderr


def test_images_get_masks_of_the_displayed_size_by_deeplab(odd_run):
    out = odd_run.folder / "output/images"
    names = {path.stem for path in out.glob("*.png") if not path.stem.endswith("_overlay")}
    assert len(names) == len(ODD), names
    for image_id in ODD:
        mask = read_mask(out / f"{unicodedata.normalize('NFD', image_id)}.png")
        assert mask.shape == truth_of(odd_run.root, image_id).shape, image_id
    assert len(json.loads((out / "wsss_images.json").read_text())["results"]) == 2 * len(ODD)
    assert not [name for name in files(odd_run.root) if "overlay" in str(name)]
