"""Id lists for honest scores: the third of a split that settings were tuned on, the rest, and the photos of usual size.

Use them with --ids: `python run_eval.py --ids output/subsets/rest.txt`.
"""
import argparse
from pathlib import Path

from utils.datasets import open_dataset
from utils.runtime import run_main

LARGE = 512  # pixels: a few photos above it hold 40 % of one class's pixels in the sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default="data/oxford-iiit-pet",
                        help="folder of the Pet dataset (default: %(default)s)")
    parser.add_argument("--split", default="trainval", help="split to divide (default: %(default)s)")
    parser.add_argument("--output_dir", default="output/subsets", help="folder for the lists (default: %(default)s)")
    args = parser.parse_args()
    dataset = open_dataset("pet", args.data_root, args.split)
    small = [max(dataset.size(i)) <= LARGE for i in range(len(dataset))]
    lists = {"third": dataset.ids[::3], "rest": [name for i, name in enumerate(dataset.ids) if i % 3],
             "small": [name for name, keep in zip(dataset.ids, small) if keep]}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(ids) + "\n")
        print(f"{folder / name}.txt: {len(ids)} images")


if __name__ == "__main__":
    run_main(main)
