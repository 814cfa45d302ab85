"""MS COCO 2014: splits, labels, rendered masks against pycocotools, the cache, prepared masks, and every refusal."""
import contextlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from test_datasets import assert_says, refusal
from trees import CATEGORIES, coco_annotation, coco_stem, opened, polygon, runs

from data.prepare_coco import main as prepare
from utils.datasets import coco as layout
from utils.errors import UserError
from utils.files import read_json
from utils.labels import read_mask


def source(root, split="train2014"):
    return root / "annotations" / f"instances_{split}.json"


def change(root, edit, split="train2014"):
    """Rewrite a JSON through a function."""
    content = json.loads(source(root, split).read_text())
    edit(content)
    source(root, split).write_text(json.dumps(content))


def mask_of(root, stem, split="train"):
    dataset = opened("coco", root, split)
    return dataset.mask(dataset.ids.index(stem))


def test_classes_follow_their_ids_with_the_gaps_closed(coco):
    assert opened("coco", coco).classes == list(CATEGORIES.values())


@pytest.mark.parametrize("split, count", [("train", 8), ("val", 4), ("val_labelled", 3)])
def test_images_without_an_object_are_left_out_of_training_and_kept_for_scoring(coco, split, count):
    dataset = opened("coco", coco, split)
    assert len(dataset) == count and dataset.ids == sorted(dataset.ids), dataset.ids
    empty = [image_id for image_id, row in zip(dataset.ids, dataset.labels) if not row.any()]
    assert empty == ([coco_stem("val2014", 4)] if split == "val" else []), empty


def test_labels_are_the_classes_of_an_images_objects(coco):
    dataset = opened("coco", coco)
    shown = [[dataset.classes[k] for k in np.flatnonzero(row)] for row in dataset.labels[:3]]
    assert shown == [["cat", "dog", "toothbrush"], ["dog", "toothbrush"], ["person", "toothbrush"]], shown


def test_an_image_of_a_crowd_alone_is_a_training_image(coco):
    def edit(content):
        content["annotations"] = [coco_annotation(1, 63, 1, runs(np.ones((59, 74), np.uint8)), crowd=1)]
    change(coco, edit)
    dataset = opened("coco", coco)
    assert dataset.ids == [coco_stem("train2014", 9)] and dataset.labels.tolist() == [[1, 0, 0, 0]], dataset.ids
    assert (dataset.mask(0) == 255).all()


def test_a_grey_image_reads_in_colour(coco):
    dataset = opened("coco", coco)
    assert dataset.image(1).shape == (52, 74, 3), dataset.image(1).shape


@pytest.mark.parametrize("split", ["train2014", "val2014"])
def test_masks_equal_pycocotools_own_rendering_where_objects_do_not_overlap(coco, split):
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(source(coco, split)))
    dataset = opened("coco", coco, split.removesuffix("2014"))
    order = sorted(CATEGORIES)
    for index, image_id in enumerate(dataset.ids):
        shapes = [(one["iscrowd"], order.index(one["category_id"]) + 1, reference.annToMask(one))
                  for one in reference.imgToAnns[7 * int(image_id[-12:])]]
        covered = sum((shape.astype(int) for _, _, shape in shapes), np.zeros(dataset.size(index), int))
        expected = sum((shape * (255 if crowd else value) for crowd, value, shape in shapes), np.zeros_like(covered))
        mask = dataset.mask(index)
        wrong = ((mask != expected) & (covered <= 1)).sum()
        assert wrong == 0 and (covered <= 1).mean() > 0.8, f"{image_id}: {wrong} pixels differ"


def test_the_smaller_of_two_objects_lies_on_top_and_objects_on_crowds(coco):
    values = mask_of(coco, coco_stem("train2014", 1))
    top, left = np.argwhere(values == 2)[0]  # the cat, with a toothbrush in its middle
    assert values[top + 4:top + 14, left + 4:left + 14].min() == 4, values[top + 8]
    crowded = mask_of(coco, coco_stem("train2014", 3))
    assert (crowded[2:5] == 255).all() and set(np.unique(crowded[12:20])) == {255, 4, 1}, np.unique(crowded[12:20])


