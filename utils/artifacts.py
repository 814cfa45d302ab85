"""The only file that knows paths and formats under data/cams and output/."""
import contextlib
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

from utils import distributed
from utils.errors import ImageError, UserError

MANIFEST = "manifest.json"
CAM_LEVELS = 1024
UMASK_LOCK = threading.Lock()
# What numpy and zipfile raise on a damaged file, or on one of another kind under the name.
DAMAGED = (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, RuntimeError, struct.error, zlib.error,
           zipfile.BadZipFile)
STEP_COMMAND = {"cam": "python run_train.py --stage 1", "walk": "python run_inference.py",
                "affinity_labels": "python run_train.py --stage 2", "mask": "python run_inference.py"}


@contextlib.contextmanager
def atomic_path(path):
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


def _umask():
    with UMASK_LOCK:  # of two threads, one would take the other's 0 for the user's
        current = os.umask(0)
        os.umask(current)
    return current


def write_json(path, value):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path, remedy):
    """Parse a JSON file; UserError with the remedy if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}; {remedy}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}); {remedy}") from None


def run_dir(step, backbone):
    """Default output folder of a training step, e.g. output/stage1_resnet50."""
    return Path("output") / f"{step}_{backbone}"


def file_hash(path):
    """First 16 hex digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def file_stamp(path):
    """(absolute path, bytes, time of change): what tells whether a file is still the one that was read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); put it there, or pass another --data_root") from None
    return str(Path(path).resolve()), status.st_size, status.st_mtime_ns


def cached_arrays(name, key, build):
    """Arrays that take long to make, made once: mapped from output/cache/<name>_<hash of key>, not loaded.

    key: plain values that decide the arrays.  build: function () -> {array name: array}.
    Returns {array name: read-only array}.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = Path("output") / "cache" / f"{name}_{digest}"
    if not folder.is_dir():
        _save_together(folder, build())
    try:
        return {path.stem: _mapped(path) for path in sorted(folder.glob("*.npy"))}
    except DAMAGED as error:
        raise UserError(f"the cache {folder} is damaged ({error}); delete it and run again") from None


def _save_together(folder, arrays):
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


def _mapped(path):
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array if array.size else np.asarray(array)


def save_cam(folder, image_id, keys, cam, size):
    """keys: (K,) zero-based class indices, ascending.  cam: (K, h, w) in [0, 1].  size: (H, W) of the image.

    The map is rounded to CAM_LEVELS steps: close to float16's own steps near 1, and a third smaller when compressed.
    """
    cam = np.round(np.asarray(cam, np.float32) * CAM_LEVELS) / CAM_LEVELS
    save_arrays(folder, image_id, keys=np.asarray(keys, np.int64), cam=cam.astype(np.float16),
                size=np.asarray(size, np.int64))


