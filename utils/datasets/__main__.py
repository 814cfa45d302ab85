"""Look a dataset over before any training: what it holds, what is doubtful, and a picture of a dozen of its images.

    python -m utils.datasets DATA_ROOT --dataset folder

Reads all images' headers and all masks of a split; writes <output_dir>/<dataset>_<split>.png, and exits with status 1
if something must be mended.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.config import DataConfig
from utils.datasets import DATASETS, open_dataset
from utils.datasets.base import Dataset
from utils.datasets.contradictions import check_against_labels, findings
from utils.errors import UserError
from utils.log import progress
from utils.runtime import run_main
from utils.visualize import overlay_mask, panel, save_picture

SHOWN, COLUMNS = 12, 4  # images in the picture
LISTED = 5  # lines of one kind of finding


def main(argv: list[str] | None = None) -> int:
    """Report on the dataset that the flags name; returns 1 if an image or a mask cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m utils.datasets", description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data_root", help="folder of the dataset")
    parser.add_argument("--dataset", default="folder", choices=tuple(DATASETS), help="layout of the data")
    parser.add_argument("--split", help="split to look over; left out: the training split")
    parser.add_argument("--output_dir", default="output/datasets", help="folder of the picture")
    args = parser.parse_args(argv)
    dataset = open_dataset(DataConfig(args.dataset, args.data_root, args.split))
    print(f"{args.data_root}: --dataset {dataset.name}, split {dataset.split}, {len(dataset)} images, "
          f"{len(dataset.classes)} classes")
    wrong = report_images(dataset)
    report_labels(dataset)
    wrong += report_truth(dataset)
    path = Path(args.output_dir) / f"{dataset.name}_{dataset.split}.png"
    drawn, shown = picture(dataset)
    save_picture(path, np.asarray(drawn))
    print(f"Wrote {path}: {', '.join(shown)}")
    check_against_labels(dataset)
    return int(wrong > 0)


def report_images(dataset: Dataset) -> int:
    """Print the range of the images' sizes, and those that cannot be read; returns their number."""
    sizes, damaged = [], {}
    for index, image_id in enumerate(progress(dataset.ids, "images")):
        try:
            sizes.append(dataset.size(index))
        except UserError as error:
            damaged[image_id] = str(error)
    if sizes:
        heights, widths = zip(*sizes)
        print(f"  sizes: {min(widths)}x{min(heights)} to {max(widths)}x{max(heights)} pixels, median "
              f"{int(np.median(widths))}x{int(np.median(heights))}")
    _print_first("DAMAGED", list(damaged.values()))
    return len(damaged)


def _print_first(what: str, lines: Sequence[str], rest: str = "") -> None:
    """Print the first lines, and how many more there are."""
    for line in lines[:LISTED]:
        print(f"  {what}: {line}")
    if len(lines) > LISTED:
        print(f"  {what}: and {len(lines) - LISTED} more{rest}")


def report_labels(dataset: Dataset) -> None:
    """Print how many images each class has."""
    if dataset.labels is None:
        print("  no image labels")
        return
    counts = dataset.labels.sum(axis=0, dtype=int)
    print("  images of each class: " + ", ".join(f"{name} {count}" for name, count in zip(dataset.classes, counts)))
    rows = dataset.labels.sum(axis=1)
    print(f"  labels an image: {rows.min()} to {rows.max()}; {int((rows == 0).sum())} images have none")
    lacking = [name for name, count in zip(dataset.classes, counts) if not count]
    if lacking:
        print(f"  DOUBTFUL: no image has the label {', '.join(lacking[:8])}" + (" ..." if len(lacking) > 8 else ""))


def report_truth(dataset: Dataset) -> int:
    """Print what the masks show beside the labels; returns how many are missing or damaged."""
    if dataset.truth is None:
        print(f"  no ground truth ({dataset.lacking or 'none is needed for training'})")
        return 0
    found = findings(dataset, progress(range(len(dataset)), "masks"), dataset.mask)
    print(f"  ground truth: {found.seen} masks, {found.shown} of them show an object")
    for images, text in ((found.unnamed, "mask shows classes that the labels lack"),
                         (found.unshown, "labels name classes that the mask lacks")):
        lines = [f"{image_id}: the {text}: {', '.join(classes)}" for image_id, classes in images.items()]
        _print_first("DOUBTFUL", lines, f" whose {text}")
    if found.unread:
        print(f"  MISSING OR DAMAGED: {len(found.unread)} masks, such as: {next(iter(found.unread.values()))}")
    return len(found.unread)


def picture(dataset: Dataset) -> tuple[Image.Image, list[str]]:
    """(a dozen images, with their masks laid over them where there are any; their ids, row by row)."""
    cells, shown = [], []
    for index in dataset.spread(SHOWN):
        try:
            image = dataset.image(index)
            cells.append(overlay_mask(image, dataset.mask(index)) if dataset.truth else image)
        except UserError:
            continue
        shown.append(dataset.ids[index])
    if not cells:
        raise UserError(f"no image of {dataset.root} can be read; replace the files named above")
    rows = [cells[i:i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    rows[-1] += [None] * (COLUMNS - len(rows[-1]))
    return panel(rows, [""] * COLUMNS), shown


if __name__ == "__main__":
    run_main(main)
