"""Formats and atomic writes: JSON, arrays, CAMs, score maps.  Which folder holds what is `utils.store`'s."""
import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError

CAM_LEVELS = 1024
UMASK_LOCK = threading.Lock()
# What numpy and zipfile raise on a damaged file, or on one of another kind under the name.
DAMAGED = (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, RuntimeError, struct.error, zlib.error,
           MemoryError, zipfile.BadZipFile)
LARGEST = 1 << 30  # bytes that the arrays of an image may unpack to


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that replaces it when the block ends well, and vanishes if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def check_folder(path: str | Path, flag: str) -> None:
    """UserError if files cannot lie in a folder, as it, or one above it, is a file.  flag: that names the folder."""
    there = next((one for one in (Path(path), *Path(path).absolute().parents) if one.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{flag} {path}: {there} is a file, not a folder; name another, or move the file away")


def check_checkpoint_file(path: str | Path) -> None:
    """UserError unless there is a file at the path of a checkpoint."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}; run the step that writes it, or pass its path")


def _umask() -> int:
    with UMASK_LOCK:  # of two threads, one would take the other's 0 for the user's
        current = os.umask(0)
        os.umask(current)
    return current


def write_json(path: str | Path, value: object) -> None:
    """Write JSON; the file appears whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)  # piece by piece: the text of COCO's manifest is never in memory
        file.write("\n")


def read_json(path: str | Path, remedy: str) -> object:
    """Parse a JSON file; UserError with the remedy if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}; {remedy}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}); {remedy}") from None


def read_record(path: str | Path, remedy: str, needed: Mapping[str, type]) -> dict[str, object]:
    """Parse a JSON file of ours: a dict with the `needed` parts, each of its type.

    UserError with the remedy if it is missing, damaged, or something else.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path} is no record of this project, but a {type(value).__name__}; {remedy}")
    check_record(value, path, remedy, needed)
    return value


def check_record(record: Mapping[str, object], path: str | Path, remedy: str, needed: Mapping[str, type]) -> None:
    """UserError with the remedy unless a record has the `needed` parts, each of its type."""
    wrong = [name for name, kind in needed.items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise UserError(f"{path} has no valid {', '.join(wrong)}: it is damaged, or of another program; {remedy}")


def short_hash(*parts: bytes) -> str:
    """First 16 hex digits of the SHA-256 of some bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def contents_hash(paths: Iterable[Path]) -> str:
    """16 hex digits of the names and contents of files: tells one folder of small files from another."""
    return short_hash(*(f"{path.name}\0{file_hash(path)}\0".encode() for path in paths))


def file_stamp(path: str | Path) -> tuple[str, int, int]:
    """(absolute path, bytes, time of change): tells whether a file is still the one that was read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); put it there, or pass another --data_root") from None
    return str(Path(path).resolve()), status.st_size, status.st_mtime_ns


def cached_arrays(name: str, key: object, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays that take long to make, made once: mapped from output/cache/<name>_<hash of key>, not loaded.

    key: plain values that decide the arrays.  build: makes {array name: array}.
    Returns {array name: read-only array}.
    """
    folder = Path("output") / "cache" / f"{name}_{short_hash(json.dumps(key).encode())}"
    if not folder.is_dir():
        _save_together(folder, build())
    try:
        return {path.stem: _mapped(path) for path in sorted(folder.glob("*.npy"))}
    except DAMAGED as error:
        raise UserError(f"the cache {folder} is damaged ({error}); delete it and run again") from None


def _save_together(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a folder of arrays that appears whole or not at all; one that another process made meanwhile is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        os.chmod(temporary, 0o777 & ~_umask())
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mapped(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array if array.size else np.asarray(array)


def save_cam(folder: str | Path, image_id: str, keys: Sequence[int], cam: np.ndarray, size: tuple[int, int]) -> None:
    """keys: (K,) zero-based class indices, ascending.  cam: (K, h, w) in [0, 1].  size: (H, W) of the image.

    The map is rounded to CAM_LEVELS steps: close to float16's own steps near 1, and a third smaller when compressed.
    UserError for a map that is not finite.
    """
    _check_finite(image_id, cam)
    cam = np.round(np.asarray(cam, np.float32) * CAM_LEVELS) / CAM_LEVELS
    save_arrays(folder, image_id, keys=np.asarray(keys, np.int64), cam=cam.astype(np.float16),
                size=np.asarray(size, np.int64))


def load_cam(folder: str | Path, image_id: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys int64 (K,), cam float32 (K, h, w)) of one image."""
    keys, cam = load_arrays(folder, image_id, "keys", "cam", remedy="run: python run_train.py --stage 1")
    return keys, cam.astype(np.float32)


def save_scores(folder: str | Path, image_id: str, keys: Sequence[int], probabilities: np.ndarray,
                size: tuple[int, int]) -> None:
    """keys: (K,).  probabilities: (K + 1, h, w), background first.  size: (H, W) of the image.

    UserError for probabilities that are not finite.
    """
    _check_finite(image_id, probabilities)
    save_arrays(folder, image_id, keys=np.asarray(keys, np.int64), size=np.asarray(size, np.int64),
                probabilities=np.asarray(probabilities, np.float16))


def load_scores(folder: str | Path, image_id: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys int64 (K,), probabilities float32 (K + 1, h, w)) of one image."""
    keys, probabilities = load_arrays(folder, image_id, "keys", "probabilities", remedy="run: python run_inference.py")
    return keys, probabilities.astype(np.float32)


def _check_finite(image_id: str, maps: np.ndarray) -> None:
    if not np.isfinite(maps).all():
        raise UserError(f"the maps of {image_id} are not finite: the network's weights have diverged; train it again "
                        "with a lower --lr")


def save_arrays(folder: str | Path, image_id: str, **arrays: np.ndarray) -> None:
    """Write <image_id>.npz; it appears whole or not at all."""
    with atomic_path(Path(folder) / f"{image_id}.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_arrays(folder: str | Path, image_id: str, *names: str, remedy: str) -> tuple[np.ndarray, ...]:
    """Arrays of one image from its .npz; UserError with the remedy if it is missing, damaged or of another kind."""
    path = Path(folder) / f"{image_id}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(part.file_size for part in file.zip.infolist()) > LARGEST:
                raise ValueError("it unpacks to more than a gigabyte")
            return tuple(file[name] for name in names)
    except FileNotFoundError:
        raise UserError(f"no {names[1]} for {image_id} in {folder}; {remedy}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or foreign ({error}); delete it, then {remedy}") from None
