"""Formats and atomic writes: CAMs and score maps come back, and a file is written whole or not at all."""
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from utils.errors import UserError
from utils.files import (
    atomic_path,
    cached_arrays,
    file_hash,
    file_stamp,
    load_arrays,
    load_cam,
    load_scores,
    read_json,
    save_arrays,
    save_cam,
    save_scores,
    short_hash,
    write_json,
)

CAM = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
MAKE_CAMS = "run: python run_train.py --stage 1"


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


# --- CAMs and score maps -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys", [[0, 2], [36], []])
def test_a_cam_comes_back_as_half_precision_and_whole_numbers(tmp_path, keys):
    cam = CAM[:len(keys)]
    save_cam(tmp_path / "deep" / "cams", "Persian_1.2", keys, cam, (20, 27))
    with np.load(tmp_path / "deep" / "cams" / "Persian_1.2.npz", allow_pickle=False) as file:
        types, size = {name: str(file[name].dtype) for name in file.files}, file["size"].tolist()
    assert types == {"keys": "int64", "cam": "float16", "size": "int64"} and size == [20, 27], (types, size)
    found_keys, found = load_cam(tmp_path / "deep" / "cams", "Persian_1.2")
    assert found_keys.tolist() == keys, found_keys
    assert found.dtype == np.float32 and found.shape == cam.shape, (found.dtype, found.shape)
    assert abs(found - cam).max(initial=0) < 5e-4, f"off by {abs(found - cam).max(initial=0):.1e}"


def test_score_maps_come_back_as_half_precision_with_the_size_of_the_image(tmp_path):
    save_scores(tmp_path, "a", [3], CAM, (20, 27))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        types, size = {name: str(file[name].dtype) for name in file.files}, file["size"].tolist()
    assert types == {"keys": "int64", "probabilities": "float16", "size": "int64"} and size == [20, 27], (types, size)
    keys, found = load_scores(tmp_path, "a")
    assert keys.tolist() == [3] and found.dtype == np.float32 and (found == CAM.astype(np.float16)).all(), found


def test_missing_score_maps_name_the_image_and_the_command(tmp_path):
    text = refusal(load_scores, tmp_path, "a")
    assert "no probabilities for a" in text and "run: python run_inference.py" in text, text


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
        with pytest.raises(error), atomic_path(path) as temporary:
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


def test_a_file_hash_is_the_contents_and_nothing_else(tmp_path):
    for name, data in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"x" * 2_999_999 + b"y")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (file_hash(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 16, (a, b, c)


def test_a_short_hash_is_that_of_all_its_parts_in_a_row():
    assert short_hash(b"ab", b"c") == short_hash(b"abc") != short_hash(b"acb"), short_hash(b"abc")
    assert len(short_hash()) == 16, short_hash()


def test_a_stamp_changes_with_the_size_and_with_the_time_of_change(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    before = file_stamp(path)
    assert before == (str(path), 3, 10**18), before
    path.write_bytes(b"two")
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert file_stamp(path) == (str(path), 3, 10**18 + 1), file_stamp(path)
    path.write_bytes(b"three")
    assert file_stamp(path)[1] == 5, file_stamp(path)
    text = refusal(file_stamp, tmp_path / "gone")
    assert str(tmp_path / "gone") in text and "No such file" in text and "--data_root" in text, text


# --- arrays that are made once ---------------------------------------------------------------------------------------

def test_arrays_are_made_once_for_each_key_and_come_back_read_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def build():
        made.append(1)
        return {"a": np.arange(6).reshape(2, 3), "empty": np.zeros((0, 2), np.uint8)}
    for key in ({"stamp": 1}, {"stamp": 1}, {"stamp": 2}):
        found = cached_arrays("toy", key, build)
        assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["empty"].shape == (0, 2), found
    assert len(made) == 2, f"made {len(made)} times for two keys"
    with pytest.raises(ValueError):
        found["a"][0, 0] = 7
    left = sorted(path.name for path in (tmp_path / "output" / "cache").iterdir() if path.name.startswith("."))
    assert not left, f"left behind: {left}"


def test_arrays_that_fail_to_be_made_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def build():
        return {"a": np.arange(6), "b": np.array([{"code": 1}], dtype=object)}
    with pytest.raises(ValueError):
        cached_arrays("toy", 1, build)
    left = list((tmp_path / "output" / "cache").iterdir())
    assert not left, f"left behind: {left}"


def test_a_damaged_cache_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached_arrays("toy", 1, lambda: {"a": np.arange(6)})
    (path,) = (tmp_path / "output" / "cache").rglob("a.npy")
    path.write_bytes(b"hello")
    text = refusal(cached_arrays, "toy", 1, lambda: {"a": np.arange(6)})
    assert "the cache output/cache/toy_" in text and "delete it and run again" in text, text
