"""A plain folder of one's own images: images/, labels.csv and, for scores, masks/."""
import csv
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from utils.datasets.base import Dataset, Layout, Pictures
from utils.datasets.lists import check_ids, check_names, image_files, plain, read_lines, without_suffix
from utils.errors import UserError
from utils.images import is_image_name
from utils.log import warn

COMMENT = "# "  # an id may begin with #
Table = dict[str, list[str]]  # {image id: names of its classes}


def open_folder(root: Path, split: str | None, difficult: bool = True) -> Dataset:
    """images/ and labels.csv (image_id,class[;class...]); optional masks/, and <split>.txt with one id a line.

    An image id is the name of a file in images/, with or without its suffix.  Classes are the names in labels.csv,
    sorted, or the lines of classes.txt in their order; lines without an image do not count, and are warned about.  An
    empty class field means that the image is known to show none.  difficult: ignored.
    """
    images = root / "images"
    names = {plain(name) for name in os.listdir(images)} if images.is_dir() else set()
    table = _read_labels(root / "labels.csv", names)
    there = _stems(names)
    if images.is_dir():
        _tell_gaps(root, table, there)
    classes = _classes(root, {image_id: row for image_id, row in table.items() if image_id in there} or table)
    training = "train" if (root / "train.txt").is_file() else "all"
    split = split or training
    ids = list(table) if split == "all" else _read_ids(root / f"{split}.txt", names)
    place = {name: index for index, name in enumerate(classes)}
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    for index, image_id in enumerate(ids):
        for name in _row(table, image_id, root):
            if name in place:
                labels[index, place[name]] = 1
            elif image_id in there:  # else `open_dataset` refuses the split for want of the image
                raise UserError(f"labels.csv gives {image_id} the class {name!r}, which is not in "
                                f"{root / 'classes.txt'}")
    truth = Pictures((root / "masks",), len(classes)) if (root / "masks").is_dir() else None
    return Dataset("folder", root, split, (training,), classes, ids, labels, images, image_files(images, ids), truth,
                   "no folder masks", displayed=True)


_told = set()  # warnings that this process has given


def _tell_gaps(root: Path, table: Table, there: Collection[str]) -> None:
    """Warn once of lines of labels.csv without an image and of images without a line.  there: ids of the images."""
    labels, images = root / "labels.csv", root / "images"
    lacking = [image_id for image_id in table if image_id not in there]
    if lacking:
        _warn_once(f"WARNING: {len(lacking)} of the {len(table)} lines in {labels} have no image in {images}, such as "
                   f"that of {lacking[0]!r}; they do not count, nor do classes that they alone name: put the images "
                   "there, or take the lines out")
    unnamed = sorted(there - table.keys())
    if unnamed:
        _warn_once(f"WARNING: {len(unnamed)} of the {len(there)} images in {images} have no line in {labels} and are "
                   f"left out, such as {unnamed[0]}; add a line for each: image_id,class[;class...]")


def _warn_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        warn(text)


def _read_ids(path: Path, names: Collection[str]) -> list[str]:
    ids = [without_suffix(plain(line), names) for line in read_lines(path, COMMENT)]
    check_ids(ids, path)
    return ids


def _classes(root: Path, table: Mapping[str, list[str]]) -> list[str]:
    path = root / "classes.txt"
    if path.is_file():
        classes = [plain(name) for name in read_lines(path, COMMENT)]
    else:
        path = root / "labels.csv"
        classes = sorted({name for row in table.values() for name in row})
    if not classes:
        raise UserError(f"{root / 'labels.csv'} names no class; write one image a line: image_id,class[;class...]")
    check_names(classes, path)
    if len(classes) > 254:
        raise UserError(f"{root} has {len(classes)} classes; masks of 8 bits hold at most 254")
    return classes


def _row(table: Mapping[str, list[str]], image_id: str, root: Path) -> list[str]:
    if image_id not in table:
        raise UserError(f"{root / 'labels.csv'} has no line for {image_id}; add one: {image_id},class[;class...]")
    return table[image_id]


def _read_labels(path: Path, names: Collection[str]) -> Table:
    """labels.csv.  names: of the files in images/.

    UserError, among others, if the first line names no image: it is most likely a header of other words.
    """
    table, headed = {}, False
    for number, line in enumerate(read_lines(path, COMMENT)):
        row = _fields(path, line)
        if number == 0 and row[0] == "image_id":
            headed = True
            continue
        image_id = without_suffix(plain(row[0]), names)
        if image_id in table:
            raise UserError(f"{path} has two lines for {image_id}; join them: {image_id},class;class")
        table[image_id] = [plain(name.strip()) for name in row[1].split(";") if name.strip()]
    check_ids(list(table), path)
    first = next(iter(table), None)
    if table and names and not headed and first not in _stems(names):
        raise UserError(f"{path} begins with a line for {first!r}, of which there is no image; if it is a header, "
                        "write image_id,class; else put the image there, or take the line out")
    return table


def _stems(names: Collection[str]) -> set[str]:
    """The ids of the images among the names of files."""
    return {os.path.splitext(name)[0] for name in names if is_image_name(name)}


def _fields(path: Path, line: str) -> list[str]:
    """The two fields of a line.  Each line is read alone, so that an unbalanced quote cannot swallow the next ones."""
    try:
        (row,) = csv.reader([line], strict=True, skipinitialspace=True)
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path} has the line {line[:60]!r} ({error}); write: image_id,class[;class...]") from None
    if len(row) != 2 or not row[0].strip():
        raise UserError(f"{path} has the line {line[:60]!r}; expected: image_id,class[;class...]")
    return [field.strip() for field in row]


FOLDER = Layout(open_folder, "data/mine", lambda root: "test" if (root / "test.txt").is_file() else None)
