"""Files of a run: CAMs come back, writes are whole or not at all, and a folder knows whose files it holds."""
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from utils.artifacts import (STEP_COMMAND, Folder, atomic_path, file_hash, load_arrays, load_cam, read_json,
                             read_manifest, run_dir, save_arrays, save_cam, write_json)
from utils.errors import UserError

CAM = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
MAKE_CAMS = "run: python run_train.py --stage 1"


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


# --- CAMs ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys", [[0, 2], [36], []])
def test_a_cam_comes_back_as_half_precision_and_whole_numbers(tmp_path, keys):
    cam = CAM[:len(keys)]
    save_cam(tmp_path / "deep" / "cams", "Persian_1.2", keys, cam, (20, 27))
    with np.load(tmp_path / "deep" / "cams" / "Persian_1.2.npz", allow_pickle=False) as file:
        types = {name: str(file[name].dtype) for name in file.files}
    assert types == {"keys": "int64", "cam": "float16", "size": "int64"}, types
    found_keys, found, size = load_cam(tmp_path / "deep" / "cams", "Persian_1.2")
    assert found_keys.tolist() == keys and size.tolist() == [20, 27], (found_keys, size)
    assert found.dtype == np.float32 and found.shape == cam.shape, (found.dtype, found.shape)
    assert abs(found - cam).max(initial=0) < 5e-4, f"off by {abs(found - cam).max(initial=0):.1e}"


def test_a_missing_cam_names_the_image_the_folder_and_the_command(tmp_path):
    text = refusal(load_cam, tmp_path, "Persian_1")
    assert all(part in text for part in ("no cam for Persian_1", str(tmp_path), MAKE_CAMS)), text


def spoil(path, kind):
    data = path.read_bytes()
    if kind == "flipped bits":  # in the compressed values, where zlib or the checksum notices
        middle = data.find(b"cam.npy") + 60
        path.write_bytes(data[:middle] + bytes(255 - byte for byte in data[middle:middle + 20]) + data[middle + 20:])
    elif kind == "another array file":
        with open(path, "wb") as file:
            np.save(file, CAM)
    elif kind == "another archive":
        np.savez(path, keys=[0])
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "half": data[:len(data) // 2], "short": data[:-1]}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "half", "short", "flipped bits", "another array file",
                                  "another archive"])
def test_a_damaged_cam_is_refused_with_the_remedy(tmp_path, kind):
    save_cam(tmp_path, "a", [0, 2], CAM, (20, 27))
    spoil(tmp_path / "a.npz", kind)
    text = refusal(load_cam, tmp_path, "a")
    assert "a.npz is damaged or foreign" in text and f"delete it, then {MAKE_CAMS}" in text, text


def test_every_flipped_byte_is_read_or_refused_but_never_crashes(tmp_path):
    save_cam(tmp_path, "a", [0, 2], CAM, (20, 27))
    whole, refused = (tmp_path / "a.npz").read_bytes(), 0
    for position in range(0, len(whole), 5):
        (tmp_path / "a.npz").write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1:])
        try:
            load_cam(tmp_path, "a")
        except UserError:
            refused += 1
    tried = len(range(0, len(whole), 5))
    assert refused > tried / 2, f"only {refused} of {tried} damaged files were noticed"


def test_objects_in_an_archive_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", keys=np.array([0]), cam=np.array([{"code": 1}], dtype=object), size=np.array([1, 1]))
    text = refusal(load_cam, tmp_path, "a")
    assert "damaged or foreign" in text and MAKE_CAMS in text, text


def test_other_arrays_come_back_by_name(tmp_path):
    save_arrays(tmp_path, "a", keys=np.array([3]), probabilities=CAM.astype(np.float16))
    keys, found = load_arrays(tmp_path, "a", "keys", "probabilities", remedy="-")
    assert keys.tolist() == [3] and (found == CAM.astype(np.float16)).all()


# --- writing -------------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with atomic_path(path) as temporary:
                temporary.write_text("half of i")
                raise error
    assert json.loads(path.read_text()) == {"a": 1}, path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"], "a temporary file is left"


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new"


def test_written_files_have_the_users_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "x.json").stat().st_mode)
    assert mode == 0o640, f"{mode:o}: others of the group could not read it, or anyone could"


def test_threads_that_write_at_once_leave_the_users_permissions_alone(tmp_path, monkeypatch):
    umask = os.umask
    monkeypatch.setattr(os, "umask", lambda mode: (umask(mode), time.sleep(0.002))[0])  # so that threads meet inside
    before = umask(0o027)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: write_json(tmp_path / f"{n}.json", n), range(20)))
    finally:
        after = umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert after == 0o027 and modes == {0o640}, f"umask {after:o}, files {[f'{mode:o}' for mode in modes]}"


def test_json_comes_back_and_its_absence_and_damage_name_the_remedy(tmp_path):
    write_json(tmp_path / "x.json", {"name": "Köln", "list": [1, None]})
    assert read_json(tmp_path / "x.json", "-") == {"name": "Köln", "list": [1, None]}
    assert refusal(read_json, tmp_path / "gone.json", "run: this") == f"no {tmp_path / 'gone.json'}; run: this"
    (tmp_path / "x.json").write_text('{"name":')
    text = refusal(read_json, tmp_path / "x.json", "run: this")
    assert "cannot read" in text and text.endswith("; run: this"), text


