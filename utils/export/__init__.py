"""Masks in the formats that annotation tools import.

A format is a function (empty folder, `MaskSet`) that writes files, in a file of its own, and one line in EXPORTS.
"""
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.export import coco, labelme, png, voc, yolo
from utils.export.folder import check_folder, filled
from utils.export.masks import MaskSet

__all__ = ["EXPORTS", "Format", "MaskSet", "check_export", "write_export"]
VERSION = 1  # of what the formats write; raise it when one changes, and earlier exports are written again
LINES = r"[\t\r\n]"  # what no format's class names may hold


@dataclass(frozen=True)
class Format:
    """write: see above.  forbidden: a pattern of what its class names may not hold besides."""
    write: Callable[[Path, MaskSet], None]
    forbidden: str = LINES


EXPORTS: dict[str, Format] = {
    "coco": Format(coco.write),
    "labelme": Format(labelme.write),
    "png": Format(png.write),
    "voc": Format(voc.write, f"{LINES}|{voc.FORBIDDEN}"),
    "yolo": Format(yolo.write),
}


def check_export(name: str, home: Path, classes: Iterable[str]) -> None:
    """UserError, before any work, if a format cannot hold the names of the classes, or if files of the user's are where
    it would write."""
    wrong = [one for one in classes if re.search(EXPORTS[name].forbidden, one)]
    if wrong:
        raise UserError(f"--export {name} cannot hold the class name {wrong[0]!r}, which has a colon, a # or a line "
                        f"break; rename the class, or leave {name} out")
    check_folder(home)


def write_export(name: str, home: Path, masks: MaskSet) -> bool:
    """Write an export into the folder `home`; returns False if it is there already, made of the same masks."""
    return filled(home, f"{name} {VERSION} {masks.digest(home)}", lambda folder: EXPORTS[name].write(folder, masks))


