"""Folders with a manifest: what a finished file may be used for, what is refused, what --overwrite makes again."""
import os

import numpy as np
import pytest
from script_runs import picture

from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.files import file_hash, read_json, save_cam, write_json
from utils.store import (
    STEP_COMMAND,
    Folder,
    check_data,
    check_free,
    differences,
    failed_images,
    made_of,
    mask_record,
    read_manifest,
    run_dir,
)

IDENTITY = {"scales": (0.5, 1.0), "network": "abc"}
MAKE_CAMS = "run: python run_train.py --stage 1"


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


@pytest.fixture
def split(tmp_path):
    """Three images of two classes; the first shows class 0, the second class 1, the third both."""
    for image_id in "abc":
        picture(tmp_path / "data" / "images" / f"{image_id}.jpg", 8, 9)
    return Dataset("toy", tmp_path / "data", "train", ("train",), ["cat", "dog"], ["a", "b", "c"],
                   np.array([[1, 0], [0, 1], [1, 1]], np.uint8), tmp_path / "data" / "images",
                   ["a.jpg", "b.jpg", "c.jpg"])


def folder_of(tmp_path, identity=None, **how):
    return Folder(tmp_path / "cams", how.pop("step", "cam"), ".npz", IDENTITY if identity is None else identity, **how)


def make(folder, ids):
    for image_id in ids:
        save_cam(folder.path, image_id, [0], np.ones((1, 2, 2)), (8, 9))


def filled(tmp_path, split, ids="abc", finished=True, **how):
    """A folder with the files of some images, begun for all of a split."""
    folder = folder_of(tmp_path, **how)
    folder.begin(split)
    make(folder, ids)
    if finished:
        folder.finish(split, {"options": {"lr": 0.1}, "device": "cpu"})
    return folder


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def replace_photo(split, index):
    """The same name and size, saved a moment later."""
    path = split.image_path(index)
    times = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))


def relabelled(split, index):
    labels = split.labels.copy()
    labels[index] = 1 - labels[index]
    return Dataset(**{**vars(split), "labels": labels})


ALL = ["a.npz", "b.npz", "c.npz", "manifest.json"]


# --- finished files are used again, or kept --------------------------------------------------------------------------

@pytest.mark.parametrize("finished", [True, False])
def test_with_the_same_identity_and_data_only_what_is_missing_is_to_be_made(tmp_path, split, finished):
    filled(tmp_path, split, "ab", finished)
    pending = folder_of(tmp_path, {"network": "abc", "scales": [0.5, 1.0]}).begin(split)
    assert pending.ids == ["c"] and pending.labels.tolist() == [[1, 1]], pending
    assert names(tmp_path / "cams") == ["a.npz", "b.npz", "manifest.json"], names(tmp_path / "cams")


@pytest.mark.parametrize("finished", [True, False])
def test_files_of_another_identity_are_kept_and_what_differs_is_said(tmp_path, split, finished):
    filled(tmp_path, split, finished=finished)
    before = (tmp_path / "cams" / "manifest.json").read_bytes()
    text = refusal(folder_of(tmp_path, {"network": "abc", "scales": [1.0]}).begin, split)
    assert "3 finished files made with other settings: scales was [0.5, 1.0], is [1.0]" in text, text
    assert str(tmp_path / "cams") in text and "--overwrite" in text and "another folder" in text, text
    assert names(tmp_path / "cams") == ALL, names(tmp_path / "cams")
    assert (tmp_path / "cams" / "manifest.json").read_bytes() == before, "the manifest was touched"


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_throws_away_files_of_another_identity_and_nothing_else(tmp_path, split, finished):
    filled(tmp_path, split, finished=finished)
    (tmp_path / "cams" / "notes.txt").write_text("mine")
    other = folder_of(tmp_path, {**IDENTITY, "network": "other"}, overwrite=True)
    assert other.begin(split).ids == ["a", "b", "c"]
    assert names(tmp_path / "cams") == ["manifest.json", "notes.txt"], names(tmp_path / "cams")