def test_a_run_folder_is_named_by_step_and_backbone():
    assert str(run_dir("stage1", "resnet50")) == os.path.join("output", "stage1_resnet50")


def test_a_file_hash_is_the_contents_and_nothing_else(tmp_path):
    for name, data in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"x" * 2_999_999 + b"y")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (file_hash(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 16, (a, b, c)


# --- folders -------------------------------------------------------------------------------------------------------

IDENTITY = {"scales": (0.5, 1.0), "network": "abc"}


def filled(path, step="cam", identity=None, finished=True):
    folder = Folder(path, step, ".npz", IDENTITY if identity is None else identity)
    folder.begin()
    for image_id in ("a", "b"):
        save_cam(path, image_id, [0], CAM[:1], (20, 27))
    if finished:
        folder.finish(["a", "b"], {"lr": 0.1}, {"device": "cpu"})
    return folder


def files(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("finished", [True, False])
def test_the_same_identity_keeps_what_is_there(tmp_path, finished):
    filled(tmp_path, finished=finished)
    again = Folder(tmp_path, "cam", ".npz", {"network": "abc", "scales": [0.5, 1.0]})
    assert again.begin() == 2, files(tmp_path)
    assert files(tmp_path) == ["a.npz", "b.npz", "manifest.json"], files(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_another_identity_throws_away_what_is_there_and_nothing_else(tmp_path, finished):
    filled(tmp_path, finished=finished)
    (tmp_path / "notes.txt").write_text("mine")
    assert Folder(tmp_path, "cam", ".npz", {**IDENTITY, "network": "other"}).begin() == 0
    assert files(tmp_path) == ["manifest.json", "notes.txt"], files(tmp_path)


def test_beginning_again_marks_the_folder_as_unfinished(tmp_path):
    folder = filled(tmp_path)
    assert read_manifest(tmp_path, "cam")["complete"]
    folder.begin()
    text = refusal(read_manifest, tmp_path, "cam")
    assert f"{tmp_path} is unfinished; {MAKE_CAMS}" in text and "are kept" in text, text


def test_files_of_someone_else_are_refused_and_kept(tmp_path):
    save_cam(tmp_path, "mine", [0], CAM[:1], (20, 27))
    text = refusal(Folder(tmp_path, "cam", ".npz", IDENTITY).begin)
    assert "did not write" in text and "name another folder" in text, text
    assert files(tmp_path) == ["mine.npz"], files(tmp_path)


@pytest.mark.parametrize("identity", [IDENTITY, {"other": 1}])
def test_the_results_of_another_step_are_refused_and_kept(tmp_path, identity):
    filled(tmp_path, identity=identity)
    text = refusal(Folder(tmp_path, "walk", ".npz", IDENTITY).begin)
    assert "results of step cam, not walk" in text and "name another folder" in text, text
    assert files(tmp_path) == ["a.npz", "b.npz", "manifest.json"], files(tmp_path)


def test_a_damaged_manifest_is_refused_with_the_remedy(tmp_path):
    filled(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    text = refusal(Folder(tmp_path, "cam", ".npz", IDENTITY).begin)
    assert "cannot read" in text and f"delete the folder {tmp_path} and run the step again" in text, text


def test_the_manifest_tells_what_was_made_from_what(tmp_path):
    filled(tmp_path / "cams")
    child = Folder(tmp_path / "walks", "walk", ".npz", {"beta": 8})
    child.begin()
    child.failures["a"] = "is damaged"
    child.finish(["b", "a"], {"beta": 8.0}, {"git_commit": "123"}, parent=tmp_path / "cams")
    found = read_manifest(tmp_path / "walks", "walk")
    expected = {"step": "walk", "complete": True, "identity": {"beta": 8}, "options": {"beta": 8.0}, "count": 1,
                "git_commit": "123", "failures": [{"image": "a", "reason": "is damaged"}], "images": ["b"],
                "made_from": file_hash(tmp_path / "cams" / "manifest.json")}
    assert {name: found[name] for name in expected} == expected, found
    assert found["seconds"] >= 0


@pytest.mark.parametrize("step", STEP_COMMAND)
def test_a_missing_manifest_names_the_command_that_makes_it(tmp_path, step):
    text = refusal(read_manifest, tmp_path / "gone", step)
    assert f"run: {STEP_COMMAND[step]}" in text and str(tmp_path / "gone") in text, text


def test_a_manifest_of_another_step_is_refused(tmp_path):
    filled(tmp_path)
    text = refusal(read_manifest, tmp_path, "mask")
    assert "results of step cam, not mask" in text and "name another folder" in text, text


def test_a_folder_holds_a_split_only_when_finished_with_the_same_identity_and_every_file(tmp_path):
    def split(*ids):
        return SimpleNamespace(ids=list(ids))
    folder = Folder(tmp_path / "cams", "cam", ".npz", {"scale": 1})
    assert not folder.holds(split("a")), "a folder that is not there holds nothing"
    folder.begin()
    save_cam(folder.path, "a", [0], np.ones((1, 2, 2)), (8, 8))
    assert not folder.holds(split("a")), "unfinished work was taken for a result"
    folder.finish(["a"], {}, {})
    assert folder.holds(split("a")) and not folder.holds(split("a", "b")), "b has no file"
    assert not Folder(folder.path, "cam", ".npz", {"scale": 2}).holds(split("a")), "made with another scale"
