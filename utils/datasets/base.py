"""A split of a dataset: its ids, labels, images and ground truth; and what a new dataset has to provide."""
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from utils import distributed
from utils.datasets.lists import mask_file, without_mask
from utils.errors import UserError
from utils.files import file_stamp, short_hash
from utils.grids import capped_size, resize_image
from utils.images import image_size, missing_image, read_image, read_reduced
from utils.labels import IGNORE, read_mask
from utils.log import say
from utils.recipes import by_step

# (image id, its row of labels) -> (where the mask comes from, for messages; mask, uint8 (H, W)).  May have methods:
# missing(ids) -> the ids without a mask; files(ids) -> the files that hold theirs; size(image_id) -> (H, W) of a mask,
# from its header.
Truth = Callable[[str, np.ndarray | None], tuple[Path | str, np.ndarray]]


@dataclass
class Dataset:
    """One split of a dataset.  Only ids, labels and file names are held in memory; images and masks are read on demand.

    name: a key of `utils.datasets.DATASETS`.  root: its folder.  split: its name.  training_splits: the splits made for
    training, the default first.  classes: names of the K foreground classes.  ids: image ids (file stems).
    labels: (N, K) uint8, 1 where the image is known to show the class, or None if the split has no labels.
    image_dir: folder of the images.  files: their names in it.
    truth: reads the ground truth of an image, or None if there is none.  lacking: what is missing then, for messages.
    displayed: whether the EXIF orientation of an image is applied where its annotation's size does not tell.
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
    displayed: bool = False

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
        return read_image(self.image_path(index), partial(self._shows, index))

    def photo(self, index: int, used: float) -> tuple[np.ndarray, tuple[int, int]]:
        """(image, full size (H, W)): the image for a use that shrinks it, see `utils.images.read_reduced`."""
        if type(self).image is not Dataset.image:  # a format of its own
            image = self.image(index)
            return image, image.shape[:2]
        return read_reduced(self.image_path(index), used, partial(self._shows, index))

    def thumbnail(self, index: int, side: int) -> np.ndarray:
        """`image`, scaled down so that its long side has at most `side` pixels.  Raises like `image`."""
        image, size = self.photo(index, side / 2)
        return resize_image(image, capped_size(size, side))

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of an image, from its header alone.  Raises like `image`."""
        return image_size(self.image_path(index), partial(self._shows, index))

    def _shows(self, index: int, stored: tuple[int, int], orientation: int) -> bool:
        """Whether the EXIF orientation of an image is applied: as the size of its annotation tells, else as is the rule
        of the dataset."""
        of_truth = getattr(self.truth, "size", None)
        annotated = of_truth(self.ids[index]) if of_truth else None
        if annotated in (stored, stored[::-1]) and stored[0] != stored[1] and orientation >= 5:
            return annotated != stored
        _tell_rule(self.name, self.displayed, self.image_path(index), orientation)
        return self.displayed

    def label(self, index: int) -> np.ndarray | None:
        """(K,) uint8, or None if the split has no labels."""
        return None if self.labels is None else self.labels[index]

    def mask(self, index: int) -> np.ndarray:
        """Ground truth uint8 (H, W): 0 background, class k as k + 1, 255 ignored.

        Raises UserError if the split has none, or if the image's is missing, damaged or of another size.
        """
        self._check_any_truth()
        source, mask = self.truth(self.ids[index], self.label(index))
        check_size(source, mask, self.size(index), "replace the file that is wrong")
        return mask

    def check_truth(self) -> None:
        """UserError, with what is missing, unless the split has ground truth of every image."""
        self._check_any_truth()
        find = getattr(self.truth, "missing", None)
        missing = find(self.ids) if find else ()
        if missing:
            raise UserError(f"{len(missing)} of the {len(self)} images of split {self.split} in {self.root} have no "
                            f"ground truth, such as {missing[0]}; complete it, or name a split or --ids that has it")

    def _check_any_truth(self) -> None:
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

    def file_sizes(self) -> list[int]:
        """The bytes of each image's file; -1 for an image without one."""
        paths = map(self.image_path, range(len(self)))
        return [path.stat().st_size if path.exists() else -1 for path in paths]

    def truth_stamp(self) -> str | None:
        """16 hex digits that change when the ground truth of the split does (its files, ids, labels, classes); None if
        there is none.  Folders do not count, as in `stamps`."""
        if self.truth is None:
            return None
        files = getattr(self.truth, "files", None)
        stamps = [(path.name, *file_stamp(path)[1:]) for path in (files(self.ids) if files else ()) if path.is_file()]
        labels = b"" if self.labels is None else self.labels.tobytes()
        return short_hash(json.dumps([self.classes, self.ids, stamps]).encode(), labels)

    def subset(self, keep: Iterable[int]) -> Self:
        """The same split with only the images at the positions `keep`."""
        keep = list(keep)
        return replace(self, ids=[self.ids[i] for i in keep], files=[self.files[i] for i in keep],
                       labels=None if self.labels is None else self.labels[keep])

    def spread(self, count: int) -> list[int]:
        """Up to `count` positions, evenly spread from the first to the last."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)).tolist()

    def shard(self) -> Self:
        """The images that this rank works on; all of them in a single process."""
        return self if distributed.world() == 1 else self.subset(distributed.shard(range(len(self))))

    def without(self, image_ids: Collection[str]) -> Self:
        """The same split without some images."""
        left_out = set(image_ids)
        return self.subset([i for i, image_id in enumerate(self.ids) if image_id not in left_out])


_told = set()  # datasets whose rule on orientation this process has stated


def _tell_rule(name: str, displayed: bool, path: Path, orientation: int) -> None:
    if name not in _told:
        _told.add(name)
        say(f"Note: {path} has EXIF orientation {orientation}; images of --dataset {name} are read as "
            f"{'displayed' if displayed else 'stored'}, where the size of their ground truth does not say otherwise")


@dataclass(frozen=True)
class Layout:
    """What a dataset provides; one line in `utils.datasets.DATASETS` registers it.

    open: function (root: Path, split: str | None, difficult: bool) -> Dataset, where None is the training split.
    data_root: default of --data_root.  test_split: what step 6 tests on by default, or a function of the root that says
    it; None is the training split.  scored_split: what a whole run scores masks on, where not on the training split.
    defaults: {step: {flag: default}}; the steps are "stage1", "stage2", "masks" and "deeplab".
    download: function that fetches the dataset into a folder, or None.  remedy: what to do if there is no such folder.
    """
    open: Callable[..., Dataset]
    data_root: str
    test_split: str | Callable[[Path], str | None] | None = None
    defaults: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: by_step(1024))
    download: Callable[[Path], None] | None = None
    remedy: str = "create it"
    scored_split: str | None = None

    def tested(self, root: str | Path) -> str | None:
        """The split that step 6 tests on by default."""
        return self.test_split(Path(root)) if callable(self.test_split) else self.test_split


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
        return mask_file(self.folders, image_id)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """The ids without a mask."""
        return without_mask(self.folders, ids)

    def size(self, image_id: str) -> tuple[int, int] | None:
        """(H, W) of a mask, or None if there is none that can be read."""
        return mask_size(self.find(image_id))

    def files(self, ids: Iterable[str]) -> list[Path]:
        """The masks that there are of some images."""
        return [path for path in map(self.find, ids) if path is not None]

    def __call__(self, image_id: str, _: np.ndarray | None) -> tuple[Path, np.ndarray]:
        path = self.find(image_id) or self.folders[0] / f"{image_id}.png"
        return path, class_indices(path, read_truth(path), self.classes)


def mask_size(path: Path | None) -> tuple[int, int] | None:
    """(H, W) of a mask from its header, or None if it is missing or damaged, which whoever reads it will say."""
    try:
        return None if path is None else image_size(path)
    except UserError:
        return None


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
