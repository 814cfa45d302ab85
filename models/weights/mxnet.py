"""Reader of MXNet's `.params` files (`mx.nd.save`), whose library no longer installs.

The layout, all little-endian, as MXNet's src/ndarray/ndarray.cc writes it:

    uint64 0x112, uint64 0                       the file
    uint64 count, then `count` arrays
    uint64 count, then `count` names             each a uint64 length and that many bytes; none, or one per array

An array comes in one of three layouts, told apart by its first uint32:

    0xF993FAC9       int32 storage type (0: dense), uint32 dimensions, int64 each
    0xF993FAC8       uint32 dimensions, int64 each
    anything else    is itself the number of dimensions (MXNet before 0.11), uint32 each

and, if it has a dimension: int32 device type, int32 device number, int32 dtype, and the values in C order.
"""
import math
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np

from utils.errors import UserError

LIST_MAGIC = 0x112
V1_MAGIC, V2_MAGIC = 0xF993FAC8, 0xF993FAC9
DTYPES = {0: np.float32, 1: np.float64, 2: np.float16, 3: np.uint8, 4: np.int32, 5: np.int8, 6: np.int64}
MAX_DIMENSIONS = 32
DENSE = 0


def is_params(path: str | Path) -> bool:
    """Whether a file begins as a `.params` file does, in either byte order."""
    with open(path, "rb") as file:
        start = file.read(8)
    return start in (struct.pack("<Q", LIST_MAGIC), struct.pack(">Q", LIST_MAGIC))


def read_params(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> numpy array of a `.params` file, in the order of the file; "arg:" and "aux:" stay part of the names.

    Arrays without names are called "0", "1", ...  Nothing is allocated that the file is too short to fill.
    Raises UserError for a file that is truncated, foreign, sparse or of the other byte order.
    """
    with open(path, "rb") as file:
        reader = _Reader(path, memoryview(file.read()))
    magic = reader.number("Q")
    if magic != LIST_MAGIC:
        swapped = magic == int.from_bytes(struct.pack(">Q", LIST_MAGIC), "little")
        reader.refuse("was written on a big-endian machine, which no published file was" if swapped
                      else "does not begin as MXNet's .params files do")
    reader.number("Q")  # reserved
    arrays = [_read_array(reader) for _ in range(reader.count("array", 4))]
    names = [_read_name(reader) for _ in range(reader.count("name", 8))] or [str(i) for i in range(len(arrays))]
    if len(names) != len(arrays) or len(set(names)) != len(names):
        reader.refuse(f"has {len(arrays)} arrays but {len(set(names))} names")
    return dict(zip(names, arrays))


class _Reader:
    """A cursor over the bytes of a file that never runs past their end."""

    def __init__(self, path, data):
        self.path, self.data, self.at = path, data, 0

    def refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path} {reason}; fetch it again, or pass another file")

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            self.refuse(f"is truncated or damaged: {size} bytes should follow byte {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size:self.at]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, what: str, least: int) -> int:
        """A uint64 count of items of at least `least` bytes each, so that a damaged one cannot ask for any memory."""
        count = self.number("Q")
        if count * least > len(self.data) - self.at:
            self.refuse(f"is truncated or damaged: it claims {count} {what}s at byte {self.at} of {len(self.data)}")
        return count


def _read_array(reader):
    magic = reader.number("I")
    if magic == V2_MAGIC:
        storage = reader.number("i")
        if storage != DENSE:
            reader.refuse(f"holds an array that is not dense (storage type {storage}) at byte {reader.at}")
    legacy = magic not in (V1_MAGIC, V2_MAGIC)
    dimensions = magic if legacy else reader.number("I")
    if dimensions > MAX_DIMENSIONS:
        reader.refuse(f"is damaged: an array of {dimensions} dimensions at byte {reader.at}")
    shape = [reader.number("I" if legacy else "q") for _ in range(dimensions)]
    if not dimensions:  # an array that was never filled
        return np.zeros(0, np.float32)
    if min(shape) < 0:
        reader.refuse(f"is damaged: an array of shape {tuple(shape)} at byte {reader.at}")
    reader.take(8)  # the device it was on
    code = reader.number("i")
    if code not in DTYPES:
        reader.refuse(f"holds values of unknown type {code} at byte {reader.at}")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    values = reader.take(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(values, dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def _read_name(reader):
    raw = bytes(reader.take(reader.number("Q")))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return reader.refuse(f"holds a name that is no text before byte {reader.at}")
