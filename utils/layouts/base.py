"""One split of a dataset, whatever its layout: its ids, its labels, where its images are, how its ground truth reads."""
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils import distributed
from utils.errors import UserError
from utils.images import SUFFIXES, image_size, read_image
from utils.labels import IGNORE, read_labels


@dataclass
class Dataset:
    """One split of a dataset.  Held in memory are ids, labels and file names alone; the rest is read when asked for.

    name: a key of `utils.datasets.LAYOUTS`.  root: its folder.  split: its name.  training_splits: the splits made to
    learn from, the default first.  classes: names of the K foreground classes.  ids: image ids (file stems).
    labels: (N, K) uint8, 1 where the image is known to show the class, or None if the split has no labels.
    image_dir: folder of the images.  files: their names in it.
    truth: function (image id, row of labels) -> (where it comes from, mask), or None without ground truth;
    lacking: then, what is missing, for messages.
    """
    name: str
    root: Path
    split: str
    training_splits: tuple
    classes: list
    ids: list
    labels: np.ndarray
    image_dir: Path
    files: list
    truth: object = None
    lacking: str = ""

    def __len__(self):
        return len(self.ids)

    def __iter__(self):
        """(image id, that image alone as a split), one after the other: work for `utils.parallel.map_parallel`."""
        return ((image_id, self.subset([i])) for i, image_id in enumerate(self.ids))

    def image_path(self, index):
        return self.image_dir / self.files[index]

    def image(self, index):
        """RGB uint8 (H, W, 3)."""
        return read_image(self.image_path(index))

    def size(self, index):
        """(H, W) of an image, from its header alone."""
        return image_size(self.image_path(index))

    def label(self, index):
        """(K,) uint8, or None if the split has no labels."""
        return None if self.labels is None else self.labels[index]

    def mask(self, index):
        """Ground truth uint8 (H, W): 0 background, class k as k + 1, 255 ignored.  UserError if it is damaged."""
        self.check_truth()
        source, mask = self.truth(self.ids[index], self.label(index))
        check_size(source, mask, self.size(index), "replace the file that is wrong")
        return mask

    def check_truth(self):
        """UserError, with what is missing, unless the split has ground truth."""
        if self.truth is None:
            reason = f" ({self.lacking})" if self.lacking else ""
            raise UserError(f"{self.root} has no ground truth for split {self.split}{reason}")

    def subset(self, keep):
        """The same split with only the images at the positions `keep`."""
        keep = list(keep)
        return replace(self, ids=[self.ids[i] for i in keep], files=[self.files[i] for i in keep],
                       labels=None if self.labels is None else self.labels[keep])

    def share(self):
        """The images that this one of several processes works on; all of them where it is alone."""
        return self if distributed.world() == 1 else self.subset(distributed.share(range(len(self))))

    def without(self, image_ids):
        """The same split without some images."""
        left_out = set(image_ids)
        return self.subset([i for i, image_id in enumerate(self.ids) if image_id not in left_out])


def check_size(source, mask, size, remedy):
    """UserError unless a mask, read from `source`, is of its image's size (H, W)."""
    if mask.shape != tuple(size):
        raise UserError(f"{source} is {mask.shape[1]}x{mask.shape[0]} but its image is {size[1]}x{size[0]}; {remedy}")


@dataclass(frozen=True)
class Pictures:
    """Ground truth as pictures <image_id>.png that hold class indices; of several folders the first that has it counts.

    classes: K.  Values 0 (background), 1..K and 255 (ignored) may stand there.
    """
    folders: tuple
    classes: int

    def find(self, image_id):
        """The path of an image's mask, or None if no folder has it."""
        paths = (folder / f"{image_id}.png" for folder in self.folders)
        return next((path for path in paths if path.is_file()), None)

    def __call__(self, image_id, _):
        path = self.find(image_id) or self.folders[0] / f"{image_id}.png"
        return path, translated(path, read_grey(path), *class_values(self.classes))


def class_values(classes):
    """For `translated`: the values of a mask of K classes as they are, and their description."""
    return {**{value: value for value in range(classes + 1)}, IGNORE: IGNORE}, f"0 to {classes} and 255"


def read_grey(path):
    """The values of a picture of ground truth, uint8 (H, W)."""
    missing = f"no ground truth {path}; put it there or take its id out of the split file"
    return read_labels(path, missing, "replace the file")


def translated(path, values, mapping, allowed):
    """uint8 values through a mapping; UserError, with the words of `allowed`, for a value it does not know."""
    table = np.full(256, -1, np.int16)
    table[list(mapping)] = list(mapping.values())
    mask = table[values]
    if (mask < 0).any():
        raise UserError(f"{path} holds the value {int(values[mask < 0][0])}; only {allowed} may stand there")
    return mask.astype(np.uint8)


def read_lines(path):
    """The lines of a text file without blank ones and comments (#); UserError if there is no such file."""
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


def image_files(folder, ids):
    """The name of each id's image in a folder, under any suffix of a picture, or None where there is none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data_root should hold {folder.name}/")
    # One listing instead of a look for every id and suffix: on a network disk, seconds instead of minutes.
    there = set(os.listdir(folder))
    return [next((image_id + suffix for suffix in SUFFIXES if image_id + suffix in there), None) for image_id in ids]


def check_tree(root, parts, layout, nested=()):
    """UserError, with what was expected and what was found, unless `root` has the folders `parts`.

    nested: folders below `root` where people's copies of the dataset often begin; one that fits is named as the remedy.
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
