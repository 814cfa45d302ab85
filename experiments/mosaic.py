"""Mosaics of real photos in VOC's layout: two pets of different breeds side by side, each half of another class.

    python -m experiments.mosaic --data_root DATA --root data/mosaic/VOC2012

They show whether the steps keep several classes in an image apart: a mask is right only where each half carries its own
class. Breeds take the names of VOC classes, in the order of the breeds, as VOC's layout knows no others.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import Parser
from utils.config import DataConfig
from utils.datasets import Dataset, open_dataset
from utils.datasets.voc import CLASSES, LISTS
from utils.errors import UserError
from utils.grids import resize_image, resize_labels
from utils.labels import IGNORE, save_mask
from utils.runtime import run_main

NAMES = ("cat", "dog", "horse", "sheep", "cow", "bird", "person", "car", "bus", "sofa")
HEIGHT = 224  # of a mosaic, in pixels


def pairs(labels: np.ndarray, rng: np.random.Generator) -> list[list[int]]:
    """Positions of two images of different classes, each image at most once.  labels: (N,) class indices."""
    left = {label: rng.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)}
    found = []
    while sum(map(bool, left.values())) > 1:
        # The two classes with most images left, so that as few as possible stay over.
        first, second = sorted(left, key=lambda label: len(left[label]))[:-3:-1]
        found.append(rng.permutation([left[first].pop(), left[second].pop()]).tolist())
    return found


def write_split(dataset: Dataset, name: str, root: Path, names: Sequence[str], rng: np.random.Generator) -> int:
    """Write the mosaics of one split.  Returns how many."""
    found = pairs(dataset.labels.argmax(axis=1), rng)
    ids = [f"{name}_{number:04d}" for number in range(len(found))]
    for image_id, both in zip(ids, found):
        shown = [names[dataset.labels[index].argmax()] for index in both]
        images, masks = zip(*(_half(dataset, index, CLASSES.index(label) + 1) for index, label in zip(both, shown)))
        Image.fromarray(np.concatenate(images, axis=1)).save(root / "JPEGImages" / f"{image_id}.jpg", quality=95)
        save_mask(root / "SegmentationClass" / f"{image_id}.png", np.concatenate(masks, axis=1))
        objects = "".join(f"<object><name>{label}</name><difficult>0</difficult></object>" for label in shown)
        (root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{objects}</annotation>\n")
    (root / LISTS / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    return len(ids)


def _half(dataset: Dataset, index: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo and its mask, of class `value`, at the mosaic's height."""
    image, mask = dataset.image(index), dataset.mask(index)
    size = HEIGHT, max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    mask = np.where((mask > 0) & (mask < IGNORE), value, mask).astype(np.uint8)
    return resize_image(image, size), resize_labels(mask, size)


def main() -> None:
    parser = Parser("experiments.mosaic", __doc__)
    parser.flag("data_root", "data/oxford-iiit-pet", "Pet dataset")
    parser.flag("root", "data/mosaic/VOC2012", "folder to write", like="output_dir")
    parser.flag("seed", 0, "seed of the pairs")
    args = parser.parse_args()
    root = Path(args.root)
    if root.exists():
        raise UserError(f"{root} is there already; delete it or name another --root")
    splits = {name: open_dataset(DataConfig("pet", args.data_root, source))
              for name, source in (("train", "trainval"), ("val", "test"))}
    breeds = splits["train"].classes
    if len(breeds) > len(NAMES):
        raise UserError(f"{args.data_root} has {len(breeds)} breeds; mosaics are made of at most {len(NAMES)}")
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", LISTS):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(args.seed)
    counts = {name: write_split(dataset, name, root, NAMES, rng) for name, dataset in splits.items()}
    named = ", ".join(f"{breed} as {name}" for breed, name in zip(breeds, NAMES))
    print(f"Wrote {counts['train']} training and {counts['val']} validation mosaics to {root}: {named}")


if __name__ == "__main__":
    run_main(main)
