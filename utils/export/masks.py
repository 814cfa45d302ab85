"""The masks that an export is made from, as they lie on disk."""
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import file_hash, short_hash
from utils.labels import IGNORE
from utils.log import progress


@dataclass(frozen=True)
class Labelled:
    """An image and its mask.  name: of its results.  photo: its file.  mask: (H, W) uint8, class k as k + 1."""
    name: str
    photo: Path
    mask: np.ndarray

    def shown(self) -> list[int]:
        """The mask's values that are classes, ascending; ignored pixels are of no class."""
        return [value for value in np.flatnonzero(np.bincount(self.mask.ravel(), minlength=256)).tolist()
                if value not in (0, IGNORE)]


@dataclass(frozen=True)
class MaskSet:
    """Masks of images, read one after the other.

    classes: names of the K foreground classes.  split: name of the set.  training: whether it is meant for training.
    names, photos, paths: of each image what its results are called, its file, and that of its mask.
    read: path and position of a mask -> (H, W) uint8, with the values 0 to K and 255.
    """
    classes: Sequence[str]
    split: str
    training: bool
    names: Sequence[str]
    photos: Sequence[Path]
    paths: Sequence[Path]
    read: Callable[[Path, int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    def each(self, description: str) -> Iterator[Labelled]:
        """All images, with a bar of that description."""
        for index, name in enumerate(progress(self.names, description)):
            yield Labelled(name, self.photos[index], self.read(self.paths[index], index))

    def digest(self, home: Path) -> str:
        """16 hex digits that change with the masks' contents and with whatever else an export in `home` depends on."""
        rows = [(name, relative(photo, home), file_hash(path))
                for name, photo, path in zip(self.names, self.photos, self.paths)]
        return short_hash(json.dumps([list(self.classes), self.split, self.training, rows]).encode())


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with slashes.  The folder's own links are followed: `..` leads where they lead."""
    return Path(os.path.relpath(os.path.abspath(path), os.path.realpath(folder))).as_posix()