def test_overwrite_keeps_finished_files_of_the_same_identity_and_data(tmp_path, split):
    filled(tmp_path, split)
    assert folder_of(tmp_path, overwrite=True).begin(split).ids == []
    assert names(tmp_path / "cams") == ALL, names(tmp_path / "cams")


@pytest.mark.parametrize("finished", [True, False])
def test_a_replaced_photo_is_refused_by_name_and_with_overwrite_it_alone_is_made_again(tmp_path, split, finished):
    filled(tmp_path, split, finished=finished)
    replace_photo(split, 1)
    text = refusal(folder_of(tmp_path).begin, split)
    assert "1 finished files made from other images or labels, such as b;" in text and "--overwrite" in text, text
    assert names(tmp_path / "cams") == ALL, names(tmp_path / "cams")
    assert folder_of(tmp_path, overwrite=True).begin(split).ids == ["b"]
    assert names(tmp_path / "cams") == ["a.npz", "c.npz", "manifest.json"], names(tmp_path / "cams")


def test_a_corrected_label_counts_where_labels_decide_the_files_and_nowhere_else(tmp_path, split):
    filled(tmp_path, split, labels=True)
    text = refusal(folder_of(tmp_path, labels=True).begin, relabelled(split, 2))
    assert "other images or labels, such as c;" in text, text
    assert folder_of(tmp_path, labels=True, overwrite=True).begin(relabelled(split, 2)).ids == ["c"]
    filled(tmp_path / "free", split)
    assert folder_of(tmp_path / "free").begin(relabelled(split, 2)).ids == []


def test_files_whose_data_nobody_wrote_down_are_refused(tmp_path, split):
    folder = filled(tmp_path, split)
    manifest = read_json(folder.path / "manifest.json", "-")
    write_json(folder.path / "manifest.json", {name: manifest[name] for name in manifest if name != "stamps"})
    text = refusal(folder_of(tmp_path).begin, split)
    assert "3 finished files made from other images or labels, such as a;" in text, text


def test_work_on_a_part_of_the_split_keeps_the_rest_and_what_is_known_of_it(tmp_path, split):
    filled(tmp_path, split)
    part = filled(tmp_path, split.subset([0]), "")
    assert part.holds(split), "the whole split is not held after work on its first image"
    replace_photo(split, 2)
    assert folder_of(tmp_path).begin(split.subset([0])).ids == [], "another image's photo was looked at"
    text = refusal(folder_of(tmp_path).begin, split)
    assert "such as c;" in text, text


def test_a_photo_replaced_before_its_file_is_made_is_the_one_that_counts(tmp_path, split):
    filled(tmp_path, split, "a", finished=False)
    replace_photo(split, 1)
    folder = folder_of(tmp_path)
    assert folder.begin(split).ids == ["b", "c"]
    make(folder, "bc")
    folder.finish(split, {})
    assert folder_of(tmp_path).begin(split).ids == []


def test_a_moved_dataset_whose_files_kept_their_times_is_the_same_data(tmp_path, split):
    filled(tmp_path, split, labels=True)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = Dataset(**{**vars(split), "root": tmp_path / "elsewhere", "image_dir": tmp_path / "elsewhere" / "images"})
    assert folder_of(tmp_path, labels=True).begin(moved).ids == []


def test_a_missing_photo_is_refused_by_its_path_before_anything_is_thrown_away(tmp_path, split):
    filled(tmp_path, split)
    split.image_path(1).unlink()
    text = refusal(folder_of(tmp_path, {"other": 1}, overwrite=True).begin, split)
    assert "no image" in text and "b.jpg" in text, text
    assert names(tmp_path / "cams") == ALL, names(tmp_path / "cams")


def test_files_of_someone_else_are_refused_and_kept(tmp_path, split):
    save_cam(tmp_path / "cams", "mine", [0], np.ones((1, 2, 2)), (8, 9))
    text = refusal(folder_of(tmp_path, overwrite=True).begin, split)
    assert "did not write" in text and "name another folder" in text, text
    assert names(tmp_path / "cams") == ["mine.npz"], names(tmp_path / "cams")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("identity", [IDENTITY, {"other": 1}])
