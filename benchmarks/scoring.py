"""Seconds and memory of scoring masks at the size of VOC's validation split and of COCO.

    python -m benchmarks.scoring

Synthetic masks, written to a temporary folder, go through run_eval.py --mask_dir as a user's would: read, counted,
tabled, plotted. Beside it, in this process, the plain count of published code: every class compared with every mask.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from utils.metrics import IGNORE, confusion
from utils.options import FLAGS
from utils.visualize import read_mask, save_mask

ROOT = Path(__file__).resolve().parents[1]
CASES = {"voc": (1449, (375, 500), 20), "coco": (5000, (480, 640), 80)}  # masks, (H, W), classes
DISTINCT = 40  # pictures that differ; the rest are links to them


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


def plain(root, classes):
    """Seconds a mask of the plain count on the distinct masks, and whether it agrees with ours."""
    started, agrees, elsewhere = time.perf_counter(), True, 0.0
    for number in range(DISTINCT):
        prediction, truth = (read_mask(root / folder / f"{number:05d}.png") for folder in ("predicted", "masks"))
        counts = np.array([[one.sum() for one in row] for row in plain_count(prediction, truth, classes + 1)])
        pause = time.perf_counter()
        ours = confusion(prediction, truth, classes + 1)
        agrees &= bool((counts == np.stack([ours.diagonal(), ours.sum(axis=0), ours.sum(axis=1)], axis=1)).all())
        elsewhere += time.perf_counter() - pause
    return (time.perf_counter() - started - elsewhere) / DISTINCT, agrees


def measure(name, workers):
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
        reference, agrees = plain(root, classes)
    return {"case": f"scoring_{name}", "masks": count, "seconds": round(seconds, 2), "largest_process_mb": round(peak),
            "ms_a_mask": round(1000 * seconds / count, 2), "reference_ms_a_mask": round(1000 * reference, 2),
            "ratio": round(reference * count / seconds, 2), "same_counts": agrees}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), nargs="+", default=tuple(CASES), help="default: all")
    parser.add_argument("--workers", type=FLAGS["workers"].type, default=FLAGS["workers"].default,
                        help="processes of run_eval.py (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in args.case:
        print(json.dumps(measure(name, args.workers)), flush=True)


if __name__ == "__main__":
    main()