def save_arrays(folder, image_id, **arrays):
    with atomic_path(Path(folder) / f"{image_id}.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_arrays(folder, image_id, *names, remedy):
    """Arrays of one image from its .npz; UserError with the remedy if it is missing, damaged or of another kind."""
    path = Path(folder) / f"{image_id}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file[name] for name in names)
    except FileNotFoundError:
        raise UserError(f"no {names[1]} for {image_id} in {folder}; {remedy}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or foreign ({error}); delete it, then {remedy}") from None


def load_cam(folder, image_id):
    """(keys int64 (K,), cam float32 (K, h, w), size (2,)) of one image."""
    keys, cam, size = load_arrays(folder, image_id, "keys", "cam", "size", remedy=f"run: {STEP_COMMAND['cam']}")
    return keys, cam.astype(np.float32), size


class Folder:
    """A folder of one file per image whose manifest.json, written last, says what the files are.

    `identity` is a dict of plain values that decide the files' contents.  Opening a folder whose manifest, or whose
    unfinished work, has another identity throws that work away; with the same identity finished images are kept.
    Of several processes, each makes its share of the files, and rank 0 the manifest; all call the methods alike.
    `failures`, {image id: reason}, are the images that --on_bad_image skip left out, for the manifest.
    """

    def __init__(self, path, step, suffix, identity):
        self.path, self.step, self.suffix = Path(path), step, suffix
        self.identity = json.loads(json.dumps(identity))  # as it will read back
        self.started, self.failures = time.time(), {}

    def begin(self):
        """Make the folder ready for writing; returns how many files of the same identity were found."""
        return distributed.agree(self._prepare() if distributed.is_main() else None)

    def _prepare(self):
        previous = self._previous()
        if previous is None and self.path.is_dir() and any(self.path.glob(f"*{self.suffix}")):
            raise UserError(f"{self.path} holds {self.suffix} files that this project did not write; "
                            "name another folder")
        if previous is not None and previous.get("step") != self.step:
            raise UserError(f"{self.path} holds the results of step {previous.get('step')}, not {self.step}; "
                            "name another folder")
        if previous is None or previous.get("identity") != self.identity:
            for file in self.path.glob(f"*{self.suffix}"):
                file.unlink()
        write_json(self.path / MANIFEST, {"step": self.step, "identity": self.identity, "complete": False})
        return len(list(self.path.glob(f"*{self.suffix}")))

    def pending(self, dataset):
        """The images of a split whose file is not there yet, and this process's to make, as a smaller split."""
        there = self._files()
        missing = [i for i, image_id in enumerate(dataset.ids) if image_id + self.suffix not in there]
        # Rank 0's list: the others may look when the first files of this run are there.
        return dataset.subset(distributed.share(distributed.agree(missing)))

    def holds(self, dataset):
        """Whether it is finished, of the same identity, and has every image of a split: nothing need be made.

        An image that was left out as damaged need not be there while it is still damaged.
        """
        return distributed.agree(self.complete() and self._has_all(dataset))

    def _has_all(self, dataset):
        there, failed = self._files(), failed_images(self.path)
        missing = [i for i, image_id in enumerate(dataset.ids) if image_id + self.suffix not in there]
        return all(dataset.ids[i] in failed and _damaged(dataset, i) for i in missing)

    def complete(self):
        """Whether it is finished and of the same identity, for the images it was made for."""
        previous = self._previous()
        return previous is not None and previous.get("identity") == self.identity and bool(previous.get("complete"))

    def _files(self):
        # One listing instead of a look for every image: on a network disk, seconds instead of minutes.
        return set(os.listdir(self.path)) if self.path.is_dir() else set()

    def finish(self, image_ids, options, environment, parent=None):
        """Write the manifest, once all processes have come here: what was made, from what, by which options.

        parent: the folder it was made from; images that could not be made there count as left out here too.
        """
        failures = {} if parent is None else failed_images(parent)
        failures.update(distributed.merged(self.failures, image_ids))
        if distributed.is_main():
            made = [image_id for image_id in image_ids if image_id not in failures]
            write_json(self.path / MANIFEST, {
                "step": self.step, "complete": True, "identity": self.identity, "options": options, **environment,
                "count": len(made), "seconds": round(time.time() - self.started, 1),
                "processes": distributed.world(),
                "failures": [{"image": image_id, "reason": reason} for image_id, reason in failures.items()],
                "made_from": None if parent is None else file_hash(Path(parent) / MANIFEST), "images": made})
        distributed.barrier()

    def _previous(self):
        path = self.path / MANIFEST
        return read_json(path, f"delete the folder {self.path} and run the step again") if path.is_file() else None


def failed_images(folder):
    """{image id: reason} of the images that a folder's manifest says were left out; empty without a manifest."""
    path = Path(folder) / MANIFEST
    found = read_json(path, "delete it").get("failures", ()) if path.is_file() else ()
    return {entry["image"]: entry["reason"] for entry in found}


def made_of(dataset, folder):
    """A split without the images that `folder`, made from it, had to leave out; says so if there are any."""
    reasons = failed_images(folder)
    failed = [image_id for image_id in dataset.ids if image_id in reasons]
    if not failed:
        return dataset
    print(f"Leaving out {len(failed)} images that {folder} was made without, such as {failed[0]}", file=sys.stderr)
    return dataset.without(failed)


def _damaged(dataset, index):
    try:
        dataset.image(index)
    except ImageError:
        return True
    return False


def read_manifest(folder, step):
    """The manifest of a finished folder of `step` ("cam", "mask", ...); UserError with the command that makes it."""
    remedy = f"run: {STEP_COMMAND[step]}"
    manifest = read_json(Path(folder) / MANIFEST, remedy)
    if manifest.get("step") != step:
        raise UserError(f"{folder} holds the results of step {manifest.get('step')}, not {step}; name another folder")
    if not manifest.get("complete"):
        raise UserError(f"{folder} is unfinished; {remedy} (finished images are kept)")
    return manifest