def test_the_results_of_another_step_are_refused_and_kept(tmp_path, split, identity, overwrite):
    filled(tmp_path, split, identity=identity)
    text = refusal(folder_of(tmp_path, step="walk", overwrite=overwrite).begin, split)
    assert "results of step cam, not walk" in text and "name another folder" in text, text
    assert names(tmp_path / "cams") == ALL, names(tmp_path / "cams")


def test_a_damaged_manifest_is_refused_with_the_remedy(tmp_path, split):
    folder = filled(tmp_path, split)
    (folder.path / "manifest.json").write_text("{")
    text = refusal(folder_of(tmp_path).begin, split)
    assert "cannot read" in text and f"delete the folder {folder.path} and run the step again" in text, text


@pytest.mark.parametrize("content", [[], None, {}, {"step": 3}, {"step": "cam", "stamps": []},
                                     {"step": "cam", "complete": True, "failures": ["a"]}])
def test_a_manifest_of_another_program_is_refused_with_the_remedy(tmp_path, split, content):
    folder, again = filled(tmp_path, split), folder_of(tmp_path)
    path, delete = folder.path / "manifest.json", f"delete the folder {folder.path}"
    write_json(path, content)
    for call, remedy in ((lambda: again.begin(split), f"{delete} and run the step again"),
                         (lambda: again.holds(split), f"{delete} and run the step again"),
                         (lambda: read_manifest(folder.path, "cam"), MAKE_CAMS),
                         (lambda: check_free(folder.path, "cam", False), delete),
                         (lambda: failed_images(folder.path), "delete it")):
        text = refusal(call)
        assert str(path) in text and remedy in text, text
    assert names(folder.path) == ALL, names(folder.path)


def test_a_manifest_that_claims_to_be_finished_but_has_no_options_is_refused_and_counts_as_other_settings(tmp_path,
                                                                                                         split):
    folder = filled(tmp_path, split)
    write_json(folder.path / "manifest.json", {"step": "cam", "complete": True})
    text = refusal(read_manifest, folder.path, "cam")
    assert f"no valid options: it is damaged, or of another program; delete {folder.path}, then {MAKE_CAMS}" in text
    assert "3 finished files made with other settings" in refusal(folder_of(tmp_path).begin, split)


def test_a_manifest_of_masks_without_classes_is_refused_with_the_remedy(tmp_path):
    write_json(tmp_path / "manifest.json", {"step": "mask", "complete": True, "options": {}})
    text = refusal(mask_record, tmp_path)
    assert f"no valid classes: it is damaged, or of another program; delete {tmp_path}, then run: python" in text, text


# --- the manifest ----------------------------------------------------------------------------------------------------

def test_beginning_again_marks_the_folder_as_unfinished(tmp_path, split):
    folder = filled(tmp_path, split)
    assert read_manifest(folder.path, "cam")["complete"]
    folder.begin(split)
    text = refusal(read_manifest, folder.path, "cam")
    assert f"{folder.path} is unfinished; {MAKE_CAMS}" in text and "are kept" in text, text


def test_the_manifest_tells_what_was_made_from_what(tmp_path, split):
    filled(tmp_path, split)
    child = Folder(tmp_path / "walks", "walk", ".npz", {"beta": 8}, labels=True)
    child.begin(split)
    child.failures["a"] = "is damaged"
    child.finish(split, {"options": {"beta": 8.0}, "git_commit": "123"}, parent=tmp_path / "cams")
    found = read_manifest(tmp_path / "walks", "walk")
    expected = {"step": "walk", "complete": True, "identity": {"beta": 8}, "options": {"beta": 8.0}, "count": 2,
                "git_commit": "123", "failures": [{"image": "a", "reason": "is damaged"}], "images": ["b", "c"],
                "labels": True, "processes": 1, "made_from": file_hash(tmp_path / "cams" / "manifest.json"),
                "stamps": dict(zip("bc", split.stamps(True)[1:]))}
    assert {name: found[name] for name in expected} == expected, found
    assert found["seconds"] >= 0


