"""Scoring at the size of VOC's validation split and of COCO, and a sweep of thresholds, beside the plain way.

    python -m benchmarks.scoring

`scoring_*`: synthetic masks, written to a temporary folder, go through run_eval.py --mask_dir as a user's would: read,
counted, tabled, plotted; its largest process's memory. The plain way, in this process: every class compared with every
mask. `sweep_voc`: score maps at 100 thresholds to confusion matrices, their scores and the best of them, in this
process; the plain way: one numpy pass for each threshold and class. The plain ways are timed on a few of the masks and
scaled to all; the error is the largest difference of their counts on these.
"""
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import ROOT, Parser, Table, extra_mb, timed
from utils.labels import IGNORE, read_mask, save_mask
from utils.metrics import SweepHistogram, confusion
from utils.options import FLAGS

CASES = {"voc": (1449, (375, 500), 20), "coco": (5000, (480, 640), 80)}  # masks, (H, W), classes
DISTINCT = 40  # pictures that differ; the rest are links to them
THRESHOLDS, PLAIN_SWEEPS = 100, 2


def blobs(rng: np.random.Generator, size: tuple[int, int], classes: int, border: bool) -> np.ndarray:
    """A mask of irregular regions of three classes and background, uint8; with `border`, 5 % of it ignored."""
    shown = np.concatenate([[0, 0], rng.choice(classes, 3, replace=False) + 1])
    grid = rng.choice(shown, (12, 16)).astype(np.uint8)
    mask = np.asarray(Image.fromarray(grid).resize(size[::-1], Image.Resampling.NEAREST)).copy()
    if border:
        mask[rng.random(size) < 0.05] = IGNORE
    return mask


def make(root: Path, count: int, size: tuple[int, int], classes: int) -> None:
    """A dataset of --dataset folder with ground truth, and predictions in <root>/predicted."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks", "predicted"):
        (root / folder).mkdir()
    for number in range(count):
        for folder, suffix in (("images", "jpg"), ("masks", "png"), ("predicted", "png")):
            path = root / folder / f"{number:05d}.{suffix}"
            if number >= DISTINCT:
                os.link(root / folder / f"{number % DISTINCT:05d}.{suffix}", path)
            elif folder == "images":
                Image.new("RGB", size[::-1], "grey").save(path)
            else:
                save_mask(path, blobs(rng, size, classes, folder == "masks"))
    names = [f"class{k:02d}" for k in range(classes)]
    shown = [[names[k - 1] for k in np.unique(read_mask(root / "masks" / f"{number:05d}.png")) if 0 < k < IGNORE]
             for number in range(min(count, DISTINCT))]
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    (root / "labels.csv").write_text("".join(f"{number:05d},{';'.join(shown[number % DISTINCT])}\n"
                                             for number in range(count)))


def plain_count(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """(C, 3): hits, predicted and true pixels of every class, one class after the other, as published code counts."""
    kept = truth != IGNORE
    return np.array([[mask.sum() for mask in ((prediction == k) & (truth == k) & kept, (prediction == k) & kept,
                                              (truth == k) & kept)] for k in range(classes)])


def counts_of(matrix: np.ndarray) -> np.ndarray:
    """(C, 3): hits, predicted and true pixels of every class."""
    return np.stack([matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)], axis=1)


def plain(root: Path, classes: int) -> tuple[float, int]:
    """Seconds a mask of the plain count on the distinct masks, and the largest difference from our counts."""
    def read(number):
        return [read_mask(root / folder / f"{number:05d}.png") for folder in ("predicted", "masks")]
    seconds, counts = timed(lambda: [plain_count(*read(i), classes + 1) for i in range(DISTINCT)], 1)
    ours = [counts_of(confusion(*read(i), classes + 1)) for i in range(DISTINCT)]
    return seconds / DISTINCT, max(abs(one - other).max() for one, other in zip(counts, ours))


def measure(table: Table, name: str, workers: int) -> None:
    count, size, classes = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, count, size, classes)
        command = [sys.executable, ROOT / "run_eval.py", "--dataset", "folder", "--data_root", root, "--mask_dir",
                   root / "predicted", "--output_dir", root / "eval", "--device", "cpu", "--workers", str(workers)]
        seconds, _ = timed(lambda: subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL,
                                                  stderr=subprocess.DEVNULL), 1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        reference, error = plain(root, classes)
    table.add(f"scoring_{name}", seconds, reference * count, round(peak), error, masks=count,
              ms_a_mask=round(1000 * seconds / count, 2))


def score_maps(count: int, size: tuple[int, int], classes: int) -> Iterator[tuple[np.ndarray, ...]]:
    """(foreground probability, best foreground class, truth) of so many images: noisy truth, as a network would see it.
    """
    rng = np.random.default_rng(1)
    for _ in range(count):
        truth = blobs(rng, size, classes, border=True)
        probability = np.clip((truth > 0) * 0.4 + 0.3 + rng.normal(0, 0.2, size), 0, 1).astype(np.float32)
        yield probability, np.maximum(blobs(rng, size, classes, border=False), 1), truth


def plain_sweep(probability: np.ndarray, foreground: np.ndarray, truth: np.ndarray, thresholds: np.ndarray,
                classes: int) -> np.ndarray:
    """(T, C, 3) counts, one pass for each threshold and class."""
    return np.array([plain_count(np.where(probability >= threshold, foreground, 0), truth, classes)
                     for threshold in thresholds])


def measure_sweep(table: Table) -> None:
    count, size, classes = CASES["voc"]
    images, classes = list(score_maps(DISTINCT, size, classes)), classes + 1

    def sweep(count):
        histogram = SweepHistogram(classes, THRESHOLDS)
        for number in range(count):
            histogram.update(*images[number % DISTINCT])
        return histogram, histogram.oracle()

    def plain_counts():
        return sum(plain_sweep(*image, few.thresholds(), classes) for image in images[:PLAIN_SWEEPS])

    few, _ = sweep(PLAIN_SWEEPS)
    seconds, _ = timed(lambda: sweep(count), 1)
    memory = extra_mb(lambda: sweep(count))
    reference, expected = timed(plain_counts, 1)
    error = max(abs(plain_one - counts_of(matrix)).max() for plain_one, matrix in zip(expected, few.confusions()))
    table.add("sweep_voc", seconds, reference / PLAIN_SWEEPS * count, memory, error, masks=count, thresholds=THRESHOLDS)


def main() -> None:
    parser = Parser("benchmarks.scoring", __doc__)
    parser.add_argument("--case", choices=(*CASES, "sweep"), nargs="+", default=(*CASES, "sweep"), help="default: all")
    parser.flag("workers", FLAGS["workers"].default, "processes of run_eval.py")
    args = parser.parse_args()
    table = Table()
    for name in args.case:
        measure_sweep(table) if name == "sweep" else measure(table, name, args.workers)
    table.finish()


if __name__ == "__main__":
    main()
