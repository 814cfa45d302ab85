"""Data: reads COCO's instances JSON, writes its masks as palette PNG to <data_root>/masks/{train,val}2014/.

    python -m data.prepare_coco --data_root data/coco

Optional: masks are rendered from the JSON on demand.  Where the files are complete, they are read instead.
"""
import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.config import DataConfig
from utils.datasets import DATASETS, Dataset, open_dataset
from utils.datasets.coco import SPLITS, Rendered, annotations_path, prepared
from utils.labels import save_mask
from utils.log import environment
from utils.options import FLAGS
from utils.parallel import map_parallel
from utils.runtime import run_main


def prepare(root: Path, split: str, workers: int, overwrite: bool = False) -> None:
    """Write the masks of a split; finished ones of the same JSON and images are kept.

    Raises UserError if there are masks of another JSON or of other images, unless `overwrite` has them made again.
    """
    name, _ = SPLITS[split]
    dataset = replace(open_dataset(DataConfig("coco", str(root), split)), truth=Rendered(annotations_path(root, name)))
    folder = prepared(root, name, overwrite)
    write = partial(_write_mask, folder=folder.path)
    for _ in map_parallel(write, folder.begin(dataset), workers, f"masks of {split}"):
        pass
    folder.finish(dataset, {"options": {"data_root": str(root), "split": split}, **environment()})
    print(f"Wrote {len(dataset)} masks to {folder.path}")


def _write_mask(item: tuple[str, Dataset], folder: Path) -> None:
    image_id, one = item
    save_mask(folder / f"{image_id}.png", one.mask(0))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and prepare the splits."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare_coco", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, default=Path(DATASETS["coco"].data_root),
                        help="folder of the dataset (default: %(default)s)")
    parser.add_argument("--split", nargs="+", choices=("train", "val"), default=("train", "val"),
                        help="splits to render (default: train val)")
    parser.add_argument("--workers", type=FLAGS["workers"].type, default=FLAGS["workers"].default,
                        help=f"{FLAGS['workers'].help} (default: %(default)s)")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="make masks of another JSON or of other images again")
    args = parser.parse_args(argv)
    for split in args.split:
        prepare(args.data_root, split, args.workers, args.overwrite)


if __name__ == "__main__":
    run_main(main)
