"""Inputs of the real world, kind by kind: read by a stated rule, or refused in one line; never another picture, label
or mask in silence."""
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageOps
from script_runs import ROOT
from test_coco import change, mask_of, source
from test_datasets import assert_says, refusal
from trees import coco_annotation, coco_stem, make_voc, opened, save_grey, save_picture

from src import inference
from src.masks import MaskConfig
from src.segment import mask_reader
from utils import images as reading
from utils.config import MapConfig
from utils.datasets import base
from utils.datasets.__main__ import main as look_over
from utils.datasets.contradictions import check_against_labels
from utils.errors import ImageError, UserError
from utils.images import eight_bits, image_size, read_image, to_rgb
from utils.labels import read_mask
from utils.visualize import plot_bars

H, W = 6, 9


def turned_photo(path, orientation, size=(H, W), seed=0):
    """A picture with an EXIF orientation, without loss.  Returns (stored pixels, displayed pixels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    with Image.open(path) as again:
        return stored, np.asarray(ImageOps.exif_transpose(again))


# --- 1. orientation --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_read_as_pillow_displays_it_or_as_it_is_stored(tmp_path, orientation):
    stored, displayed = turned_photo(tmp_path / "a.png", orientation)
    assert np.array_equal(read_image(tmp_path / "a.png"), stored)
    assert np.array_equal(read_image(tmp_path / "a.png", displayed=True), displayed)
    assert image_size(tmp_path / "a.png", displayed=True) == displayed.shape[:2]


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photos_of_ones_own_and_their_masks_are_as_displayed(folder, orientation):
    stored, displayed = turned_photo(folder / "images" / "a.png", orientation)
    mask = (np.arange(displayed[..., 0].size).reshape(displayed.shape[:2]) % 3).astype(np.uint8)
    save_grey(folder / "masks" / "a.png", mask)
    dataset = opened("folder", folder)
    assert dataset.size(0) == displayed.shape[:2] and np.array_equal(dataset.image(0), displayed)
    assert np.array_equal(dataset.mask(0), mask)


def test_a_mask_that_was_drawn_on_stored_pixels_says_so_by_its_size(folder):
    stored, _ = turned_photo(folder / "images" / "a.png", 6)
    save_grey(folder / "masks" / "a.png", np.ones((H, W)))
    dataset = opened("folder", folder)
    assert dataset.size(0) == (H, W) and np.array_equal(dataset.image(0), stored) and dataset.mask(0).all()


def test_pet_reads_stored_pixels_unless_the_trimap_has_the_displayed_size(pet):
    stored, displayed = turned_photo(pet / "images" / "Persian_1.png", 6)
    (pet / "images" / "Persian_1.jpg").unlink()
    for size, expected in (((H, W), stored), ((W, H), displayed)):
        save_grey(pet / "annotations" / "trimaps" / "Persian_1.png", np.ones(size))
        assert np.array_equal(opened("pet", pet).image(0), expected), size


def test_where_no_size_tells_the_rule_that_holds_is_said_once(pet, folder, capsys, monkeypatch):
    monkeypatch.setattr(base, "_told", set())
    stored, displayed = turned_photo(pet / "images" / "Persian_1.png", 3, size=(H, 8))
    (pet / "images" / "Persian_1.jpg").unlink()
    turned_photo(folder / "images" / "a.png", 3, size=(H, 4))
    for _ in range(2):
        assert np.array_equal(opened("pet", pet).image(0), stored)
        opened("folder", folder).image(0)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert_says(said[0], "Persian_1.png has EXIF orientation 3", "--dataset pet are read as stored")
    assert_says(said[1], "--dataset folder are read as displayed")


def test_coco_follows_the_size_in_its_json(coco):
    name = f"{coco_stem('train2014', 1)}"
    path = coco / "train2014" / f"{name}.jpg"
    path.unlink()
    height, width = 51, 74
    stored, displayed = turned_photo(path.with_suffix(".png"), 8, size=(height, width))
    assert np.array_equal(opened("coco", coco).image(0), stored)
    _, displayed = turned_photo(path.with_suffix(".png"), 8, size=(width, height))
    assert np.array_equal(opened("coco", coco).image(0), displayed) and mask_of(coco, name).shape == (height, width)


class Everything:
    """Stands in for a pipeline: all foreground."""
    classes, maps = ["it"], MapConfig()

    def scores(self, image):
        return np.array([0]), np.stack([np.zeros(image.shape[:2]), np.ones(image.shape[:2])]).astype(np.float32)


def test_images_get_masks_of_the_displayed_size(tmp_path):
    _, displayed = turned_photo(tmp_path / "in" / "a.png", 6)
    paths = inference.list_images(tmp_path / "in")
    inference.run_images(Everything(), paths, tmp_path / "out", MaskConfig(None, 1024))
    assert read_mask(tmp_path / "out" / "a.png").shape == displayed.shape[:2]
    height, width = image_size(tmp_path / "out" / "a_overlay.png")
    assert height > displayed.shape[0] and width == displayed.shape[1], (height, width)


# --- 2. ground truth that contradicts the labels ---------------------------------------------------------------------

def own_set(root, classes, masks, labels=None):
    """A plain folder: masks {id: values}, labels {id: class names} (the first class, if left out)."""
    rows = []
    for image_id, values in masks.items():
        save_picture(root / "images" / f"{image_id}.png", np.shape(values))
        save_grey(root / "masks" / f"{image_id}.png", values)
        rows.append(f"{image_id},{classes[0] if labels is None else labels[image_id]}")
    (root / "labels.csv").write_text("\n".join(rows))
    (root / "classes.txt").write_text("\n".join(classes))
    return root


def contradiction(root, name="folder", split=None):
    with pytest.raises(UserError) as caught:
        check_against_labels(opened(name, root, split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


HALF = np.repeat([[0, 1]], H, axis=0)
CONTRADICTIONS = {
    "drawn 0/255": ({f"p{i}": HALF * 255 for i in range(4)}, ("none of the 4 masks looked at shows an object",
                                                               "draw class k as k, counted from 1")),
    "ignored throughout": ({f"p{i}": np.full((H, W), 255) for i in range(4)}, ("every pixel of the 4 masks", "is 255")),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_masks_are_refused_that_are(tmp_path, kind):
    masks, parts = CONTRADICTIONS[kind]
    assert_says(contradiction(own_set(tmp_path, ["cat"], masks)), tmp_path, *parts)


def test_masks_counted_from_0_are_refused(tmp_path):
    kinds = {f"p{i}": i % 3 for i in range(9)}
    masks = {image_id: np.full((H, W), kind) for image_id, kind in kinds.items()}
    labels = {image_id: "abc"[kind] for image_id, kind in kinds.items()}
    assert_says(contradiction(own_set(tmp_path, ["a", "b", "c"], masks, labels)),
                "in 6 of 9 images the mask shows classes that the labels lack, such as a in p1",
                "counted from 1, in the order of the classes (a, b, c)")


@pytest.mark.parametrize("count, refused", [(1, False), (2, False), (3, True)])
def test_of_one_or_two_masks_nothing_is_refused_but_said(tmp_path, capsys, count, refused):
    dataset = opened("folder", own_set(tmp_path, ["cat"], {f"p{i}": HALF * 255 for i in range(count)}))
    if refused:
        with pytest.raises(UserError, match="none of the 3 masks"):
            check_against_labels(dataset)
    else:
        check_against_labels(dataset)
        assert_says(capsys.readouterr().err, "WARNING", f"none of the {count} masks looked at shows an object")


@pytest.mark.parametrize("name", ["background", "Background", "__background__", "void"])
def test_a_background_among_the_classes_is_refused(tmp_path, name):
    own_set(tmp_path, [name, "cat"], {"p": HALF * 2}, {"p": "cat"})
    assert_says(refusal("folder", tmp_path), tmp_path / "classes.txt", f"lists '{name}' as a class",
                "0 is background")


def test_a_few_contradictions_are_a_warning_with_counts(tmp_path, capsys):
    masks = {f"p{i}": HALF * (1 if i else 2) for i in range(8)}
    check_against_labels(opened("folder", own_set(tmp_path, ["cat", "dog"], masks)))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert_says(said[0], "WARNING", "in 1 of 8 images the mask shows classes that the labels lack, such as dog in p0")
    assert_says(said[1], "the labels name classes that the mask lacks, such as cat in p0", "python -m utils.datasets")


def test_masks_that_fit_their_labels_say_nothing(tmp_path, coco, capsys):
    make_voc(tmp_path / "voc")
    for dataset in (opened("voc", tmp_path / "voc"), opened("coco", coco)):
        capsys.readouterr()
        check_against_labels(dataset)
        assert not capsys.readouterr().err


def test_crowds_alone_are_refused(coco):
    change(coco, lambda content: [one.update(iscrowd=1) for one in content["annotations"]])
    assert_says(contradiction(coco, "coco"), "none of the 8 masks looked at shows an object")


@pytest.mark.parametrize("edit, what", [
    (lambda text: "<annotation><segmented>1</segmented></annotation>", "lack"),
    (lambda text: text.replace("annotation>", "other>"), "refused"),
    (lambda text: text.replace("<annotation>", '<annotation xmlns="urn:voc">'), "read"),
    (lambda text: text.replace("object>", "Object>").replace("name>", "NAME>"), "read"),
])
def test_voc_annotations_without_objects_or_of_other_tags(tmp_path, edit, what):
    make_voc(tmp_path)
    before = opened("voc", tmp_path, "train").labels
    for path in (tmp_path / "Annotations").iterdir():
        path.write_text(edit(path.read_text()))
    if what == "read":
        assert np.array_equal(opened("voc", tmp_path, "train").labels, before)
    elif what == "refused":
        assert_says(refusal("voc", tmp_path, "train"), "is no annotation of VOC", "<other>")
    else:
        assert_says(contradiction(tmp_path, "voc", "train"), "in 8 of 8 images the mask shows classes that the labels "
                    "lack")


# --- 3. two files, one name ------------------------------------------------------------------------------------------

def test_two_images_of_one_id_are_refused(folder):
    save_picture(folder / "images" / "a.JPG")
    assert_says(refusal("folder", folder), "a.JPG and a.png, two images of one id", "keep one")


@pytest.mark.parametrize("names", [("cat", "CAT"), ("straße", "STRASSE")])
def test_ids_that_differ_in_case_only_are_refused(tmp_path, names):
    own_set(tmp_path, ["it"], dict.fromkeys(names, HALF))
    assert_says(refusal("folder", tmp_path), repr(names[0]), repr(names[1]), "rename one")


def test_two_images_of_one_stem_in_cocos_json_are_refused(coco):
    change(coco, lambda content: content["images"].append({"id": 1000, "file_name": f"{coco_stem('train2014', 1)}.png",
                                                           "height": 5, "width": 5}))
    assert_says(refusal("coco", coco), f"names '{coco_stem('train2014', 1)}' twice")


# --- 4. labels.csv, lists, classes.txt -------------------------------------------------------------------------------

def labelled(folder, text, encoding="utf-8"):
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return folder


LINES = {
    "an unbalanced quote": ('a,"tree\nb,\nc,sky\n', ("'a,\"tree'", "image_id,class")),
    "a quote in the middle of the file": ('a,tree\n"b,\nc,sky\n', ("'\"b,'",)),
    "two lines of one image": ("a,tree\na,sky\n", ("two lines for a",)),
    "two lines of one image, once with its suffix": ("a,tree\na.png,sky\n", ("two lines for a",)),
    "a class in two cases": ("a,tree\nb,Tree\nc,sky\n", ("spells one class 'Tree' and 'tree'",)),
    "a path": ("images/a.png,tree\n", ("'images/a.png'", "without folder")),
    "a path of Windows": ("images\\a.png,tree\n", ("'images\\\\a.png'", "without folder")),
    "no id": (",tree\n", ("',tree'",)),
    "a NUL": ("a,tr\0ee\n", ("NUL bytes",)),
}


@pytest.mark.parametrize("kind", LINES)
def test_labels_csv_is_refused_with(folder, kind):
    text, parts = LINES[kind]
    assert_says(refusal("folder", labelled(folder, text)), folder / "labels.csv", *parts)


def test_ids_with_dots_spaces_hashes_and_suffixes_are_read_as_they_are_written(tmp_path):
    names = ["img.v1", "two words", "#5", "plain", "img"]
    for number, name in enumerate(names):
        save_picture(tmp_path / "images" / f"{name}.png", (H, number + 2))
    labelled(tmp_path, "\ufeff# a comment\nimage_id,classes\n" + "".join(f"{name},it\n" for name in names[:3])
             + "plain.png,it\nimg,it\n")
    dataset = opened("folder", tmp_path)
    assert dataset.ids == names, dataset.ids
    assert [dataset.size(i)[1] for i in range(5)] == [2, 3, 4, 5, 6]
    (tmp_path / "train.txt").write_text("#5\nplain.png\n")
    assert opened("folder", tmp_path).ids == ["#5", "plain"]


def test_one_name_in_both_spellings_of_unicode_is_one_name(tmp_path):
    composed, apart = (unicodedata.normalize(form, "chât") for form in ("NFC", "NFD"))
    save_picture(tmp_path / "images" / f"{apart}.png")
    save_grey(tmp_path / "masks" / f"{apart}.png", np.ones((6, 8)))
    labelled(tmp_path, f"{composed},{apart}\n")
    (tmp_path / "classes.txt").write_text(composed)
    dataset = opened("folder", tmp_path)
    assert dataset.ids == dataset.classes == [composed] and dataset.labels.tolist() == [[1]]
    dataset.check_truth()
    assert dataset.mask(0).all() and dataset.image(0).shape == (6, 8, 3)


@pytest.mark.parametrize("file, text, parts", [
    ("train.txt", "a\nb\na\n", ("names 'a' twice",)),
    ("train.txt", "a\n" + "ä" * 101 + "\n", ("of 202 bytes", "more than 200 bytes", "shorten it")),
    ("classes.txt", "tree\nsky\ntree\n", ("names the class 'tree' twice",)),
    ("classes.txt", "tree\nsky\nSky\n", ("spells one class 'sky' and 'Sky'",)),
])
def test_a_list_that_repeats_itself_is_refused(folder, file, text, parts):
    (folder / file).write_text(text)
    assert_says(refusal("folder", folder), folder / file, *parts)


def test_vocs_lists_keep_ids_with_dots_and_spaces_and_take_paths_apart(tmp_path):
    make_voc(tmp_path)
    lines = {"img.v1": "img.v1", "two words": "two words", "2007_000001": "/JPEGImages/2007_000001.jpg /Aug/x.png",
             "2007_000002": "JPEGImages\\2007_000002.jpg", "2007_000003": "2007_000003  1"}
    for name in ("img.v1", "two words", "img"):
        save_picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text("<annotation/>")
    (tmp_path / "ImageSets" / "Segmentation" / "mine.txt").write_text("\n".join(lines.values()))
    dataset = opened("voc", tmp_path, "mine")
    assert dataset.ids == list(lines) and dataset.files[0] == "img.v1.jpg", (dataset.ids, dataset.files)


def test_an_id_listed_twice_is_refused_in_every_official_layout(tmp_path, pet):
    ids = make_voc(tmp_path / "voc")
    lists = {"voc": (tmp_path / "voc", tmp_path / "voc/ImageSets/Segmentation/train.txt", ids["train"][0]),
             "pet": (pet, pet / "annotations/trainval.txt", "Persian_1 6 1 1")}
    for name, (root, path, line) in lists.items():
        path.write_text(path.read_text() + line + "\n")
        assert_says(refusal(name, root, path.stem), path, f"{line.split()[0]!r} twice")


def test_ids_of_another_split_are_counted(folder, tmp_path, capsys):
    (tmp_path / "ids").write_text("a\nz\ny\n")
    assert opened("folder", folder, ids=tmp_path / "ids").ids == ["a"]
    assert_says(capsys.readouterr().err, "WARNING: 2 of the 3 ids in", "are not in split all")


# --- 5. pixel types --------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
DEPTHS = {"8 bits in 16": np.rint(RAMP * 255).astype(np.uint16), "12 bits": np.rint(RAMP * 4095).astype(np.uint16),
          "16 bits": np.rint(RAMP * 65535).astype(np.uint16), "32-bit integers": np.rint(RAMP * 65535).astype(np.int32),
          "floats to 1": RAMP.astype(np.float32), "floats to 255": (RAMP * 255).astype(np.float32)}


@pytest.mark.parametrize("kind", DEPTHS)
def test_a_picture_of_more_bits_is_the_same_picture_in_eight(tmp_path, kind):
    Image.fromarray(DEPTHS[kind]).save(tmp_path / "a.tif")
    found = read_image(tmp_path / "a.tif").astype(int)
    assert np.ptp(found, axis=2).max() == 0 and abs(found[..., 0] - RAMP * 255).max() <= 1, found[..., 0]


@pytest.mark.parametrize("values", [[[-1, 3]], [[0, 70000]], [[0.0, np.nan]], [[0.0, np.inf]], [[-0.5, 1.0]],
                                    [[0.0, 300.0]]])
def test_values_that_mean_no_picture_are_refused(tmp_path, values):
    values = np.array(values, np.int32 if isinstance(values[0][0], int) else np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="a.tif .*grey values"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(UserError, match="grey values"):
        to_rgb(Image.fromarray(values))


def test_eight_bits_states_its_rule_for_the_largest_value():
    assert eight_bits(np.array([255], np.uint16)) == 255 and eight_bits(np.array([256], np.uint16)) == 16
    assert eight_bits(np.array([4096], np.uint16)) == 16 and eight_bits(np.array([1.0])) == 255


def test_transparent_colours_of_a_palette_are_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    picture.putpalette([9, 9, 9, 200, 0, 0])
    picture.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 255, 255], [200, 0, 0]]]


# --- 6. COCO's JSON --------------------------------------------------------------------------------------------------

def first(content, part):
    return content[part][0]


JSON_FAULTS = {
    "255 categories": (lambda c: c.update(categories=[{"id": i, "name": f"c{i}"} for i in range(1, 256)]),
                       ("255 categories", "at most 254")),
    "no name": (lambda c: first(c, "categories").update(name=None), ("name None",)),
    "two names alike": (lambda c: first(c, "categories").update(name="DOG"), ("spells one class",)),
    "two ids alike": (lambda c: c["categories"].append({"id": "17", "name": "lynx"}), ("two categories of id 17",)),
    "an id that is none": (lambda c: first(c, "images").update(id=1.5), ("1.5 is no id of images",)),
    "a null file": (lambda c: first(c, "images").update(file_name=None), ("file_name None",)),
    "a size of text": (lambda c: first(c, "images").update(height="51"), ("height and width '51'",)),
    "no size": (lambda c: first(c, "images").update(height=0), ("height and width 0",)),
    "too few runs": (lambda c: first(c, "annotations").update(segmentation={"size": [58, 74], "counts": [5, 5]}),
                     ("its runs cover 10 pixels of 4292",)),
    "too many runs": (lambda c: first(c, "annotations").update(segmentation={"size": [58, 74], "counts": [4292, 9]}),
                      ("its runs cover 4301",)),
    "negative runs": (lambda c: first(c, "annotations").update(segmentation={"size": [58, 74], "counts": [4293, -1]}),
                      ("its runs cover",)),
    "compressed runs cut off": (lambda c: first(c, "annotations").update(segmentation={"size": [58, 74],
                                                                                       "counts": "PT1"}),
                                ("its runs",)),
    "compressed runs of other letters": (lambda c: first(c, "annotations").update(
        segmentation={"size": [58, 74], "counts": "é\x01"}), ("annotation",)),
    "coordinates of text": (lambda c: first(c, "annotations").update(segmentation=[["a"] * 6]), ("annotation",)),
    "coordinates far outside": (lambda c: first(c, "annotations").update(segmentation=[[1e12, 0, 3, 3, 0, 3]]),
                                ("leaves its image",)),
    "half a point": (lambda c: first(c, "annotations").update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ("x, y",)),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_cocos_json_is_refused_with(coco, fault):
    edit, parts = JSON_FAULTS[fault]
    change(coco, edit)
    assert_says(refusal("coco", coco), source(coco), *parts)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_coordinates_that_are_no_numbers_are_refused(coco, number):
    change(coco, lambda content: first(content, "annotations").update(segmentation=[[12345678, 0, 3, 3, 0, 3]]))
    source(coco).write_text(source(coco).read_text().replace("12345678", number))
    assert_says(refusal("coco", coco), source(coco))


def test_polygons_without_an_area_are_left_out_and_counted_once(coco, capsys):
    before = opened("coco", coco).labels
    change(coco, lambda content: content["annotations"].extend(
        coco_annotation(500 + i, 7, 90, shape) for i, shape in enumerate([[], [[]], [[1, 2]], [[1, 2, 3, 4]]])))
    capsys.readouterr()
    assert np.array_equal(opened("coco", coco).labels, before)
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(said) == 1 and "4 objects without any area" in said[0], said


HARMLESS = {
    "ids as text": lambda c: [one.update(id=str(one["id"])) for one in c["images"]],
    "categories as text": lambda c: [one.update(category_id=str(one["category_id"])) for one in c["annotations"]],
    "folders": lambda c: [one.update(file_name=f"train2014/{one['file_name']}") for one in c["images"]],
    "folders of Windows": lambda c: [one.update(file_name=f"train2014\\{one['file_name']}") for one in c["images"]],
    "addresses": lambda c: [one.update(file_name=f"http://host/a/{one['file_name']}?x=1/2") for one in c["images"]],
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_harmless_oddities_of_the_json_change_nothing(coco, oddity):
    before = opened("coco", coco)
    masks = [before.mask(i) for i in range(len(before))]
    change(coco, HARMLESS[oddity])
    after = opened("coco", coco)
    assert after.ids == before.ids and np.array_equal(after.labels, before.labels)
    assert all(np.array_equal(after.mask(i), mask) for i, mask in enumerate(masks))


def test_a_byte_order_mark_before_the_json_is_read(coco):
    before = opened("coco", coco).ids
    source(coco).write_bytes(b"\xef\xbb\xbf" + source(coco).read_bytes())
    assert opened("coco", coco).ids == before


def test_compressed_runs_that_fit_are_read(coco):
    from pycocotools import mask as rle
    shape = np.random.default_rng(0).integers(0, 2, (51, 74)).astype(np.uint8)
    packed = rle.encode(np.asfortranarray(shape))
    change(coco, lambda content: content.update(annotations=[coco_annotation(
        1, 7, 17, {"size": [51, 74], "counts": packed["counts"].decode()})]))
    assert np.array_equal(mask_of(coco, coco_stem("train2014", 1)) > 0, shape > 0)


# --- 7. folders of images --------------------------------------------------------------------------------------------

def test_every_suffix_counts_in_any_case_and_the_rest_is_named(tmp_path, capsys):
    for name in ("a.Jpg", "b.tif", "c.TIFF", "d.webp", "e.GIF", "f.bmp", "g.jfif", "h.ppm", "i.PNG"):
        Image.fromarray(np.full((4, 5, 3), 90, np.uint8)).save(tmp_path / name)
    Image.fromarray(np.full((4, 5, 3), 90, np.uint8)).save(tmp_path / "._j.jpg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "inner").mkdir()
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "broken.jpg")
    found = [path.name for path in inference.list_images(tmp_path)]
    assert found == ["a.Jpg", "b.tif", "c.TIFF", "d.webp", "e.GIF", "f.bmp", "g.jfif", "h.ppm", "i.PNG"], found
    assert_says(capsys.readouterr().err, "broken.jpg, inner/, notes.txt")


def test_photos_of_more_than_178_megapixels_need_a_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a.png has more than 178 megapixels; pass --large_images"):
        read_image(tmp_path / "a.png")
    monkeypatch.setenv("WSSS_LARGE_IMAGES", "")
    reading.allow_large_images()
    assert read_image(tmp_path / "a.png").shape == (6, 9, 3)


# --- 8. late failures ------------------------------------------------------------------------------------------------

def test_a_class_called_dollar_is_drawn_as_it_is_written(tmp_path):
    plot_bars(tmp_path / "a.png", ["$x^", "a$b$c", "\\frac{"], {"$": [0.1, 0.2, 0.3]}, "IoU")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_name_that_the_terminal_cannot_show_does_not_end_a_run():
    code = "from utils.runtime import run_main; run_main(lambda: print('chat: ch\u00e2t'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "chat: ch\\xe2t" in done.stdout, done


def test_masks_without_an_object_are_refused_before_deeplab_learns_them(folder, tmp_path):
    for image_id in "abc":
        save_grey(tmp_path / "made" / f"{image_id}.png", np.zeros((6, 4)))
    dataset = opened("folder", folder)
    with pytest.raises(UserError, match="none of the 3 masks looked at in .*made shows an object"):
        mask_reader(dataset, str(tmp_path / "made"))
    (tmp_path / "made" / "b.png").unlink()
    with pytest.raises(UserError, match="no mask .*b.png .and 0 more"):
        mask_reader(dataset, str(tmp_path / "made"))


def test_a_missing_mask_is_met_before_the_work(folder, pet):
    (folder / "masks" / "b.png").unlink()
    (pet / "annotations" / "trimaps" / "beagle_1.png").unlink()
    for name, root, image_id in (("folder", folder, "b"), ("pet", pet, "beagle_1")):
        with pytest.raises(UserError, match=f"1 of the 3 images .* have no ground truth, such as {image_id}"):
            opened(name, root).check_truth()


# --- 9. splits -------------------------------------------------------------------------------------------------------

def test_a_folder_with_a_test_list_is_tested_on_it(folder):
    from utils.datasets import DATASETS
    assert DATASETS["folder"].tested(folder) is None
    (folder / "test.txt").write_text("a\n")
    assert DATASETS["folder"].tested(folder) == "test"


# --- 10. a dataset looked over --------------------------------------------------------------------------------------

def test_a_dataset_is_looked_over_and_what_is_wrong_with_it_named(folder, tmp_path, capsys):
    save_grey(folder / "masks" / "c.png", [[0, 1, 1, 255]] * 6)
    assert look_over([str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert_says(said, "3 images, 2 classes", "sizes: 4x6 to 4x6", "images of each class: sky 2, tree 1",
                "1 images have none", "3 masks, 3 of them show an object", "DOUBTFUL: b: the mask shows classes")
    assert image_size(tmp_path / "out" / "folder_all.png")[1] > 300
    (folder / "images" / "a.png").write_bytes(b"x")  # and so its mask cannot be of its size
    (folder / "masks" / "b.png").unlink()
    assert look_over([str(folder), "--output_dir", str(tmp_path / "out")]) == 1
    assert_says(capsys.readouterr().out, "DAMAGED: cannot decode image", "MISSING OR DAMAGED: 2 masks")


# --- 11. hostile files -----------------------------------------------------------------------------------------------

def test_entities_that_grow_are_refused(tmp_path):
    ids = make_voc(tmp_path)
    entities = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(12))
    (tmp_path / "Annotations" / f"{ids['train'][0]}.xml").write_text(
        f"<!DOCTYPE annotation [{entities}]><annotation><object><name>&a12;</name></object></annotation>")
    assert_says(refusal("voc", tmp_path, "train"), f"{ids['train'][0]}.xml")


def test_json_nested_without_end_is_refused(coco):
    source(coco).write_text("[" * 200_000)
    assert_says(refusal("coco", coco), source(coco), "no JSON")


def test_arrays_that_unpack_to_gigabytes_are_refused(tmp_path):
    import zipfile

    from utils.files import load_cam
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("cam.npy", "w", force_zip64=True) as file:
            for _ in range(1100):
                file.write(bytes(1 << 20))
        archive.writestr("keys.npy", b"")
    with pytest.raises(UserError, match="a.npz is damaged or foreign .*more than a gigabyte"):
        load_cam(tmp_path, "a")


def test_an_array_that_claims_terabytes_is_refused(tmp_path):
    import io
    import zipfile

    from utils.files import load_cam
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 44,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("keys.npy", header.getvalue())
        archive.writestr("cam.npy", header.getvalue())
    with pytest.raises(UserError, match="a.npz is damaged or foreign"):
        load_cam(tmp_path, "a")


