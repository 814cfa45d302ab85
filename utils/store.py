"""Folders of one file per image whose manifest.json says what the files are, and from which data they were made."""
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from utils import distributed
from utils.datasets.base import Dataset
from utils.errors import ImageError, UserError
from utils.files import check_checkpoint_file, check_record, file_hash, read_record, write_json
from utils.log import say, warn

MANIFEST = "manifest.json"
BEST, NEWEST = "model_best.pth.tar", "checkpoint.pth.tar"  # of a training: its result, and what --resume goes on from
STEP_COMMAND = {"cam": "python run_train.py --stage 1", "walk": "python run_inference.py",
                "affinity_labels": "python run_train.py --stage 2", "mask": "python run_inference.py",
                "deeplab": "python train_deeplab.py"}


def run_dir(step: str, backbone: str) -> Path:
    """Default output folder of a training step, e.g. output/stage1_resnet50."""
    return Path("output") / f"{step}_{backbone.replace('/', '_')}"


def chosen_checkpoint(path: str | None, step: str, default: str | None = None) -> str:
    """--model_path; left out, `default` if it is there, else the newest output/<step>_*/model_best.pth.tar.

    It is said, and no torch is imported, so that a missing file is known at once: UserError.
    """
    if path is None:
        found = sorted(Path("output").glob(f"{step}_*/{BEST}"), key=lambda path: path.stat().st_mtime)
        newest = str(found[-1]) if found else default
        path = default if default is not None and Path(default).is_file() else newest
    if path is None:
        raise UserError(f"no checkpoint output/{step}_*/{BEST}; run: {STEP_COMMAND[step]}, or pass another "
                        "with --model_path")
    check_checkpoint_file(path)
    say(f"Using {path}")
    return path


