"""PASCAL VOC 2012: lists, labels from XML or masks, SBD, ground truth, and every refusal with its remedy."""
import os
import shutil

import numpy as np
import pytest
from scipy.io import savemat
from test_datasets import assert_says, refusal
from trees import CLASSES, VOC_SHOWN, annotation, make_voc, opened, save_grey, write

from utils.errors import UserError

LISTS = "ImageSets/Segmentation"


@pytest.fixture
def voc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for output/cache
    root = tmp_path / "VOCdevkit" / "VOC2012"
    make_voc(root)
    return root


def names(dataset):
    return [[dataset.classes[k] for k in np.flatnonzero(row)] for row in dataset.labels]


def make_sbd(folder, train, val, masks):
    """SBD's lists and, for `masks` {id: (H, W)}, its .mat files."""
    for name, ids in (("train", train), ("val", val)):
        write(folder / f"{name}.txt", "\n".join(ids) + "\n")
    (folder / "cls").mkdir()
    for image_id, mask in masks.items():
        savemat(folder / "cls" / f"{image_id}.mat", {"GTcls": {"Segmentation": mask, "CategoriesPresent": [1]}})


def without_xml(voc):
    for path in (voc / "Annotations").iterdir():
        path.unlink()


@pytest.mark.parametrize("split, count", [("train", 8), ("val", 3), ("trainval", 11), ("test", 2), ("trainaug", 10)])
def test_every_list_opens_with_its_images(voc, split, count):
    dataset = opened("voc", voc, split)
    assert len(dataset) == count and dataset.classes == CLASSES, f"{len(dataset)} images, {len(dataset.classes)}"
    assert dataset.image(0).shape == (50, 74, 3) and dataset.training_splits == ("trainaug", "train", "trainval")


def test_the_training_split_is_trainaug_or_train_where_that_cannot_be_had(voc):
    assert opened("voc", voc).split == "trainaug"
    (voc / LISTS / "trainaug.txt").unlink()
    assert opened("voc", voc).split == "train"
    assert_says(refusal("voc", voc, "trainaug"), "trainaug.txt", "no SBD", "--split train")


def test_labels_are_the_classes_that_the_xml_names(voc):
    expected = [[VOC_SHOWN[i] for i in sorted((i % 3, (i + 1) % 3))] for i in range(8)]
    assert names(opened("voc", voc, "train")) == expected


def test_difficult_objects_count_unless_left_out(voc):
    assert names(opened("voc", voc, "train"))[0] == ["aeroplane", "dog"]
    assert names(opened("voc", voc, "train", difficult=False))[:2] == [["aeroplane"], ["dog", "tvmonitor"]]


def test_the_test_split_has_neither_labels_nor_truth(voc):
    dataset = opened("voc", voc, "test")
    assert dataset.labels is None and dataset.label(0) is None
    lacking = "no ground truth for split test .2 of its 2 images have no mask, such as 2007_0"
    with pytest.raises(UserError, match=lacking):
        dataset.mask(0)


def test_masks_read_as_classes_with_their_border_ignored(voc):
    dataset = opened("voc", voc, "train")
    assert set(np.unique(dataset.mask(0))) == {0, 1, CLASSES.index("dog") + 1, 255}, np.unique(dataset.mask(0))


def test_an_image_without_xml_takes_its_labels_from_its_mask_and_keeps_them(voc, monkeypatch):
    expected = names(opened("voc", voc, "trainaug"))
    without_xml(voc)
    assert names(opened("voc", voc, "trainaug")) == expected
    monkeypatch.setattr("utils.datasets.base.read_mask", lambda path: pytest.fail(f"read {path} again"))
    assert names(opened("voc", voc, "trainaug")) == expected


def test_labels_follow_a_mask_that_was_mended(voc):
    without_xml(voc)
    before = names(opened("voc", voc, "train"))
    path = voc / "SegmentationClass" / "2007_000002.png"
    save_grey(path, np.full((50, 74), CLASSES.index("cow") + 1))
    after = names(opened("voc", voc, "train"))
    assert after == [["cow"] if i == 1 else row for i, row in enumerate(before)], after
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert names(opened("voc", voc, "train")) == after


def test_labels_follow_a_mask_that_came_before_another(voc):
    """Of SegmentationClass, put beside one of SegmentationClassAug, and taken away again."""
    without_xml(voc)
    before = names(opened("voc", voc, "trainaug"))
    path = voc / "SegmentationClass" / "2007_000014.png"
    save_grey(path, np.full((50, 74), CLASSES.index("cow") + 1))
    assert names(opened("voc", voc, "trainaug")) == [*before[:8], ["cow"], before[9]]
    path.unlink()
    assert names(opened("voc", voc, "trainaug")) == before


def test_labels_follow_a_mat_file_of_sbd_that_was_mended(voc):
    without_xml(voc)
    (voc / "SegmentationClassAug" / "2007_000014.png").unlink()
    for name in ("cow", "sheep"):
        mask = np.full((50, 74), CLASSES.index(name) + 1, np.uint8)
        shutil.rmtree(voc.parent / "SBD", ignore_errors=True)
        make_sbd(voc.parent / "SBD", [], [], {"2007_000014": mask})
        os.utime(voc.parent / "SBD" / "cls" / "2007_000014.mat", ns=(0, CLASSES.index(name)))
        dataset = opened("voc", voc, "trainaug")
        found = names(dataset)[dataset.ids.index("2007_000014")]
        assert found == [name], found


