"""Scoring at the size of VOC's validation split and of COCO, and a sweep of thresholds, beside the plain way.

    python -m benchmarks.scoring

`scoring_*`: synthetic masks, written to a temporary folder, go through run_eval.py --mask_dir as a user's would: read,
counted, tabled, plotted; its largest process's memory. The plain way, in this process: every class compared with every
mask. `sweep_voc`: score maps at 100 thresholds to confusion matrices, their scores and the best of them, in this process;
the plain way: one numpy pass for each threshold and class. The plain ways are timed on a few of the masks and scaled to
all; the error is the largest difference of their counts on these.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import Table, extra_mb
from utils.labels import IGNORE
from utils.metrics import SweepHistogram, confusion
from utils.options import FLAGS
from utils.visualize import read_mask, save_mask

ROOT = Path(__file__).resolve().parents[1]
CASES = {"voc": (1449, (375, 500), 20), "coco": (5000, (480, 640), 80)}  # masks, (H, W), classes
DISTINCT = 40  # pictures that differ; the rest are links to them
THRESHOLDS, PLAIN_SWEEPS = 100, 2


def blobs(rng, size, classes, border):
    """A mask of irregular regions of three classes and background, uint8; with `border`, 5 % of it ignored."""
    shown = np.concatenate([[0, 0], rng.choice(classes, 3, replace=False) + 1])
    grid = rng.choice(shown, (12, 16)).astype(np.uint8)
    mask = np.asarray(Image.fromarray(grid).resize(size[::-1], Image.Resampling.NEAREST)).copy()
    if border:
        mask[rng.random(size) < 0.05] = IGNORE
    return mask


def make(root, count, size, classes):
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
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    (root / "labels.csv").write_text("".join(f"{number:05d},{names[number % classes]}\n" for number in range(count)))


def plain_count(prediction, truth, classes):
    """Hits, predicted and true pixels of every class, one class after the other, as published code counts them."""
    kept = truth != IGNORE
    return [((prediction == k) & (truth == k) & kept, (prediction == k) & kept, (truth == k) & kept)
            for k in range(classes)]


def counts_of(matrix):
    """(C, 3): hits, predicted and true pixels of every class."""
    return np.stack([matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)], axis=1)


def plain(root, classes):
    """Seconds a mask of the plain count on the distinct masks, and the largest difference from our counts."""
    started, error, elsewhere = time.perf_counter(), 0, 0.0
    for number in range(DISTINCT):
        prediction, truth = (read_mask(root / folder / f"{number:05d}.png") for folder in ("predicted", "masks"))
        counts = np.array([[one.sum() for one in row] for row in plain_count(prediction, truth, classes + 1)])
        pause = time.perf_counter()
        error = max(error, abs(counts - counts_of(confusion(prediction, truth, classes + 1))).max())
        elsewhere += time.perf_counter() - pause
    return (time.perf_counter() - started - elsewhere) / DISTINCT, error


def measure(table, name, workers):
    count, size, classes = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, count, size, classes)
        started = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "run_eval.py"), "--dataset", "folder", "--data_root", str(root),
                        "--mask_dir", str(root / "predicted"), "--output_dir", str(root / "eval"), "--device", "cpu",
                        "--workers", str(workers)], check=True, cwd=folder, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        reference, error = plain(root, classes)
    table.add(f"scoring_{name}", seconds, reference * count, round(peak), error, masks=count,
              ms_a_mask=round(1000 * seconds / count, 2))


def score_maps(count, size, classes):
    """(share, best foreground class, truth) of so many images: truth, blurred and noisy, as a network would see it."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        truth = blobs(rng, size, classes, border=True)
        share = np.clip((truth > 0) * 0.4 + 0.3 + rng.normal(0, 0.2, size), 0, 1).astype(np.float32)
        yield share, np.maximum(blobs(rng, size, classes, border=False), 1), truth


def plain_sweep(share, foreground, truth, thresholds, classes):
    """(T, C, 3) counts, one pass for each threshold and class."""
    return np.array([[[one.sum() for one in row]
                      for row in plain_count(np.where(share >= threshold, foreground, 0), truth, classes)]
                     for threshold in thresholds])


def measure_sweep(table):
    count, size, classes = CASES["voc"]
    images, classes = list(score_maps(DISTINCT, size, classes)), classes + 1

    def sweep():
        histogram = SweepHistogram(classes, THRESHOLDS)
        for number in range(count):
            histogram.update(*images[number % DISTINCT])
        return histogram, histogram.oracle()

    started = time.perf_counter()
    histogram, _ = sweep()
    seconds = time.perf_counter() - started
    memory = extra_mb(sweep)
    started = time.perf_counter()
    plain_counts = sum(plain_sweep(*image, histogram.thresholds(), classes) for image in images[:PLAIN_SWEEPS])
    reference = (time.perf_counter() - started) / PLAIN_SWEEPS
    few = SweepHistogram(classes, THRESHOLDS)
    for image in images[:PLAIN_SWEEPS]:
        few.update(*image)
    error = max(abs(plain_one - counts_of(matrix)).max() for plain_one, matrix in zip(plain_counts, few.confusions()))
    table.add("sweep_voc", seconds, reference * count, memory, error, masks=count, thresholds=THRESHOLDS)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=(*CASES, "sweep"), nargs="+", default=(*CASES, "sweep"), help="default: all")
    parser.add_argument("--workers", type=FLAGS["workers"].type, default=FLAGS["workers"].default,
                        help="processes of run_eval.py (default: %(default)s)")
    args = parser.parse_args(argv)
    table = Table()
    for name in args.case:
        measure_sweep(table) if name == "sweep" else measure(table, name, args.workers)
    table.finish()


if __name__ == "__main__":
    main()