@pytest.mark.parametrize("size", [(1, 1), (50, 74), (37, 5)])
def test_compressed_uncompressed_and_polygon_shapes_give_the_same_mask(size):
    from pycocotools import mask as rle
    shape = np.random.default_rng(0).integers(0, 2, size).astype(np.uint8)
    plain = layout._encoded(coco_annotation(1, 1, 1, runs(shape)), size, "x", "x.json")
    packed = rle.encode(np.asfortranarray(shape))
    packed["counts"] = packed["counts"].decode()
    compressed = layout._encoded(coco_annotation(1, 1, 1, packed), size, "x", "x.json")
    assert np.array_equal(rle.decode(plain), shape) and np.array_equal(rle.decode(compressed), shape)
    box = layout._encoded(coco_annotation(1, 1, 1, polygon((0, 0, *size))), size, "x", "x.json")
    assert rle.decode(box).all(), rle.decode(box)


def test_the_json_is_parsed_once_and_again_when_it_changes(coco, monkeypatch):
    expected = opened("coco", coco).labels
    layout._open_annotations.cache_clear()
    parse = layout._parse
    monkeypatch.setattr(layout, "_parse", lambda path: pytest.fail(f"parsed {path} again"))
    again = opened("coco", coco)
    assert np.array_equal(again.labels, expected) and not list(Path("output/cache").glob("*/*.pkl"))
    monkeypatch.setattr(layout, "_parse", parse)
    change(coco, lambda content: content["annotations"].clear() or content["annotations"].append(
        coco_annotation(5, 7, 18, polygon((1, 1, 9, 9)))))
    assert opened("coco", coco).labels.tolist() == [[0, 0, 1, 0]]


def test_a_file_of_more_objects_than_8_bits_count_is_read(coco):
    change(coco, lambda content: content.update(annotations=[
        coco_annotation(i, 7 * (i % 8 + 1), 18, polygon((1, 1, 2 + i % 40, 9))) for i in range(600)]))
    dataset = opened("coco", coco)
    table = layout.open_annotations(source(coco))
    assert len(table["area"]) == 600 and table["area"].max() == 40 * 8, table["area"].max()
    assert (dataset.mask(0)[1:3, 1:9] == 3).all()


def test_a_damaged_cache_is_refused(coco):
    opened("coco", coco)
    layout._open_annotations.cache_clear()
    for path in Path("output/cache").glob("coco_*/first.npy"):
        path.write_bytes(b"damaged")
    assert_says(refusal("coco", coco), "output/cache/coco_", "delete it and run again")


def test_a_split_of_one_image_is_small_when_it_is_sent_to_a_worker(coco):
    dataset = opened("coco", coco)
    for image_id, one in dataset:
        assert len(pickle.dumps(one)) < 2000 and one.ids == [image_id], len(pickle.dumps(one))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_prepared_masks_are_those_rendered_and_are_read_instead(coco, workers, monkeypatch, capfd):
    rendered = {split: [one.mask(0) for _, one in opened("coco", coco, split)] for split in ("train", "val")}
    prepare(["--data_root", str(coco), "--workers", workers])
    assert "Wrote 8 masks" in capfd.readouterr().out
    monkeypatch.setattr(layout, "render", lambda *_: pytest.fail("rendered again"))
    for split, masks in rendered.items():
        files = [one.mask(0) for _, one in opened("coco", coco, split)]
        assert all(map(np.array_equal, masks, files)), split


def test_prepared_masks_of_another_json_are_not_read(coco):
    prepare(["--data_root", str(coco), "--split", "train", "--workers", "0"])
    change(coco, lambda content: content["annotations"].clear() or content["annotations"].append(
        coco_annotation(5, 7, 18, polygon((0, 0, 51, 74)))))
    assert (opened("coco", coco).mask(0) == 3).all()


