"""A plain folder of one's own images: images/, labels.csv and, for scores, masks/."""
import csv
from pathlib import Path

import numpy as np

from utils.datasets.base import Dataset, Layout, Pictures, image_files, read_lines
from utils.errors import UserError


def open_folder(root: Path, split: str | None, difficult: bool = True) -> Dataset:
    """images/ and labels.csv (image_id,class[;class...]); optional masks/, and <split>.txt with one id a line.

    Classes are the names in labels.csv, sorted, or the lines of classes.txt in their order.  An empty class field means
    that the image is known to show none.  difficult: ignored.
    """
    table = _read_labels(root / "labels.csv")
    classes = _classes(root, table)
    training = "train" if (root / "train.txt").is_file() else "all"
    split = split or training
    ids = list(table) if split == "all" else read_lines(root / f"{split}.txt")
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    for index, image_id in enumerate(ids):
        for name in _row(table, image_id, root):
            if name not in classes:
                raise UserError(f"labels.csv gives {image_id} the class {name!r}, which is not in "
                                f"{root / 'classes.txt'}")
            labels[index, classes.index(name)] = 1
    truth = Pictures((root / "masks",), len(classes)) if (root / "masks").is_dir() else None
    return Dataset("folder", root, split, (training,), classes, ids, labels, root / "images",
                   image_files(root / "images", ids), truth, "no folder masks")


def _classes(root: Path, table: dict[str, list[str]]) -> list[str]:
    names = root / "classes.txt"
    classes = read_lines(names) if names.is_file() else sorted({name for row in table.values() for name in row})
    if not classes:
        raise UserError(f"{root / 'labels.csv'} names no class; write one image a line: image_id,class[;class...]")
    if len(classes) > 254:
        raise UserError(f"{root} has {len(classes)} classes; masks of 8 bits hold at most 254")
    return classes


def _row(table: dict[str, list[str]], image_id: str, root: Path) -> list[str]:
    if image_id not in table:
        raise UserError(f"{root / 'labels.csv'} has no line for {image_id}; add one: {image_id},class[;class...]")
    return table[image_id]


def _read_labels(path: Path) -> dict[str, list[str]]:
    rows = list(csv.reader(read_lines(path)))
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


FOLDER = Layout(open_folder, "data/mine")
