"""Plain pictures of class indices, and the names of the classes."""
from pathlib import Path

from PIL import Image

from utils.export.masks import MaskSet


def write(folder: Path, masks: MaskSet) -> None:
    """labels/<image id>.png, 8-bit grey without a palette: the mask's own values; classes.txt: index, tab, name."""
    (folder / "labels").mkdir()
    for one in masks.each("export png"):
        Image.fromarray(one.mask).save(folder / "labels" / f"{one.name}.png", format="PNG")
    names = ["background", *masks.classes]
    (folder / "classes.txt").write_text("".join(f"{index}\t{name}\n" for index, name in enumerate(names)),
                                        encoding="utf-8")