def test_an_image_with_neither_xml_nor_mask_is_refused(voc):
    (voc / "Annotations" / "2007_000001.xml").unlink()
    (voc / "SegmentationClass" / "2007_000001.png").unlink()
    assert_says(refusal("voc", voc, "train"), "2007_000001 has no annotation", "no ground truth")


def test_vocs_own_mask_comes_before_sbds(voc):
    save_grey(voc / "SegmentationClassAug" / "2007_000001.png", np.zeros((50, 74)))
    assert opened("voc", voc, "train").mask(0).max() == 255
    (voc / "SegmentationClass" / "2007_000001.png").unlink()
    assert opened("voc", voc, "train").mask(0).max() == 0


def test_trainaug_is_built_from_sbds_lists_and_says_of_what(voc, capsys):
    (voc / LISTS / "trainaug.txt").unlink()
    make_sbd(voc.parents[1] / "SBD", ["2007_000003", "2007_000014"], ["2007_000009", "2007_000015"], {})
    dataset = opened("voc", voc)
    assert dataset.split == "trainaug" and dataset.ids == [f"2007_{i:06d}" for i in (*range(1, 9), 14, 15)], dataset.ids
    said = capsys.readouterr().err
    assert "10 images" in said and "train (2) and val (2)" in said and "without VOC's val (3)" in said, said


@pytest.mark.parametrize("place", ["SBD", "benchmark_RELEASE/dataset"])
def test_masks_of_sbds_mat_files_are_read_where_there_is_no_picture(voc, place):
    (voc / "SegmentationClassAug" / "2007_000014.png").unlink()
    mask = np.random.default_rng(0).choice(np.array([0, 3, 20, 255], np.uint8), (50, 74))
    make_sbd(voc.parent / place, [], [], {"2007_000014": mask})
    dataset = opened("voc", voc, "trainaug")
    assert np.array_equal(dataset.mask(dataset.ids.index("2007_000014")), mask)


def test_a_damaged_mat_file_is_refused(voc):
    (voc / "SegmentationClassAug" / "2007_000014.png").unlink()
    make_sbd(voc.parent / "SBD", [], [], {"2007_000014": np.zeros((50, 74), np.uint8)})
    path = voc.parent / "SBD" / "cls" / "2007_000014.mat"
    dataset = opened("voc", voc, "trainaug")
    for damage in (path.read_bytes()[:140], b"text"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="cannot read .*2007_000014.mat .*fetch SBD's file again"):
            dataset.mask(dataset.ids.index("2007_000014"))


def test_a_list_of_paths_reads_as_their_ids(voc):
    write(voc / LISTS / "trainaug.txt", "/JPEGImages/2007_000002.jpg /SegmentationClassAug/2007_000002.png\n")
    assert opened("voc", voc).ids == ["2007_000002"]


def test_a_split_without_all_masks_says_how_many_lack(voc):
    (voc / "SegmentationClassAug" / "2007_000014.png").unlink()
    with pytest.raises(UserError, match="1 of its 10 images have no mask, such as 2007_000014; SegmentationClass/"):
        opened("voc", voc, "trainaug").mask(0)


def test_a_wrong_root_is_told_what_was_expected_what_found_and_where_it_is(voc):
    assert_says(refusal("voc", voc.parent), "is not a folder of PASCAL VOC 2012", "expected JPEGImages/",
                "found VOC2012/", f"--data_root {voc}")
    assert_says(refusal("voc", voc / "JPEGImages"), "expected JPEGImages/", "2007_000001.jpg", "and 7 more",
                "--data_root")


@pytest.mark.parametrize("value", [21, 128, 254])
def test_a_mask_value_that_is_no_class_is_refused(voc, value):
    save_grey(voc / "SegmentationClass" / "2007_000001.png", np.full((50, 74), value))
    with pytest.raises(UserError, match=f"2007_000001.png holds the value {value}; only 0 to 20 and 255 may stand"):
        opened("voc", voc, "train").mask(0)


XML_FAULTS = {
    "a class that VOC does not have": (annotation([("dragon", False)]),
                                       ("'dragon'", "VOC does not have", "--dataset folder")),
    "no name": ("<annotation><object/></annotation>", ("''", "VOC does not have")),
    "no XML": ("<annotation><object>", ("cannot read", "2007_000001.xml", "replace the file")),
}


@pytest.mark.parametrize("fault", XML_FAULTS)
def test_an_annotation_is_refused_for(voc, fault):
    text, parts = XML_FAULTS[fault]
    write(voc / "Annotations" / "2007_000001.xml", text)
    assert_says(refusal("voc", voc, "train"), *parts)


def test_a_missing_image_is_refused(voc):
    (voc / "JPEGImages" / "2007_000003.jpg").unlink()
    assert_says(refusal("voc", voc), "names 2007_000003 (and 0 more)", "JPEGImages", "complete the images")
