"""YOLO's segmentation labels: one text file for each image, one polygon a line."""
import json
from pathlib import Path

from utils.export.masks import Labelled, MaskSet
from utils.export.polygons import polygons


def write(folder: Path, masks: MaskSet) -> None:
    """labels/<split>/<image id>.txt, the list of images <split>.txt, and data.yaml; photos are not copied.

    A line is `class x1 y1 x2 y2 ...`, zero-based class, x and y as parts of width and height.  An image that shows
    background alone has an empty file.  data.yaml names one split: as `train`, or as `val` if it is not for training.
    """
    labels = folder / "labels" / masks.split
    labels.mkdir(parents=True)
    photos = []
    for one in masks.each("export yolo"):
        (labels / f"{one.name}.txt").write_text("".join(_lines(one)))
        photos.append(f"./images/{masks.split}/{one.photo.name}\n")
    (folder / f"{masks.split}.txt").write_text("".join(photos), encoding="utf-8")
    own, other = ("train", "val") if masks.training else ("val", "train")
    names = "".join(f"  {k}: {json.dumps(name, ensure_ascii=False)}\n" for k, name in enumerate(masks.classes))
    (folder / "data.yaml").write_text(
        f"path: .  # this folder\n{own}: {json.dumps(masks.split + '.txt', ensure_ascii=False)}\n"
        f"# {other}: the list of another split's export; a training needs both\nnames:\n{names}", encoding="utf-8")


def _lines(one: Labelled) -> list[str]:
    height, width = one.mask.shape
    # Six decimals tell a twentieth of a pixel, by which polygons keep inside, apart in pictures of 65,535 pixels.
    return [f"{value - 1} " + " ".join(["%.6f"] * points.size) % tuple((points / (width, height)).ravel().tolist())
            + "\n" for value in one.shown() for points in polygons(one.mask == value)]
