"""Data: reads COCO's instances JSON, writes its masks as palette PNG to <data_root>/masks/{train,val}2014/.

    python -m data.prepare_coco --data_root data/coco

Nothing needs this: masks are rendered from the JSON when they are asked for.  It is for those who want them as files;
where they are complete, they are read instead.
"""
import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.datasets import open_dataset
from utils.layouts.coco import SPLITS, Rendered, annotations_path, prepared
from utils.log import environment
from utils.options import FLAGS
from utils.parallel import map_parallel
from utils.recipes import DATA_ROOTS
from utils.runtime import run_main
from utils.visualize import save_mask


def prepare(root, split, workers):
    """Write the masks of a split; finished ones of the same JSON are kept.  Returns how many images it has."""
    dataset = open_dataset("coco", root, split)
    folder_name, _ = SPLITS[split]
    dataset = replace(dataset, truth=Rendered(annotations_path(root, folder_name)))
    folder = prepared(root, folder_name)
    folder.begin()
    write = partial(_write_mask, folder=str(folder.path))
    for _ in map_parallel(write, folder.pending(dataset), workers, f"masks of {split}"):
        pass
    folder.finish(dataset.ids, {"data_root": str(root), "split": split}, environment())
    print(f"Wrote {len(dataset)} masks to {folder.path}")


def _write_mask(item, folder):
    image_id, one = item
    save_mask(Path(folder) / f"{image_id}.png", one.mask(0))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.prepare_coco", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, default=Path(DATA_ROOTS["coco"]),
                        help="folder of the dataset (default: %(default)s)")
    parser.add_argument("--split", nargs="+", choices=("train", "val"), default=("train", "val"),
                        help="splits to render (default: train val)")
    parser.add_argument("--workers", type=FLAGS["workers"].type, default=FLAGS["workers"].default,
                        help=f"{FLAGS['workers'].help} (default: %(default)s)")
    args = parser.parse_args(argv)
    for split in args.split:
        prepare(args.data_root, split, args.workers)


if __name__ == "__main__":
    run_main(main)
