"""Id lists for honest scores: the third of a split that settings were tuned on, the rest, and the photos of usual size.

Use them with --ids: `python run_eval.py --ids output/subsets/rest.txt`.
"""
from pathlib import Path

from benchmarks.measure import Parser
from utils.config import DataConfig
from utils.datasets import open_dataset
from utils.runtime import run_main

LARGE = 512  # pixels: a few photos above it hold 40 % of one class's pixels in the sample


def main() -> None:
    parser = Parser("experiments.subsets", __doc__)
    parser.flag("data_root", "data/oxford-iiit-pet", "folder of the Pet dataset")
    parser.flag("split", "trainval", "split to divide")
    parser.flag("output_dir", "output/subsets", "folder for the lists")
    args = parser.parse_args()
    dataset = open_dataset(DataConfig("pet", args.data_root, args.split))
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
