"""Datasets behind one small interface: Oxford-IIIT Pet in its official layout, and a plain folder of own images."""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.images import find_image, image_size, read_image

IGNORE = 255


@dataclass
class Dataset:
    """One split of a dataset.

    name: "pet" or "folder".  root: its folder.  split: its name.  classes: names of the K foreground classes.
    ids: image ids (file stems).  labels: (N, K) uint8, 1 where the image is known to show the class, or None if the
    split has no labels.  image_paths: one per id.  mask_paths: one per id, or None without ground truth.
    """
    name: str
    root: Path
    split: str
    classes: list
    ids: list
    labels: np.ndarray
    image_paths: list
    mask_paths: list
    training_split: str

    def __len__(self):
        return len(self.ids)

    def image(self, index):
        """RGB uint8 (H, W, 3)."""
        return read_image(self.image_paths[index])

    def mask(self, index):
        """Ground truth uint8 (H, W): 0 background, class k as k + 1, 255 ignored.  UserError if it is damaged."""
        if self.mask_paths is None:
            raise UserError(f"{self.name} at {self.root} has no ground-truth masks for split {self.split}")
        return read_truth(self, index)

    def subset(self, keep):
        """The same split with only the images at the positions `keep`."""
        def pick(items):
            return items if items is None else [items[i] for i in keep]
        labels = None if self.labels is None else self.labels[list(keep)]
        return Dataset(self.name, self.root, self.split, self.classes, pick(self.ids), labels,
                       pick(self.image_paths), pick(self.mask_paths), self.training_split)


def read_truth(dataset, index):
    """Decode the ground truth of one image (see `Dataset.mask`)."""
    path, size = dataset.mask_paths[index], image_size(dataset.image_paths[index])
    values = _read_grey(path)
    if values.shape != size:
        raise UserError(f"{path} is {values.shape[1]}x{values.shape[0]} but its image is {size[1]}x{size[0]}; "
                        "replace the file that is wrong")
    if dataset.name == "pet":
        label = int(dataset.labels[index].argmax()) + 1
        return _lookup(path, values, {1: label, 2: 0, 3: IGNORE}, "1 (pet), 2 (background), 3 (border)")
    allowed = {**{value: value for value in range(len(dataset.classes) + 1)}, IGNORE: IGNORE}
    return _lookup(path, values, allowed, f"0 to {len(dataset.classes)} and 255")


def _read_grey(path):
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1"):
                raise UserError(f"{path} has mode {image.mode}; a mask is an 8-bit palette or grey picture")
            return np.asarray(image if image.mode != "1" else image.convert("L"))
    except FileNotFoundError:
        raise UserError(f"no ground truth {path}; put it there or take its id out of the split file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot decode {path} ({error}); replace the file") from None


def _lookup(path, values, mapping, allowed):
    table = np.full(256, -1, np.int16)
    table[list(mapping)] = list(mapping.values())
    mask = table[values]
    if (mask < 0).any():
        raise UserError(f"{path} holds the value {int(values[mask < 0][0])}; only {allowed} may stand there")
    return mask.astype(np.uint8)


def open_dataset(name, root, split=None, limit=None, ids_file=None, download=False):
    """Open a split.

    name: "pet" or "folder".  root: folder of the data.  split: None for the training split.
    limit: only the first so many images.  ids_file: a text file; only the ids that stand in it, one a line.
    Raises UserError, with the remedy, if anything that a later step needs is not there.
    """
    root = Path(root)
    if download:
        _download_pet(name, root)
    if not root.is_dir():
        made = "download it with --download, or make toy data with: python -m data.make_toy"
        raise UserError(f"no data folder {root}; pass --data_root, or {made if name == 'pet' else 'create it'}")
    dataset = OPENERS[name](root, split)
    keep = range(len(dataset))
    if ids_file is not None:
        wanted = set(_read_lines(Path(ids_file)))
        keep = [i for i in keep if dataset.ids[i] in wanted]
    dataset = dataset.subset(list(keep)[:limit])
    if not dataset.ids:
        chosen = f" among the ids of {ids_file}" if ids_file is not None else ""
        raise UserError(f"split {dataset.split} of {root} holds no image{chosen}; name another with --split")
    missing = [image_id for image_id, path in zip(dataset.ids, dataset.image_paths) if path is None]
    if missing:
        raise UserError(f"split {dataset.split} names {missing[0]} (and {len(missing) - 1} more) but {root / 'images'} "
                        "has no such image; complete the images or correct the split file")
    return dataset


def _read_lines(path):
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


