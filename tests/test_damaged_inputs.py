"""2,480 seeded damages over all readers: each is refused in one line, or read as an independent reader reads it."""
import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as rle
from trees import annotation, make_coco, opened

from utils.datasets import coco as layout
from utils.datasets.voc import CLASSES
from utils.errors import UserError
from utils.files import load_cam, save_cam
from utils.images import read_image
from utils.labels import read_mask, save_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, on what it can still read
NAMES = ["a", "b.c", "d e", "#f", "g,h", 'i"j', "ü", "-", "0", "NaN", "con", "x" * 90, "a.png", "../a", "a\\b", ""]
WORDS = ["cat", "dog", "Cat", "cat;dog", ";", "", '"cat', '"cat"', "background", " cat ", "a,b", "\t", "#", "$x^2$",
         "\ufeff"]


def flip(data, rng):
    """Bytes with a few flipped bits."""
    data = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 8)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def cut(data, rng):
    return data[:rng.integers(0, len(data))]


def swap(data, rng):
    """Bytes of which two stretches have changed places."""
    first, second, third = sorted(rng.integers(0, len(data), 3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def stretch(data, rng):
    at = rng.integers(0, len(data))
    return data[:at] + rng.integers(0, 256, rng.integers(1, 40), dtype=np.uint8).tobytes() + data[at:]


DAMAGES = (flip, flip, cut, swap, stretch)


def damaged(data, rng):
    return DAMAGES[rng.integers(len(DAMAGES))](data, rng)


def read_or_refused(read):
    """What `read` returns, or None if it refuses in one line; anything else it raises fails the test."""
    try:
        return read()
    except UserError as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return None


# --- pictures --------------------------------------------------------------------------------------------------------

def pictures(rng):
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    image, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    made = [("JPEG", image), ("PNG", image), ("PNG", image.convert("P")), ("PNG", image.convert("RGBA")), ("GIF", grey),
            ("BMP", image), ("TIFF", grey), ("WEBP", image), ("PPM", image),
            ("PNG", Image.fromarray(pixels[..., 0].astype(np.uint16) << 8))]
    for kind, one in made:
        buffer, exif = io.BytesIO(), one.getexif()
        exif[0x0112] = int(rng.integers(0, 12))
        one.save(buffer, kind, **({} if kind in ("BMP", "PPM", "GIF") else {"exif": exif}))
        yield buffer.getvalue()


def by_pillow(path):
    """Pixels as Pillow alone reads and displays them; None for what it refuses, or for more than 8 bits."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                return None
            stored = "exif" not in image.info or image.getexif().get(0x0112, 1) not in range(1, 9)
            shown = image if stored else ImageOps.exif_transpose(image)
            if shown.has_transparency_data:
                shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown.convert("RGBA"))
            return np.asarray(shown.convert("RGB"))
    except Exception:
        return None


@pytest.mark.parametrize("seed", range(8))
def test_damaged_pictures(tmp_path, seed):
    rng, path = np.random.default_rng(seed), tmp_path / "a.jpg"
    for data in pictures(rng):
        for _ in range(10):
            path.write_bytes(damaged(data, rng))
            found, expected = read_or_refused(partial(read_image, path, displayed=True)), by_pillow(path)
            if expected is not None:
                assert found is not None and np.array_equal(found, expected), path.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_masks(tmp_path, seed):
    rng, path = np.random.default_rng(seed), tmp_path / "a.png"
    save_mask(path, rng.integers(0, 5, (13, 17)))
    data = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damaged(data, rng))
        found = read_or_refused(partial(read_mask, path))
        if found is not None:
            with Image.open(path) as image:
                assert image.mode in "PL" and np.array_equal(found, np.asarray(image))


# --- arrays ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_damaged_arrays(tmp_path, seed):
    rng = np.random.default_rng(seed)
    save_cam(tmp_path, "a", [0, 2], rng.random((2, 5, 6)), (20, 24))
    data, whole = (tmp_path / "a.npz").read_bytes(), load_cam(tmp_path, "a")
    for _ in range(60):
        (tmp_path / "a.npz").write_bytes(damaged(data, rng))
        found = read_or_refused(partial(load_cam, tmp_path, "a"))
        if found is not None:  # the archive's checksums vouch for its contents
            assert all(np.array_equal(one, other) for one, other in zip(found, whole))


# --- tables ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
def test_odd_tables_of_labels(tmp_path, seed):
    rng = np.random.default_rng(seed)
    (tmp_path / "images").mkdir()
    for name in ("a", "b.c", "d e", "#f", "ü", "0", "NaN"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    for _ in range(60):
        rows = [f"{NAMES[rng.integers(len(NAMES))]},{WORDS[rng.integers(len(WORDS))]}"
                for _ in range(rng.integers(1, 5))]
        data = "\n".join(rows).encode()
        if rng.random() < 0.3 and data:
            data = damaged(data, rng)
        (tmp_path / "labels.csv").write_bytes(data)
        dataset = read_or_refused(partial(opened, "folder", tmp_path))
        if dataset is None:
            continue
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
        expected = list(csv.reader([line for line in lines if line and not line.startswith("# ")]))
        assert len(dataset) == len(expected), (data, dataset.ids)
        for index, (image_id, classes) in enumerate(expected):
            named = {name.strip() for name in classes.split(";")} - {""}
            assert dataset.files[index].startswith(image_id.strip().removesuffix(".png")), (data, dataset.files)
            assert {dataset.classes[k] for k in np.flatnonzero(dataset.labels[index])} == named, data


@pytest.mark.parametrize("seed", range(5))
def test_damaged_annotations_of_voc(tmp_path, seed):
    from utils.datasets.voc import _xml_classes
    rng, path = np.random.default_rng(seed), tmp_path / "a.xml"
    data = annotation([("cat", False), ("dog", True), ("cow", False)]).encode()
    for _ in range(60):
        path.write_bytes(damaged(data, rng))
        found = read_or_refused(partial(_xml_classes, path, True))
        if found is not None:
            shown = {part.findtext("name").strip() for part in ElementTree.parse(path).getroot().iter("object")
                     if part.findtext("name")}
            assert {CLASSES[k] for k in found} >= shown & set(CLASSES), path.read_text()


# --- COCO's JSON -----------------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1, 7, "7", 1.5, 1e300, "", "x", [], {}, [1, 2], [[1, 1, 9, 1, 9, 9]], {"size": [51, 74]},
          {"size": [51, 74], "counts": [3774]}, {"size": [51, 74], "counts": "Pm3"}, "a/b.jpg", "\ud83d\ude00"]


@pytest.mark.parametrize("seed", range(8))
def test_swapped_fields_of_cocos_json(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    make_coco(tmp_path / "coco", train=4, val=1)
    source, rng = tmp_path / "coco/annotations/instances_train2014.json", np.random.default_rng(seed)
    text = source.read_text()
    for number in range(60):
        content = json.loads(text)
        for _ in range(rng.integers(1, 3)):
            row = content[("images", "categories", "annotations")[rng.integers(3)]]
            one = row[rng.integers(len(row))]
            one[list(one)[rng.integers(len(one))]] = VALUES[rng.integers(len(VALUES))]
        data = json.dumps(content).encode()
        source.write_bytes(damaged(data, rng) if number % 6 == 0 else data)
        table = read_or_refused(partial(layout._parse, source))
        if table is not None:
            check_shapes(table, json.loads(source.read_bytes()))


def check_shapes(table, content):
    """The masks of a table against those that pycocotools makes of the JSON's valid shapes."""
    assert table["first"][-1] == len(table["category"]) <= len(content["annotations"])
    for image in content["images"]:
        stem = image["file_name"].replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
        row = table["stems"].tolist().index(stem.encode())
        expected = np.zeros((image["height"], image["width"]), bool)
        for one in content["annotations"]:
            if str(one["image_id"]) == str(image["id"]):
                expected |= shown_by(one["segmentation"], expected.shape)
        assert np.array_equal(layout.render(table, row) > 0, expected), stem


def shown_by(shape, size):
    """What pycocotools makes of a shape, bool (H, W); nothing of polygons of fewer than three points."""
    if isinstance(shape, list):
        shape = [part for part in shape if len(part) >= 6]
        return rle.decode(rle.merge(rle.frPyObjects(shape, *size))).astype(bool) if shape else np.zeros(size, bool)
    return rle.decode(rle.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape).astype(bool)
