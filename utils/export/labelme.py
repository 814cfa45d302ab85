"""labelme: one JSON beside nothing else for each image, with a polygon for each connected component of a class."""
import json
from pathlib import Path

from utils.export.masks import MaskSet, relative
from utils.export.polygons import polygons

VERSION = "5.5.0"  # of labelme, whose files these are; its later versions read them too


def write(folder: Path, masks: MaskSet) -> None:
    """<image id>.json with the path of the photo, relative to the folder; photos are not copied."""
    for one in masks.each("export labelme"):
        shapes = [{"label": masks.classes[value - 1], "points": points.tolist(), "group_id": None, "description": "",
                   "shape_type": "polygon", "flags": {}, "mask": None}
                  for value in one.shown() for points in polygons(one.mask == value)]
        content = {"version": VERSION, "flags": {}, "shapes": shapes, "imagePath": relative(one.photo, folder),
                   "imageData": None, "imageHeight": one.mask.shape[0], "imageWidth": one.mask.shape[1]}
        (folder / f"{one.name}.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