def test_prepared_masks_of_another_json_are_made_again_only_when_asked(coco):
    arguments = ["--data_root", str(coco), "--split", "train", "--workers", "0"]
    prepare(arguments)
    path = coco / "masks" / "train2014" / f"{coco_stem('train2014', 1)}.png"
    before = path.read_bytes()
    change(coco, lambda content: content["annotations"].clear() or content["annotations"].append(
        coco_annotation(5, 7, 18, polygon((0, 0, 51, 74)))))
    with pytest.raises(UserError) as caught:
        prepare(arguments)
    assert_says(str(caught.value), coco / "masks" / "train2014", "8 finished files", "annotations was", "--overwrite")
    assert path.read_bytes() == before
    prepare([*arguments, "--overwrite"])
    assert (read_mask(path) == 3).all() and len(list(path.parent.glob("*.png"))) == 1, list(path.parent.iterdir())


def test_the_record_of_prepared_masks_says_of_what_they_are(coco):
    prepare(["--data_root", str(coco), "--split", "train", "--workers", "0"])
    record = read_json(coco / "masks" / "train2014" / "manifest.json", "")
    assert record["step"] == "coco_masks" and record["complete"] and record["count"] == 8, record
    assert record["options"] == {"data_root": str(coco), "split": "train"} and "git_commit" in record, record
    assert list(record["stamps"].values()) == opened("coco", coco).stamps(False), record["stamps"]


FAULTS = {
    "truncated": (lambda path: path.write_text(path.read_text()[:500]), ("is truncated or no JSON", "fetch it again")),
    "of captions": (lambda path: path.write_text(json.dumps({"images": [], "annotations": [{"caption": "a cat"}]})),
                    ("is no instances JSON", "'categories'")),
    "a list": (lambda path: path.write_text("[]"), ("is no instances JSON", "instances_train2014.json")),
    "of the other split": (lambda path: path.write_text(path.with_name("instances_val2014.json").read_text()),
                           ("names images such as COCO_val2014_000000000001", "train2014", "other split")),
    "missing": (lambda path: path.unlink(), ("cannot read", "instances_train2014.json", "--data_root")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_json_is_refused_that_is(coco, fault):
    spoil, parts = FAULTS[fault]
    spoil(source(coco))
    assert_says(refusal("coco", coco), *parts)
    assert not list(Path("output/cache").glob(".*")), "something half-written was left"


ROW_FAULTS = {
    "an unknown category": ({"category_id": 12}, ("annotation 5 is of image 7, class 12", "fetch it again")),
    "an unknown image": ({"image_id": 8}, ("annotation 5 is of image 8",)),
    "a shape of another size": ({"segmentation": runs(np.ones((3, 4), np.uint8))}, ("annotation 5 of COCO_train2014_0",
                                                                                  "[3, 4]", "[51, 74]")),
    "a shape of text": ({"segmentation": "square"}, ("cannot render annotation 5",)),
}


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_an_annotation_is_refused_with(coco, fault):
    fields, parts = ROW_FAULTS[fault]
    change(coco, lambda content: content["annotations"].append(
        {**coco_annotation(5, 7, 18, polygon((1, 1, 9, 9))), **fields}))
    assert_says(refusal("coco", coco), *parts)


def test_a_wrong_root_a_wrong_split_and_a_missing_image_are_refused(coco):
    assert_says(refusal("coco", coco.parent), "is not a folder of MS COCO 2014", "expected annotations/, train2014/",
                "found coco/", f"--data_root {coco}")
    assert_says(refusal("coco", coco, "test"), "no split 'test'", "val_labelled")
    (coco / "train2014" / f"{coco_stem('train2014', 5)}.jpg").unlink()
    assert_says(refusal("coco", coco), "names COCO_train2014_000000000005 (and 0 more)", "complete the images")


def test_an_image_of_another_size_than_the_json_says_is_refused(coco):
    change(coco, lambda content: [image.update(height=image["height"] + 40) for image in content["images"]]
           and content.update(annotations=[coco_annotation(5, 7, 18, polygon((1, 1, 9, 9)))]))
    with pytest.raises(UserError, match="COCO_train2014_000000000001. is 74x91 but its image is 74x51"):
        opened("coco", coco).mask(0)
