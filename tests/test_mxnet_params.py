"""MXNet's .params files: written here byte by byte from the description of the format, and read back."""
import struct

import numpy as np
import pytest

from models.weights.mxnet import is_params, read_params
from utils.errors import UserError

V1, V2 = 0xF993FAC8, 0xF993FAC9
CODES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def array_bytes(array, version, order="<"):
    """One array: "v2", "v1" or "legacy" (before MXNet 0.11)."""
    head = {"v2": struct.pack(f"{order}IiI", V2, 0, array.ndim), "v1": struct.pack(f"{order}II", V1, array.ndim),
            "legacy": struct.pack(f"{order}I", array.ndim)}[version]
    sizes = struct.pack(f"{order}{array.ndim}{'I' if version == 'legacy' else 'q'}", *array.shape)
    return (head + sizes + struct.pack(f"{order}iii", 2, 0, CODES[array.dtype.name])  # saved from GPU 0
            + array.astype(array.dtype.newbyteorder(order)).tobytes())


def file_bytes(arrays, version="v2", order="<", names=None):
    names = list(arrays) if names is None else names
    return (struct.pack(f"{order}QQQ", 0x112, 0, len(arrays))
            + b"".join(array_bytes(array, version, order) for array in arrays.values())
            + struct.pack(f"{order}Q", len(names))
            + b"".join(struct.pack(f"{order}Q", len(name.encode())) + name.encode() for name in names))


def some_arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"arg:a": (5,), "arg:b": (2, 3), "aux:c": (2, 1, 4), "arg:d": (3, 2, 2, 2)}
    return {name: (10 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def write(path, content):
    path.write_bytes(content)
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_params(path)
    text = str(caught.value)
    assert text.startswith(f"{path} ") and "\n" not in text and "fetch it again" in text, text
    return text


@pytest.mark.parametrize("version", ["v2", "v1", "legacy"])
@pytest.mark.parametrize("dtype", CODES)
def test_arrays_of_one_to_four_dimensions_come_back(tmp_path, version, dtype):
    arrays = some_arrays(dtype)
    path = write(tmp_path / "x.params", file_bytes(arrays, version))
    found = read_params(path)
    assert is_params(path) and list(found) == list(arrays), list(found)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].flags.writeable, f"{name}: {found[name].dtype}"
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_file_without_names_numbers_its_arrays(tmp_path):
    found = read_params(write(tmp_path / "x.params", file_bytes(some_arrays(), names=[])))
    assert list(found) == ["0", "1", "2", "3"], list(found)


def test_an_array_that_was_never_filled_is_empty(tmp_path):
    content = struct.pack("<QQQ", 0x112, 0, 1) + struct.pack("<IiI", V2, 0, 0) + struct.pack("<QQ", 1, 1) + b"x"
    assert read_params(write(tmp_path / "x.params", content))["x"].size == 0


def test_a_file_is_refused_wherever_it_ends(tmp_path):
    whole = file_bytes(some_arrays())
    for length in range(8, len(whole), 7):
        assert "is truncated or damaged" in refusal(write(tmp_path / "x.params", whole[:length])), length


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    path = write(tmp_path / "x.params", file_bytes(some_arrays(), order=">"))
    assert is_params(path) and "big-endian" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04" + bytes(60), bytes(64)])
def test_another_file_is_refused(tmp_path, content):
    path = write(tmp_path / "x.params", content)
    assert not is_params(path)
    assert "does not begin as" in refusal(path) or len(content) < 8, content


@pytest.mark.parametrize("head, words", [
    (struct.pack("<II2q", V1, 2, 10 ** 6, 10 ** 6) + bytes(8) + struct.pack("<i", 0), "truncated or damaged"),
    (struct.pack("<II2q", V1, 2, 2 ** 62, 2 ** 62) + bytes(8) + struct.pack("<i", 0), "truncated or damaged"),
    (struct.pack("<II2q", V1, 2, -1, -4), "shape (-1, -4)"),
    (struct.pack("<I", 40), "40 dimensions"),
    (struct.pack("<II1q", V1, 1, 1) + bytes(8) + struct.pack("<i", 9), "unknown type 9"),
    (struct.pack("<IiI", V2, 1, 2), "not dense (storage type 1)"),
])
def test_a_damaged_array_is_refused_before_memory_is_taken(tmp_path, head, words):
    content = struct.pack("<QQQ", 0x112, 0, 1) + head + bytes(64)
    assert words in refusal(write(tmp_path / "x.params", content))


@pytest.mark.parametrize("count", [10 ** 12, 2 ** 64 - 1])
def test_a_count_beyond_the_file_is_refused(tmp_path, count):
    content = struct.pack("<QQQ", 0x112, 0, count) + bytes(64)
    assert f"claims {count} arrays" in refusal(write(tmp_path / "x.params", content))


def test_names_that_do_not_fit_the_arrays_are_refused(tmp_path):
    for names in (["a"], ["a", "a", "b", "c"]):
        assert "4 arrays but" in refusal(write(tmp_path / "x.params", file_bytes(some_arrays(), names=names)))