class Folder:
    """A folder of one file per image.

    identity: plain values that decide the files' contents, but for the images and labels they are made from.  Those are
    recorded image by image, as stamps (`Dataset.stamps`).  A finished file is kept and used again only if both are the
    same.  If not, the folder is left as it is, and `begin` says what differs, unless `overwrite` is given: then the
    files that differ are deleted and made again.
    labels: whether image labels decide the contents too.
    Of several processes, each makes its share of the files, and rank 0 the manifest; all call the methods alike.
    `failures`, {image id: reason}, are the images that --on_bad_image skip left out, for the manifest.
    """

    def __init__(self, path: str | Path, step: str, suffix: str, identity: Mapping[str, object], labels: bool = False,
                 overwrite: bool = False):
        self.path, self.step, self.suffix = Path(path), step, suffix
        self.identity = json.loads(json.dumps(identity))  # as it will read back
        self.labels, self.overwrite = labels, overwrite
        self.failures = {}

    def begin(self, dataset: Dataset) -> Dataset:
        """Make the folder ready for the files of a split.

        Returns the images whose file is not there yet and that this process is to make, as a smaller split.
        Raises UserError if the folder holds files of another step, identity or data, or of somebody else.
        """
        self.started = time.time()
        # Rank 0's list: the others may look when the first files of this run are there.
        missing = distributed.broadcast(self._prepare(dataset) if distributed.is_main() else None)
        return dataset.subset(distributed.shard(missing))

    def at(self, path: str | Path) -> "Folder":
        """The same kind of folder elsewhere, of which nothing is deleted."""
        return Folder(path, self.step, self.suffix, self.identity, self.labels)

    def check(self, dataset: Dataset) -> None:
        """Raise what `begin` would, before any work; nothing is changed."""
        if distributed.is_main():
            self._compare(dataset)

    def _prepare(self, dataset: Dataset) -> list[int]:
        there, stale, stamps, before = self._compare(dataset)
        for image_id in stale:
            (self.path / f"{image_id}{self.suffix}").unlink()
        kept = {image_id: before[image_id] for image_id in sorted(there - stale) if image_id in before}
        write_json(self.path / MANIFEST, {"step": self.step, "identity": self.identity, "complete": False,
                                          "stamps": {**kept, **stamps}})
        return [i for i, image_id in enumerate(dataset.ids) if image_id not in there - stale]

    def _compare(self, dataset: Dataset) -> tuple[set[str], set[str], dict[str, str], dict[str, str]]:
        """The ids that have a file, those of them whose file is to be deleted, and {id: stamp} now and before."""
        there, previous = self._files(), self._previous()
        if previous is None and there:
            raise UserError(f"{self.path} holds {self.suffix} files that this project did not write; "
                            "name another folder")
        if previous is not None and previous["step"] != self.step:
            raise UserError(f"{self.path} holds the results of step {previous['step']}, not {self.step}; "
                            "name another folder")
        stamps = dict(zip(dataset.ids, dataset.stamps(self.labels)))
        before = {} if previous is None else previous["stamps"]
        return there, self._stale(previous, there, stamps, before), stamps, before

    def _stale(self, previous: dict | None, there: set[str], stamps: dict[str, str], before: dict) -> set[str]:
        """The ids whose file may not be used; UserError if there are any and they may not be deleted either."""
        if previous is None or not there:
            return set()
        other = previous["identity"] != self.identity
        stale = there if other else {image_id for image_id in there & stamps.keys()
                                     if before.get(image_id) != stamps[image_id]}
        if stale and not self.overwrite:
            reason = (f"made with other settings: {differences(previous.get('identity'), self.identity)}" if other else
                      f"made from other images or labels, such as {min(stale)}")
            raise UserError(f"{self.path} holds {len(stale)} finished files {reason}; pass --overwrite to make them "
                            "again, or keep them: name another folder, or rename that one")
        return stale

    def holds(self, dataset: Dataset) -> bool:
        """Whether it is finished, of the same identity and data, and has every image of a split.

        An image that was left out as damaged need not be there while it is still damaged.
        """
        return distributed.broadcast(self._holds(dataset) if distributed.is_main() else None)

    def _holds(self, dataset: Dataset) -> bool:
        if not self.complete():
            return False
        there, failed, before = self._files(), failed_images(self.path), self._previous()["stamps"]
        for i, (image_id, stamp) in enumerate(zip(dataset.ids, dataset.stamps(self.labels))):
            if image_id not in there:
                if image_id not in failed or not _damaged(dataset, i):
                    return False
            elif before.get(image_id) != stamp:
                return False
        return True

    def complete(self) -> bool:
        """Whether it is finished and of the same identity, for the images it was made for."""
        previous = self._previous()
        return previous is not None and previous["identity"] == self.identity and bool(previous.get("complete"))

    def _files(self) -> set[str]:
        # One listing instead of a look for every image: on a network disk, seconds instead of minutes.
        names = os.listdir(self.path) if self.path.is_dir() else ()
        return {name.removesuffix(self.suffix) for name in names
                if name.endswith(self.suffix) and not name.startswith(".")}

    def finish(self, dataset: Dataset, record: Mapping[str, object], parent: Path | None = None) -> None:
        """Write the manifest, once all processes have come here: what was made, from what, how.

        record: {"options": ..., and the environment}.  parent: the folder it was made from; images that could not be
        made there count as left out here too.
        """
        failures = {} if parent is None else failed_images(parent)
        self.failures = distributed.gather_dict(self.failures, dataset.ids)  # of all ranks, in all ranks
        failures.update(self.failures)
        if distributed.is_main():
            stamps = self._previous()["stamps"]
            made = [image_id for image_id in dataset.ids if image_id not in failures]
            write_json(self.path / MANIFEST, {
                "step": self.step, "complete": True, "identity": self.identity, **record,
                "count": len(made), "seconds": round(time.time() - self.started, 1),
                "processes": distributed.world(),
                "failures": [{"image": image_id, "reason": reason} for image_id, reason in failures.items()],
                "made_from": None if parent is None else file_hash(Path(parent) / MANIFEST),
                "labels": self.labels, "images": made,
                "stamps": {image_id: stamp for image_id, stamp in stamps.items() if image_id not in failures}})
        distributed.barrier()

    def _previous(self) -> dict | None:
        return load_manifest(self.path, f"delete the folder {self.path} and run the step again") \
            if (self.path / MANIFEST).is_file() else None


def check_free(path: str | Path, step: str, overwrite: bool) -> None:
    """UserError, before a training whose result is not known yet, if its files would meet finished ones of another."""
    if (Path(path) / MANIFEST).is_file() and not overwrite:
        count = len(load_manifest(path, f"delete the folder {path}")["stamps"])
        raise UserError(f"{path} holds {count} files of an earlier run ({step}); name another folder, or pass "
                        "--overwrite to make them again")


