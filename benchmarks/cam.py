"""CAMs of photos, four scales and mirror images, beside the published way of making them.

    python -m benchmarks.cam [--data_root data/oxford-iiit-pet] [--count 12]

A ResNet-50 of random weights (the work is the same) on images taken evenly from the training split, or on a toy set of
about 500x375. Ours: step 1's own loop, the files written. The published way (IRN's make_cam in form): one image and
scale at a time with its mirror image, at the photo's own size, normalisation unfolded, the usual order of memory and
setting of the allocator, maps of all classes resized to the photo and the label's saved as float32. The cases: the
photos as they are (ours caps them at --max_size); those no larger, where both see the same pixels and the maps are
compared on our grid; and the largest photo's extra memory.
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.measure import Table, extra_mb, usual_memory
from data.make_toy import make_toy
from models.build import build_network, pack, unpack
from src.cams import cam_folder, cam_size, make_cams
from utils.artifacts import load_cam
from utils.datasets import open_dataset
from utils.loader import scaled_views
from utils.options import FLAGS, pick_device
from utils.runtime import run_main

SCALES, STRIDE = (1.0, 0.5, 1.5, 2.0), 16


@torch.no_grad()
def plain_cam(classifier, image, label, size):
    """One image and scale at a time with its mirror image; the label's map at `size`, over its maximum."""
    total = 0
    for view in scaled_views(image, SCALES, max(image.shape[:2]), STRIDE):
        _, cam = classifier.cam(torch.stack([view, view.flip(-1)]))
        cam = F.interpolate(F.relu(cam), size=size, mode="bilinear", align_corners=True)
        total = total + cam[0] + cam[1].flip(-1)
    return (total[label] / total[label].max()).numpy()


def published(classifier, dataset, folder):
    """The published loop over a split; writes <folder>/<id>.npy: one map at the photo's size."""
    for i, image_id in enumerate(dataset.ids):
        image = dataset.image(i)
        cam = plain_cam(classifier, image, int(dataset.label(i).argmax()), image.shape[:2])
        np.save(folder / f"{image_id}.npy", cam, allow_pickle=False)


def largest_difference(classifier, dataset, folder, max_size, count=3):
    """Of our files from plain maps on our grid, over the first images; files have steps of 1 / 1024."""
    gaps = []
    for i, image_id in enumerate(dataset.ids[:count]):
        _, ours, size = load_cam(folder, image_id)
        plain = plain_cam(classifier, dataset.image(i), int(dataset.label(i).argmax()), cam_size(size.tolist(), max_size))
        gaps.append(abs(ours[0] - plain).max())
    return float(f"{max(gaps):.1e}")


def measure(table, case, record, dataset, options, device, compare):
    with tempfile.TemporaryDirectory() as home:
        folder = cam_folder(Path(home) / "cams", record, dataset.classes, dataset.name, options)
        started = time.perf_counter()
        make_cams(record, dataset, folder, options, device)
        seconds = time.perf_counter() - started
        classifier, started = unpack(record), time.perf_counter()
        with usual_memory():
            published(classifier, dataset, Path(home))
        reference_seconds = time.perf_counter() - started
        error = largest_difference(classifier, dataset, folder.path, options["max_size"]) if compare else None
    table.add(case, seconds, reference_seconds, None, error, images=len(dataset),
              seconds_an_image=round(seconds / len(dataset), 3))


def measure_memory(table, case, record, dataset, options, device):
    """Extra memory of the largest photo, decoded in this process."""
    sides = [max(dataset.size(i)) for i in range(len(dataset))]
    largest = dataset.subset([int(np.argmax(sides))])
    with tempfile.TemporaryDirectory() as home:
        folder = cam_folder(Path(home) / "cams", record, dataset.classes, dataset.name, options)
        started = time.perf_counter()
        memory = extra_mb(lambda: make_cams(record, largest, folder, {**options, "workers": 0}, device))
        seconds = time.perf_counter() - started
        classifier, started = unpack(record), time.perf_counter()
        published_memory = extra_mb(lambda: published(classifier, largest, Path(home)))
        table.add(case, seconds, time.perf_counter() - started, memory, None, reference_extra_mb=published_memory,
                  photo="x".join(map(str, largest.size(0)[::-1])))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cam", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", help="a folder in Pet's layout (default: a toy set)")
    parser.add_argument("--count", type=FLAGS["limit"].type, default=12, help="photos (default: %(default)s)")
    parser.add_argument("--max_size", type=FLAGS["max_size"].type, default=512, help="pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    device = pick_device("cpu")
    with tempfile.TemporaryDirectory() as home:
        if args.data_root is None:
            make_toy(Path(home) / "toy", train=args.count, test=1, size=437)
        dataset = open_dataset("pet", args.data_root or Path(home) / "toy")
        spread = np.linspace(0, len(dataset) - 1, min(args.count, len(dataset))).round().astype(int)
        dataset = dataset.subset(spread.tolist())
        small = dataset.subset([i for i in range(len(dataset)) if max(dataset.size(i)) <= args.max_size])
        torch.manual_seed(0)
        how = {"kind": "classifier", "backbone": "resnet50", "width": 1.0, "classes": len(dataset.classes)}
        record = pack(build_network(**how).eval(), **how)
        table = Table()
        for precision in ("fp32", "bf16"):
            options = {"scales": SCALES, "flip": True, "labels": "gt", "max_size": args.max_size, "difficult": True,
                       "workers": FLAGS["workers"].default, "precision": precision}
            measure(table, f"cam_{precision}_photos", record, dataset, options, device, compare=False)
            measure(table, f"cam_{precision}_same_pixels", record, small, options, device, compare=True)
        measure_memory(table, "cam_fp32_largest", record, dataset, {**options, "precision": "fp32"}, device)
        table.finish()


if __name__ == "__main__":
    run_main(main)
