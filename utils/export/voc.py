"""PASCAL VOC's tree of segmentations, with the labelmap.txt of CVAT's format "Segmentation mask 1.1"."""
import shutil
from pathlib import Path

import numpy as np

from utils.export.masks import MaskSet
from utils.labels import IGNORE, save_mask, voc_palette

FORBIDDEN = r":|^#"  # in labelmap.txt a colon ends a name, and # begins a comment


def write(folder: Path, masks: MaskSet) -> None:
    """SegmentationClass/<image id>.png in VOC colours, SegmentationObject/, the list of images, and labelmap.txt.

    The objects of an image are its classes: without a picture of objects, CVAT makes an object of the background. Of
    ignored pixels there, which CVAT knows only as a class, it makes none.
    """
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    ignored = False
    for one in masks.each("export voc"):
        kinds, objects = (folder / part / f"{one.name}.png" for part in ("SegmentationClass", "SegmentationObject"))
        save_mask(kinds, one.mask)
        if (one.mask == IGNORE).any():
            ignored = True
            save_mask(objects, np.where(one.mask == IGNORE, 0, one.mask))
        else:
            objects.parent.mkdir(exist_ok=True)
            shutil.copyfile(kinds, objects)
    (lists / f"{masks.split}.txt").write_text("".join(f"{name}\n" for name in masks.names), encoding="utf-8")
    rows = [*enumerate(["background", *masks.classes]), *([(IGNORE, _free("ignored", masks.classes))] * ignored)]
    colours = voc_palette().tolist()
    text = "".join(f"{name}:{','.join(map(str, colours[value]))}::\n" for value, name in rows)
    (folder / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + text, encoding="utf-8")


def _free(name: str, taken: list[str]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)
