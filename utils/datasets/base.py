"""A split of a dataset: its ids, labels, images and ground truth; and what a new dataset has to provide."""
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from utils import distributed
from utils.errors import UserError
from utils.files import short_hash
from utils.images import SUFFIXES, image_size, missing_image, read_image
from utils.labels import IGNORE, read_mask
from utils.recipes import by_step

# (image id, its row of labels) -> (where the mask comes from, for messages; mask, uint8 (H, W))
Truth = Callable[[str, np.ndarray | None], tuple[Path | str, np.ndarray]]


@dataclass
class Dataset:
    """One split of a dataset.  Only ids, labels and file names are held in memory; images and masks are read on demand.

    name: a key of `utils.datasets.DATASETS`.  root: its folder.  split: its name.  training_splits: the splits made for
    training, the default first.  classes: names of the K foreground classes.  ids: image ids (file stems).
    labels: (N, K) uint8, 1 where the image is known to show the class, or None if the split has no labels.
    image_dir: folder of the images.  files: their names in it.
    truth: reads the ground truth of an image, or None if there is none.  lacking: what is missing then, for messages.
    """
    name: str
    root: Path
    split: str
    training_splits: tuple[str, ...]
    classes: list[str]
    ids: list[str]
    labels: np.ndarray | None
    image_dir: Path
    files: list[str]
    truth: Truth | None = None
    lacking: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, Self]]:
        """(image id, a split of that image alone) one after the other: work for `utils.parallel.map_parallel`."""
        return ((image_id, self.subset([i])) for i, image_id in enumerate(self.ids))

    def image_path(self, index: int) -> Path:
        """The file of an image."""
        return self.image_dir / self.files[index]

    def image(self, index: int) -> np.ndarray:
        """RGB uint8 (H, W, 3).  UserError if the file is missing, ImageError if it cannot be decoded."""
        return read_image(self.image_path(index))

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of an image, from its header alone.  Raises like `image`."""
        return image_size(self.image_path(index))

    def label(self, index: int) -> np.ndarray | None:
        """(K,) uint8, or None if the split has no labels."""
        return None if self.labels is None else self.labels[index]

    def mask(self, index: int) -> np.ndarray:
        """Ground truth uint8 (H, W): 0 background, class k as k + 1, 255 ignored.

        Raises UserError if the split has none, or if the image's is missing, damaged or of another size.
        """
        self.check_truth()
        source, mask = self.truth(self.ids[index], self.label(index))
        check_size(source, mask, self.size(index), "replace the file that is wrong")
        return mask

    def check_truth(self) -> None:
        """UserError, with what is missing, unless the split has ground truth."""
        if self.truth is None:
            reason = f" ({self.lacking})" if self.lacking else ""
            raise UserError(f"{self.root} has no ground truth for split {self.split}{reason}")

    def stamps(self, labels: bool) -> list[str]:
        """For each image 16 hex digits that change when its file does (name, bytes, time of change).

        labels: whether they also change with the image's row of labels and with the list of classes.
        The folder does not count: a copy that keeps the times has the same stamps.
        Raises UserError if a file is missing.
        """
        classes = json.dumps(self.classes).encode() if labels else b""
        stamps = []
        for index in range(len(self)):
            path = self.image_path(index)
            try:
                # One look for each file: on Linux faster than os.scandir, whose entries lack sizes and times.
                status = os.stat(path)
            except FileNotFoundError:
                raise missing_image(path) from None
            row = self.label(index) if labels else None
            stamps.append(short_hash(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(),
                                     b"" if row is None else row.tobytes(), classes))
        return stamps

    def subset(self, keep: Iterable[int]) -> Self:
        """The same split with only the images at the positions `keep`."""
        keep = list(keep)
        return replace(self, ids=[self.ids[i] for i in keep], files=[self.files[i] for i in keep],
                       labels=None if self.labels is None else self.labels[keep])

    def shard(self) -> Self:
        """The images that this rank works on; all of them in a single process."""
        return self if distributed.world() == 1 else self.subset(distributed.shard(range(len(self))))

    def without(self, image_ids: Collection[str]) -> Self:
        """The same split without some images."""
        left_out = set(image_ids)
        return self.subset([i for i, image_id in enumerate(self.ids) if image_id not in left_out])


@dataclass(frozen=True)
class Layout:
    """What a dataset provides; one line in `utils.datasets.DATASETS` registers it.

    open: function (root: Path, split: str | None, difficult: bool) -> Dataset, where None is the training split.
    data_root: default of --data_root.  test_split: what step 6 tests on by default; None is the training split.
    defaults: {step: {flag: default}}; the steps are "stage1", "stage2", "masks" and "deeplab".
    download: function that fetches the dataset into a folder, or None.  remedy: what to do if there is no such folder.
    """
    open: Callable[..., Dataset]
    data_root: str
    test_split: str | None = None
    defaults: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: by_step(1024))
    download: Callable[[Path], None] | None = None
    remedy: str = "create it"


# --- ground truth ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pictures:
    """Ground truth as pictures <image_id>.png of class indices; of several folders the first that has the file counts.

    classes: K.  The values 0 (background), 1..K and 255 (ignored) are allowed.
    """
    folders: tuple[Path, ...]
    classes: int

    def find(self, image_id: str) -> Path | None:
        """The path of an image's mask, or None if no folder has it."""
        paths = (folder / f"{image_id}.png" for folder in self.folders)
        return next((path for path in paths if path.is_file()), None)

    def __call__(self, image_id: str, _: np.ndarray | None) -> tuple[Path, np.ndarray]:
        path = self.find(image_id) or self.folders[0] / f"{image_id}.png"
        return path, class_indices(path, read_truth(path), self.classes)