def differences(before: object, now: object, name: str = "", shown: int = 4) -> str:
    """Where two nested dicts of plain values differ, in words: `scales was [1.0], is [0.5, 1.0]`."""
    found = _differences(before, now, name)
    return "; ".join(found[:shown]) + (f"; and {len(found) - shown} more" if len(found) > shown else "")


def _differences(before: object, now: object, name: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [text for key in sorted({*before, *now})
                for text in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)]
    return [] if before == now else [f"{name} was {_told(before)}, is {_told(now)}"]


def _told(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def failed_images(folder: str | Path) -> dict[str, str]:
    """{image id: reason} of the images that a folder's manifest says were left out; empty without a manifest."""
    there = (Path(folder) / MANIFEST).is_file()
    found = load_manifest(folder, "delete it")["failures"] if there else ()
    return {entry["image"]: entry["reason"] for entry in found}


def made_of(dataset: Dataset, folder: str | Path) -> Dataset:
    """Drop the images listed as failures in `folder`'s manifest; says so if there are any."""
    reasons = failed_images(folder)
    failed = [image_id for image_id in dataset.ids if image_id in reasons]
    if not failed:
        return dataset
    warn(f"Leaving out {len(failed)} images that {folder} was made without, such as {failed[0]}")
    return dataset.without(failed)


def _damaged(dataset: Dataset, index: int) -> bool:
    try:
        dataset.image(index)
    except ImageError:
        return True
    return False


def load_manifest(folder: str | Path, remedy: str) -> dict:
    """The manifest of a folder, finished or not; UserError with the remedy if it is missing, damaged or foreign."""
    path = Path(folder) / MANIFEST
    perhaps = {"identity": {}, "stamps": {}, "failures": [], "labels": False}
    manifest = {**perhaps, **read_record(path, remedy, {"step": str})}
    check_record(manifest, path, remedy, {name: type(value) for name, value in perhaps.items()})
    for entry in manifest["failures"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("image", "reason")):
            raise UserError(f"{path} is damaged: its failures do not name images and reasons; {remedy}")
    return manifest


def read_manifest(folder: str | Path, step: str) -> dict:
    """The manifest of a finished folder of `step` ("cam", "mask", ...); UserError with the command that makes it."""
    remedy = f"run: {STEP_COMMAND[step]}"
    manifest = load_manifest(folder, remedy)
    if manifest["step"] != step:
        raise UserError(f"{folder} holds the results of step {manifest['step']}, not {step}; name another folder")
    if not manifest.get("complete"):
        raise UserError(f"{folder} is unfinished; {remedy} (finished images are kept)")
    check_record(manifest, Path(folder) / MANIFEST, f"delete {folder}, then {remedy}", {"options": dict})
    return manifest


def mask_record(folder: str | Path) -> dict | None:
    """The manifest of a finished folder of masks; None for masks that were made elsewhere, and have none.

    UserError if there are no masks.
    """
    path = Path(folder)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path, "mask")
        check_record(manifest, path / MANIFEST, f"delete {folder}, then run: {STEP_COMMAND['mask']}", {"classes": list})
        return manifest
    if not path.is_dir() or not any(name.endswith(".png") for name in os.listdir(path)):
        raise UserError(f"no masks in {folder}; run: {STEP_COMMAND['mask']}, or pass a folder of masks with --mask_dir")
    return None


def check_data(dataset: Dataset, manifest: dict, folder: str | Path) -> None:
    """UserError unless a finished folder was made from the images, and the labels that mattered, of a split.

    Images that the folder does not have are not compared.
    """
    before = manifest["stamps"]
    other = [image_id for image_id, stamp in zip(dataset.ids, dataset.stamps(manifest["labels"]))
             if image_id in before and before[image_id] != stamp]
    if other:
        raise UserError(f"{folder} was made from other images or labels than those in {dataset.root}: {len(other)} "
                        f"differ, such as {other[0]}; run: {STEP_COMMAND[manifest['step']]} --overwrite, or pass the "
                        "--data_root it was made from")
