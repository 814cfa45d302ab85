"""How fast training images are read and varied, and what COCO's 82,081 items cost in memory in each worker.

    python -m benchmarks.loader [--workers 1 2] [--images 64] [--items 82081]

Reads JPEGs of 500 x 375 pixels, VOC's usual size, as stage 1 and step 5 do at crop 448; no network.  Then goes through
an epoch of so many items without decoding: the private memory of a worker at its start and end says whether it copies
what it shares with the others.  Ends with JSON lines.
"""
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Parser
from utils.datasets import Dataset
from utils.loader import EpochBatches, Read, TrainingSamples, training_loader
from utils.transforms import Augmentation

CPU = torch.device("cpu")
BATCH = 16


def pictures(folder: str | Path, count: int) -> Dataset:
    """A dataset of so many photographic JPEGs: smooth noise, which is as large in a file as a photo (about 70 KB)."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(Path(folder) / f"{index}.jpg", quality=95)
    ids = [str(index) for index in range(count)]
    return Dataset("folder", Path(folder), "all", ("all",), ["x"] * 20, ids, np.zeros((count, 20), np.uint8),
                   Path(folder), [f"{one}.jpg" for one in ids])


def blank_mask(dataset: Dataset, index: int) -> np.ndarray:
    """A label map of the photos' size."""
    return np.zeros((375, 500), np.uint8)


def pace(dataset: Dataset, workers: int, augmentation: Augmentation, read: Read | None, rounds: int = 4) -> float:
    """Images a second of so many rounds over a dataset; the time to start the workers does not count."""
    samples = TrainingSamples(dataset, augmentation, 0, read)
    # One long epoch: the order goes through the dataset again and again.
    batches = EpochBatches(rounds * len(dataset), BATCH, 0, 0)
    batches.order %= len(dataset)
    stream = iter(training_loader(samples, batches, workers, CPU))
    next(stream)
    started = time.perf_counter()
    images = sum(len(batch["image"]) for batch in stream)
    return images / (time.perf_counter() - started)


class Named(Dataset):
    """Items that are looked up as usual, but whose image is always the same and read from nowhere."""

    def image(self, index: int) -> np.ndarray:
        str(self.image_path(index))
        return np.zeros((16, 16, 3), np.uint8)


class Memory(TrainingSamples):
    """Samples of which one in 128 says how much memory of its own its worker has, in MB; the others say 0."""

    asked = 0

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        sample["labels"] = torch.tensor(0.0 if self.asked % 128 else _private_mb())
        self.asked += 1
        return sample


def _private_mb() -> float:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"Private_\w+: +(\d+) kB", rollup)) / 1024


def growth(items: int, workers: int = 2) -> tuple[float, float]:
    """(MB of its own of the largest worker at the start, at the end) of an epoch over so many items."""
    ids = [f"COCO_train2014_{index:012}" for index in range(items)]
    dataset = Named("coco", Path("data/coco"), "train", ("train",), ["x"] * 80, ids, np.zeros((items, 80), np.uint8),
                    Path("data/coco/train2014"), [f"{one}.jpg" for one in ids])
    samples = Memory(dataset, Augmentation(17, jitter=False), 0)
    found = [batch["labels"].max().item() for batch in
             training_loader(samples, EpochBatches(items, 128, 0, 0), workers, CPU)]
    return found[workers], max(found[-2 * workers:])


def main() -> None:
    parser = Parser("benchmarks.loader", __doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.flag("images", 64, "JPEGs to read", like="limit")
    parser.flag("items", 82_081, "for the memory", like="limit")
    args = parser.parse_args()
    crops = {"stage 1": (Augmentation(449, long_side=(280, 560)), None),
             "step 5": (Augmentation(449, scale=(0.5, 1.5)), blank_mask)}
    with tempfile.TemporaryDirectory() as folder:
        dataset = pictures(folder, args.images)
        for workers in args.workers:
            for case, (augmentation, read) in crops.items():
                rate = pace(dataset, workers, augmentation, read)
                print(json.dumps({"case": f"reading, {case}", "workers": workers, "images_per_second": round(rate, 1)}),
                      flush=True)
    if Path("/proc/self/smaps_rollup").exists():
        first, last = growth(args.items)
        print(json.dumps({"case": "memory of a worker", "items": args.items, "mb_at_start": round(first, 1),
                          "mb_at_end": round(last, 1)}))


if __name__ == "__main__":
    main()