def _image_paths(folder, ids):
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data_root should hold images/")
    return [find_image(folder, image_id) for image_id in ids]


def _open_pet(root, split):
    """Parkhi et al., CVPR 2012: images/, annotations/{list,trainval,test}.txt, annotations/trimaps/."""
    split = split or "trainval"
    folder = root / "annotations"
    rows = _pet_rows(folder / f"{split}.txt")
    # Class indices must not depend on the split, so they come from all the lists there are.
    known = dict(row for name in ("list", "trainval", "test") if (folder / f"{name}.txt").is_file()
                 for row in _pet_rows(folder / f"{name}.txt"))
    known.update(rows)
    names = {class_id: image_id.rsplit("_", 1)[0] for image_id, class_id in known.items()}
    order = {class_id: index for index, class_id in enumerate(sorted(names))}
    labels = np.zeros((len(rows), len(order)), np.uint8)
    for index, (_, class_id) in enumerate(rows):
        labels[index, order[class_id]] = 1
    ids = [image_id for image_id, _ in rows]
    trimaps = folder / "trimaps"
    masks = [trimaps / f"{image_id}.png" for image_id in ids] if trimaps.is_dir() else None
    return Dataset("pet", root, split, [names[class_id] for class_id in sorted(names)], ids, labels,
                   _image_paths(root / "images", ids), masks, "trainval")


def _pet_rows(path):
    rows = []
    for line in _read_lines(path):
        words = line.split()
        if len(words) < 2 or not words[1].isdigit():
            raise UserError(f"{path} has the line {line[:60]!r}; expected: image CLASS-ID SPECIES BREED-ID")
        rows.append((words[0], int(words[1])))
    return rows


def _open_folder(root, split):
    """images/ and labels.csv (image_id,class[;class...]); optional masks/, and <split>.txt with one id a line.

    Classes are the names in labels.csv, sorted, or the lines of classes.txt, whose order then counts.  An empty class
    field means that the image is known to show none.
    """
    table = _read_labels(root / "labels.csv")
    names = root / "classes.txt"
    classes = _read_lines(names) if names.is_file() else sorted({name for row in table.values() for name in row})
    if not classes:
        raise UserError(f"{root / 'labels.csv'} names no class; write one image a line: image_id,class[;class...]")
    if len(classes) > 254:
        raise UserError(f"{root} has {len(classes)} classes; masks of 8 bits hold at most 254")
    split = split or ("train" if (root / "train.txt").is_file() else "all")
    ids = list(table) if split == "all" else _read_lines(root / f"{split}.txt")
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    for index, image_id in enumerate(ids):
        for name in _row(table, image_id, root):
            if name not in classes:
                raise UserError(f"labels.csv gives {image_id} the class {name!r}, which is not in {names}")
            labels[index, classes.index(name)] = 1
    masks = [root / "masks" / f"{image_id}.png" for image_id in ids] if (root / "masks").is_dir() else None
    training = "train" if (root / "train.txt").is_file() else "all"
    return Dataset("folder", root, split, classes, ids, labels, _image_paths(root / "images", ids), masks, training)


def _row(table, image_id, root):
    if image_id not in table:
        raise UserError(f"{root / 'labels.csv'} has no line for {image_id}; add one: {image_id},class[;class...]")
    return table[image_id]


def _read_labels(path):
    _read_lines(path)  # says so in one line if the file is missing or is no text
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row and not row[0].startswith("#")]
    if rows and rows[0][0].strip() == "image_id":
        rows = rows[1:]
    table = {}
    for row in rows:
        if len(row) != 2:
            raise UserError(f"{path} has the line {','.join(row)[:60]!r}; expected: image_id,class[;class...]")
        image_id = row[0].strip()
        if image_id in table:
            raise UserError(f"{path} has two lines for {image_id}; join them: {image_id},class;class")
        table[image_id] = [name.strip() for name in row[1].split(";") if name.strip()]
    return table


def _download_pet(name, root):
    """Fetch Pet through torchvision's dataset class, which unpacks into <parent>/oxford-iiit-pet."""
    if name != "pet" or root.name != "oxford-iiit-pet":
        raise UserError("--download fetches --dataset pet into a folder called oxford-iiit-pet, "
                        f"not {name} into {root}")
    if (root / "annotations" / "trainval.txt").is_file():
        return
    from torchvision.datasets import OxfordIIITPet
    try:
        OxfordIIITPet(str(root.parent), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not download Oxford-IIIT Pet into {root} ({error}); fetch images.tar.gz and "
                        f"annotations.tar.gz by hand and unpack them there") from None


OPENERS = {"pet": _open_pet, "folder": _open_folder}