def read_truth(path: Path) -> np.ndarray:
    """The values of a picture of ground truth, uint8 (H, W).  UserError if it is missing, damaged or in colours."""
    if not path.is_file():
        raise UserError(f"no ground truth {path}; put it there or take its id out of the split file")
    return read_mask(path)


def class_indices(path: Path, values: np.ndarray, classes: int) -> np.ndarray:
    """uint8 values as they are; UserError unless they are 0 to `classes` or 255."""
    same = {value: value for value in (*range(classes + 1), IGNORE)}
    return translated(path, values, same, f"0 to {classes} and 255")


def translated(path: Path, values: np.ndarray, mapping: Mapping[int, int], allowed: str) -> np.ndarray:
    """uint8 values through a mapping; UserError, with the words of `allowed`, for a value that is not in it."""
    table = np.full(256, -1, np.int16)
    table[list(mapping)] = list(mapping.values())
    mask = table[values]
    if (mask < 0).any():
        raise UserError(f"{path} holds the value {int(values[mask < 0][0])}; only {allowed} may stand there")
    return mask.astype(np.uint8)


def check_size(source: Path | str, mask: np.ndarray, size: Sequence[int], remedy: str) -> None:
    """UserError, with the remedy, unless the mask read from `source` has its image's size (H, W)."""
    if mask.shape != tuple(size):
        raise UserError(f"{source} is {mask.shape[1]}x{mask.shape[0]} but its image is {size[1]}x{size[0]}; {remedy}")


# --- lists and folders -----------------------------------------------------------------------------------------------

def read_lines(path: Path) -> list[str]:
    """The lines of a text file without blank ones and comments (#); UserError if it is missing or not UTF-8."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        listed = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) if path.parent.is_dir() else ""
        raise UserError(f"no file {path}" + (f"; there is: {listed}" if listed else "; create it")) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8; replace it") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); name a text file") from None
    return [line for line in lines if line and not line.startswith("#")]


def image_files(folder: Path, ids: Iterable[str]) -> list[str | None]:
    """The name of each id's image in a folder, under any suffix of `SUFFIXES`, or None where there is none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data_root should hold {folder.name}/")
    # One listing instead of a look for every id and suffix: on a network disk, seconds instead of minutes.
    there = set(os.listdir(folder))
    return [next((image_id + suffix for suffix in SUFFIXES if image_id + suffix in there), None) for image_id in ids]


def check_tree(root: Path, parts: Sequence[str], layout: str, nested: Sequence[str] = ()) -> None:
    """UserError, with what was expected and what was found, unless `root` has the folders `parts`.

    nested: folders below `root` where copies of the dataset often begin; one that fits is named as the remedy.
    """
    missing = [part for part in parts if not (root / part).is_dir()]
    if not missing:
        return
    found = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "") or "nothing"
    inside = next((root / name for name in nested if all((root / name / part).is_dir() for part in parts)), None)
    remedy = f"pass --data_root {inside}" if inside else "pass the folder that holds them as --data_root"
    raise UserError(f"{root} is not {layout}: expected {', '.join(f'{part}/' for part in parts)}, found {shown}; "
                    f"{remedy}")
