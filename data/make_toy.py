"""Procedural toy pets in the layout of Oxford-IIIT Pet: a small, faithful model of weakly supervised segmentation.

    python -m data.make_toy --root data/toy

A class is told by one thing alone, a mark on the head: a pattern in an ink of its own. Fur colour, pose, size, place,
ears and background are drawn without looking at the class, so a classifier's CAM fires on the head, and spreading it
over the body (one fur, seen against clutter) is left to the affinities. The trimaps are ground truth for scoring alone:
nothing may train on them.

    <root>/images/<Breed>_<n>.jpg                    sides within 6/7 to 17/14 of --size, odd sizes included
    <root>/annotations/trimaps/<Breed>_<n>.png       1 pet, 2 background, 3 border (1 px either side of the outline)
    <root>/annotations/{list,trainval,test}.txt      lines of `image CLASS-ID SPECIES BREED-ID`
    <root>/toy.json                                  the options; marks the folder as this generator's own
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.toy_pet import draw_pet

VERSION = 3  # raise it whenever the drawing changes, so that an older toy set is replaced
CAT, DOG = 1, 2
LIST_HEADER = """#Image CLASS-ID SPECIES BREED ID
#ID: toy class ids, numbered as in a larger set with breeds left out
#SPECIES: 1:Cat 2:Dog
#BREED ID: numbered within the species
#All images with 1st letter as capital are cat images
#images with small first letter are dog images
"""


class Breed(NamedTuple):
    name: str
    class_id: int
    species: int
    breed_id: int
    pattern: str


# Sorted as Pet sorts its breeds (case ignored), with gaps in the numbering. The species is a name only: no breed has
# a shape of its own.
BREEDS = (
    Breed("bullseye_hound", 1, DOG, 1, "ring"),
    Breed("Crossmark_cat", 3, CAT, 1, "cross"),
    Breed("dotted_terrier", 6, DOG, 2, "spots"),
    Breed("Tabby_cat", 9, CAT, 2, "stripes"),
    Breed("two_faced_collie", 10, DOG, 4, "half"),
    Breed("Wedge_cat", 14, CAT, 5, "wedge"),
)


def _breed_and_id(split, index, classes):
    """Classes take turns, so that any prefix is balanced; train images take the odd numbers and test the even ones."""
    breed = BREEDS[index % classes]
    return breed, f"{breed.name}_{2 * (index // classes) + (1 if split == 'train' else 2)}"


def _write_image(root, split, index, options):
    """Draws and saves one image with its trimap. Returns its line of the split file."""
    breed, image_id = _breed_and_id(split, index, options["classes"])
    rng = np.random.default_rng([options["seed"], 0 if split == "train" else 1, index])
    image, trimap = draw_pet(rng, breed.pattern, options["size"])
    Image.fromarray(image).save(root / "images" / f"{image_id}.jpg", quality=92)
    Image.fromarray(trimap).save(root / "annotations" / "trimaps" / f"{image_id}.png")
    return f"{image_id} {breed.class_id} {breed.species} {breed.breed_id}\n"


def _write_dataset(root, options):
    (root / "images").mkdir(parents=True)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    train, test = ([_write_image(root, split, index, options) for index in range(options[split])]
                   for split in ("train", "test"))
    for name, lines in (("trainval", train), ("test", test)):
        (root / "annotations" / f"{name}.txt").write_text("".join(lines))
    (root / "annotations" / "list.txt").write_text(LIST_HEADER + "".join(train + test))
    (root / "toy.json").write_text(json.dumps(options, indent=2) + "\n")


def _existing_options(root):
    """Options of the toy set at root; None where there is nothing. Raises FileExistsError for anyone else's files."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        options = json.loads((root / "toy.json").read_text())
        if options["generator"] == "data.make_toy":
            return options
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FileExistsError(f"{root} exists and was not made by data.make_toy; remove it or name another --root")


def _check(train, test, classes, size, seed):
    """Raises ValueError for the first option out of range."""
    if not 2 <= classes <= len(BREEDS):
        raise ValueError(f"--classes must be 2 to {len(BREEDS)}, got {classes}")
    for name, value, least in (("train", train, 1), ("test", test, 1), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}")


def _swap_in(root, options):
    """Writes beside root and renames at the end, so that a stopped run leaves no half-made dataset under the name."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        new = Path(folder) / "new"
        _write_dataset(new, options)
        if root.exists():
            root.rename(Path(folder) / "old")
        new.rename(root)


def make_toy(root: str | Path, train: int = 240, test: int = 80, classes: int = 4, size: int = 112, seed: int = 0
             ) -> bool:
    """Write the toy dataset to folder `root`; the same arguments give the same bytes.

    train, test: images per split, classes in turn.  classes: 2 to 6.  size: mean side in pixels, 32 or more.
    Each image depends on (seed, split, index, classes, size) only: a larger set starts with the smaller one.
    A toy set with the same options is left alone, one with other options is replaced.  Returns whether it wrote.
    Raises FileExistsError if root holds anything else, ValueError for options out of range.
    """
    _check(train, test, classes, size, seed)
    options = dict(generator="data.make_toy", version=VERSION, train=train, test=test, classes=classes, size=size,
                   seed=seed)
    target = Path(root).resolve()
    if _existing_options(target) == options:
        return False
    _swap_in(target, options)
    return True


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m data.make_toy", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Data: reads nothing, writes a procedural toy dataset in the layout of Oxford-IIIT Pet.")
    parser.add_argument("--root", type=Path, default=Path("data/toy"), help="folder to write")
    parser.add_argument("--train", type=int, default=240, help="images in trainval.txt")
    parser.add_argument("--test", type=int, default=80, help="images in test.txt")
    parser.add_argument("--classes", type=int, default=4, help=f"breeds, 2 to {len(BREEDS)}")
    parser.add_argument("--size", type=int, default=112, help="mean side of an image in pixels, 32 or more")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice, 0 or more")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args, start = parser.parse_args(argv), time.perf_counter()
    try:
        written = make_toy(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"error: {error}")
    if written:
        print(f"wrote {args.train} train and {args.test} test images of {args.classes} classes to {args.root} "
              f"in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{args.root} is there already with these options; nothing to do")


if __name__ == "__main__":
    main()
