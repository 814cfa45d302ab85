"""CAMs of photos, four scales and horizontal flips, beside the published way of making them.

    python -m benchmarks.cam [--data_root data/oxford-iiit-pet] [--count 12]

A ResNet-50 of random weights (the work is the same) on images taken evenly from the training split, or on a toy set of
about 500x375. Ours: step 1's own loop, the files written. The published way (IRN's make_cam in form): one image and
scale at a time with its horizontal flip, at the photo's own size, normalisation unfolded, the usual order of memory and
setting of the allocator, maps of all classes resized to the photo and the label's saved as float32. The cases: the
photos as they are (ours caps them at --max_size); those no larger, where both see the same pixels and the maps are
compared on our grid (both in bf16 too, where the CPU has units for it); and the largest photo's extra memory.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import Parser, Table, extra_mb, precisions, timed, usual_memory
from data.make_toy import make_toy
from models.weights import build_network, pack, unpack
from src.inference import cam_folder, make_cams
from src.pipeline import Pipeline
from utils.config import DataConfig, Machine, MapConfig, WalkConfig
from utils.datasets import Dataset, open_dataset
from utils.files import load_cam
from utils.grids import Size
from utils.loader import Views
from utils.options import FLAGS
from utils.runtime import run_main

SCALES, STRIDE = (1.0, 0.5, 1.5, 2.0), 16


@torch.no_grad()
def plain_cam(classifier: nn.Module, image: np.ndarray, label: int, size: Size) -> np.ndarray:
    """One image and scale at a time with its horizontal flip; the label's map at `size`, over its maximum."""
    total = 0
    for view in Views(SCALES, max(image.shape[:2]), STRIDE)(image):
        cam = classifier.cam(classifier.backbone(torch.stack([view, view.flip(-1)])))
        cam = F.interpolate(F.relu(cam), size=size, mode="bilinear", align_corners=True)
        total = total + cam[0] + cam[1].flip(-1)
    return (total[label] / total[label].max().clamp(min=1e-8)).numpy()


def published(classifier: nn.Module, dataset: Dataset, folder: Path) -> None:
    """The published loop over a split; writes <folder>/<id>.npy: one map at the photo's size."""
    for i, image_id in enumerate(dataset.ids):
        image = dataset.image(i)
        cam = plain_cam(classifier, image, int(dataset.label(i).argmax()), image.shape[:2])
        np.save(folder / f"{image_id}.npy", cam, allow_pickle=False)


def largest_difference(classifier: nn.Module, dataset: Dataset, folder: Path, count: int = 3) -> float:
    """Of our files from plain maps on our grid, over the first images; files have steps of 1 / 1024."""
    gaps = []
    for i, image_id in enumerate(dataset.ids[:count]):
        (label,), (cam,) = load_cam(folder, image_id)
        gaps.append(abs(cam - plain_cam(classifier, dataset.image(i), label, cam.shape)).max())
    return max(gaps)


def measure(table: Table, case: str, payload: dict, dataset: Dataset, maps: MapConfig, machine: Machine) -> None:
    """Add a case to the table; that of the largest photo, decoded in this process, says how much memory it takes."""
    pipeline, classifier = Pipeline(payload, maps, WalkConfig(), machine), unpack(payload["networks"]["classifier"])
    with tempfile.TemporaryDirectory() as home:
        folder = cam_folder(Path(home) / "cams", pipeline, False)

        def ours():
            make_cams(pipeline, dataset, folder, {})

        def plain():
            published(classifier, dataset, Path(home))
        if case.endswith("largest"):
            seconds, memory = timed(lambda: extra_mb(ours), 1)
            reference_seconds, published_memory = timed(lambda: extra_mb(plain), 1)
            more = {"reference_extra_mb": published_memory, "photo": "x".join(map(str, dataset.size(0)[::-1]))}
        else:
            (seconds, _), memory = timed(ours, 1), None
            with usual_memory():
                reference_seconds, _ = timed(plain, 1)
            more = {"images": len(dataset), "seconds_an_image": round(seconds / len(dataset), 3)}
        error = largest_difference(classifier, dataset, folder.path) if case.endswith("same_pixels") else None
    table.add(case, seconds, reference_seconds, memory, error, **more)


def main() -> None:
    parser = Parser("benchmarks.cam", __doc__)
    parser.add_argument("--data_root", help="a folder in Pet's layout (default: a toy set)")
    parser.flag("count", 12, "photos", like="limit")
    parser.flag("max_size", 512, "pixels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        if args.data_root is None:
            make_toy(Path(home) / "toy", train=args.count, test=1, size=437)
        dataset = open_dataset(DataConfig("pet", args.data_root or str(Path(home) / "toy")))
        spread = np.linspace(0, len(dataset) - 1, min(args.count, len(dataset))).round().astype(int)
        dataset = dataset.subset(spread.tolist())
        small = dataset.subset([i for i in range(len(dataset)) if max(dataset.size(i)) <= args.max_size])
        torch.manual_seed(0)
        how = {"kind": "classifier", "backbone": "resnet50", "classes": len(dataset.classes)}
        record = pack(build_network(**how), seed={"name": "cam"}, **how)
        payload = {"networks": {"classifier": record}, "classes": dataset.classes}
        maps, table, cpu = MapConfig(SCALES, labels="gt", max_size=args.max_size), Table(), torch.device("cpu")
        for precision in precisions(cpu):
            machine = Machine(cpu, precision, FLAGS["workers"].default)
            measure(table, f"cam_{precision}_photos", payload, dataset, maps, machine)
            if len(small):
                measure(table, f"cam_{precision}_same_pixels", payload, small, maps, machine)
        largest = dataset.subset([int(np.argmax([max(dataset.size(i)) for i in range(len(dataset))]))])
        measure(table, "cam_fp32_largest", payload, largest, maps, Machine(cpu))
        table.finish()


if __name__ == "__main__":
    run_main(main)