def test_what_was_left_out_before_is_left_out_of_what_is_made_from_it(tmp_path, split):
    parent = folder_of(tmp_path)
    parent.begin(split)
    make(parent, "bc")
    parent.failures["a"] = "is damaged"
    parent.finish(split, {})
    assert failed_images(parent.path) == {"a": "is damaged"}
    child = Folder(tmp_path / "walks", "walk", ".npz", {})
    child.begin(split)
    child.failures["b"] = "is gone"
    child.finish(split, {}, parent.path)
    assert failed_images(child.path) == {"a": "is damaged", "b": "is gone"}, failed_images(child.path)


def test_images_that_a_folder_was_made_without_are_dropped_and_one_is_named(tmp_path, split, capsys):
    failures = [{"image": "b", "reason": "is damaged"}]
    write_json(tmp_path / "cams" / "manifest.json", {"step": "cam", "failures": failures})
    assert made_of(split, tmp_path / "cams").ids == ["a", "c"]
    assert "Leaving out 1 images" in (said := capsys.readouterr().err) and "such as b" in said, said
    assert made_of(split.subset([0]), tmp_path / "cams").ids == ["a"]
    assert made_of(split, tmp_path).ids == ["a", "b", "c"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("step", STEP_COMMAND)
def test_a_missing_manifest_names_the_command_that_makes_it(tmp_path, step):
    text = refusal(read_manifest, tmp_path / "gone", step)
    assert f"run: {STEP_COMMAND[step]}" in text and str(tmp_path / "gone") in text, text


def test_a_manifest_of_another_step_is_refused(tmp_path, split):
    filled(tmp_path, split)
    text = refusal(read_manifest, tmp_path / "cams", "mask")
    assert "results of step cam, not mask" in text and "name another folder" in text, text


# --- whether a folder holds a split -----------------------------------------------------------------------------------

def test_a_folder_holds_a_split_only_when_finished_with_the_same_identity_and_every_file(tmp_path, split):
    first, two = split.subset([0]), split.subset([0, 1])
    folder = folder_of(tmp_path)
    assert not folder.holds(first), "a folder that is not there holds nothing"
    folder.begin(first)
    make(folder, "a")
    assert not folder.holds(first) and not folder.complete(), "unfinished work was taken for a result"
    folder.finish(first, {})
    assert folder.complete() and folder.holds(first) and not folder.holds(two), "b has no file"
    assert not folder_of(tmp_path, {"scales": 2}).holds(first), "made with another scale"
    (folder.path / "a.npz").unlink()
    assert not folder.holds(first), "its file is gone"


def test_a_folder_does_not_hold_a_split_whose_photo_or_label_changed(tmp_path, split):
    folder = filled(tmp_path, split, labels=True)
    assert folder.holds(split) and not folder.holds(relabelled(split, 0)), "a label differs"
    replace_photo(split, 2)
    assert not folder.holds(split) and folder.holds(split.subset([0, 1])), "a photo differs"


def test_an_image_left_out_as_damaged_need_not_be_there_while_it_is_damaged(tmp_path, split):
    whole = split.image_path(1).read_bytes()
    split.image_path(1).write_bytes(whole[:40])
    folder = folder_of(tmp_path)
    folder.begin(split)
    make(folder, "ac")
    folder.failures["b"] = "is damaged"
    folder.finish(split, {})
    assert folder.holds(split), "the damaged image keeps the folder from being used"
    split.image_path(1).write_bytes(whole)
    assert not folder.holds(split), "the mended image has no file"


# --- before the work -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overwrite", [True, False])
def test_a_check_refuses_what_the_work_would_refuse_and_changes_nothing(tmp_path, split, overwrite):
    folder_of(tmp_path).check(split)
    assert not (tmp_path / "cams").exists(), "a check has made the folder"
    filled(tmp_path, split)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cams").iterdir()}
    folder_of(tmp_path, overwrite=overwrite).check(split)
    replace_photo(split, 1)
    for identity in (IDENTITY, {"other": 1}):
        folder = folder_of(tmp_path, identity, overwrite=overwrite)
        if overwrite:
            folder.check(split)
        else:
            assert refusal(folder.check, split) == refusal(folder.begin, split)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cams").iterdir()}
    assert after == before, f"changed: {[name for name in before if after.get(name) != before[name]]}"


def test_the_same_kind_of_folder_elsewhere_deletes_nothing(tmp_path, split):
    filled(tmp_path, split, labels=True)
    here = Folder(tmp_path / "here", "cam", ".npz", IDENTITY, labels=True, overwrite=True)
    there = here.at(tmp_path / "cams")
    assert there.holds(split) and not here.holds(split)
    assert "such as a;" in refusal(there.begin, relabelled(split, 0))


def test_a_training_does_not_begin_where_its_files_would_meet_those_of_an_earlier_one(tmp_path, split):
    check_free(tmp_path / "cams", "cam", overwrite=False)  # not there
    filled(tmp_path, split)
    text = refusal(check_free, tmp_path / "cams", "cam", overwrite=False)
    assert f"{tmp_path / 'cams'} holds 3 files of an earlier run" in text and "--overwrite" in text, text
    check_free(tmp_path / "cams", "cam", overwrite=True)


def test_a_folder_of_other_photos_or_labels_is_refused_with_an_example(tmp_path, split):
    filled(tmp_path, split, labels=True)
    manifest = read_manifest(tmp_path / "cams", "cam")
    check_data(split, manifest, "cams")
    text = refusal(check_data, relabelled(split, 1), manifest, "cams")
    assert "cams was made from other images or labels" in text and "1 differ, such as b;" in text, text
    assert f"{MAKE_CAMS} --overwrite" in text and "--data_root" in text and str(split.root) in text, text
    for index in (0, 2):
        replace_photo(split, index)
    text = refusal(check_data, split, manifest, "cams")
    assert "2 differ, such as a;" in text, text
    check_data(split, {**manifest, "images": ["b"], "stamps": {"b": manifest["stamps"]["b"]}}, "cams")


def test_labels_that_did_not_matter_may_differ(tmp_path, split):
    filled(tmp_path, split)
    check_data(relabelled(split, 1), read_manifest(tmp_path / "cams", "cam"), "cams")


@pytest.mark.parametrize("before, now, words", [
    ({"scales": [1.0]}, {"scales": [0.5, 1.0]}, "scales was [1.0], is [0.5, 1.0]"),
    ({"cam": {"flip": True, "size": 512}}, {"cam": {"flip": False, "size": 512}}, "cam.flip was True, is False"),
    ({}, {"crf": {"sxy": 3}}, "crf was absent, is {'sxy': 3}"),
    ({"crf": {"sxy": 3}}, {"crf": None}, "crf was {'sxy': 3}, is absent"),
    (dict.fromkeys("abcdef", 1), {}, "a was 1, is absent; b was 1, is absent; c was 1, is absent; d was 1, is "
                                         "absent; and 2 more"),
    ({"classes": ["x" * 80]}, {"classes": []}, f"classes was ['{'x' * 55}..., is []"),
    (None, {"beta": 8}, " was absent, is {'beta': 8}"),
    ({"beta": 8, "radius": 5}, {"beta": 8, "radius": 5}, ""),
])
def test_differences_are_told_by_name_with_both_values(before, now, words):
    assert differences(before, now) == words, differences(before, now)


def test_a_run_folder_is_named_by_step_and_backbone():
    assert str(run_dir("stage1", "resnet50")) == os.path.join("output", "stage1_resnet50")
    assert str(run_dir("stage1", "timm/vit")) == os.path.join("output", "stage1_timm_vit")
