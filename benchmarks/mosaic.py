"""Mosaics of real photos in VOC's layout: two pets of different breeds side by side, each half of another class.

    python -m benchmarks.mosaic --data_root DATA --root data/mosaic/VOC2012

It shows whether images of several classes keep them apart: a mask is right only where each half carries its own class.
Breeds take the names of VOC classes, in the order of the breeds, as VOC's layout knows no others.
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from utils.datasets import open_dataset
from utils.errors import UserError
from utils.layouts.voc import CLASSES, LISTS
from utils.maps import resize_image
from utils.runtime import run_main
from utils.transforms import resize_labels
from utils.visualize import save_mask

NAMES = ("cat", "dog", "horse", "sheep", "cow", "bird", "person", "car", "bus", "sofa")
HEIGHT = 224  # of a mosaic, in pixels


def pairs(labels, rng):
    """Positions of two images of different classes, each image at most once.  labels: (N,) class indices."""
    left = {label: rng.permutation(np.flatnonzero(labels == label)).tolist() for label in np.unique(labels)}
    found = []
    while sum(map(bool, left.values())) > 1:
        # The two classes with most images left, so that as few as possible stay over.
        first, second = sorted(left, key=lambda label: len(left[label]))[:-3:-1]
        found.append(rng.permutation([left[first].pop(), left[second].pop()]).tolist())
    return found


def write_split(dataset, name, root, names, rng):
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


def _half(dataset, index, value):
    """A photo and its mask, of class `value`, at the mosaic's height."""
    image, mask = dataset.image(index), dataset.mask(index)
    size = HEIGHT, max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    mask = np.where((mask > 0) & (mask < 255), value, mask).astype(np.uint8)
    return resize_image(image, size), resize_labels(mask, size)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mosaic", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="data/oxford-iiit-pet", help="Pet dataset (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data/mosaic/VOC2012"),
                        help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pairs (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.root.exists():
        raise UserError(f"{args.root} is there already; delete it or name another --root")
    splits = {"train": open_dataset("pet", args.data_root, "trainval"),
              "val": open_dataset("pet", args.data_root, "test")}
    breeds = splits["train"].classes
    if len(breeds) > len(NAMES):
        raise UserError(f"{args.data_root} has {len(breeds)} breeds; mosaics are made of at most {len(NAMES)}")
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", LISTS):
        (args.root / folder).mkdir(parents=True)
    rng = np.random.default_rng(args.seed)
    counts = {name: write_split(dataset, name, args.root, NAMES, rng) for name, dataset in splits.items()}
    named = ", ".join(f"{breed} as {name}" for breed, name in zip(breeds, NAMES))
    print(f"Wrote {counts['train']} training and {counts['val']} validation mosaics to {args.root}: {named}")


if __name__ == "__main__":
    run_main(main)
