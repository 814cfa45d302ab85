"""Steps 1 to 4 on simulated splits of growing size: memory and time an image, from 1,000 images to COCO's 82,081.

    python -m benchmarks.scale [--counts 1000 82081] [--folder FOLDER]
    python -m benchmarks.scale run_train.py --stage 1 --dataset drawn ...      a script, with this file's plugs

Images of 32x24 pixels and their masks are drawn on the fly, and the network has three layers, so that what is measured
is this project's own: lists of ids, manifests, folders of small files, tallies, the calls for each image.  One thread,
two workers, and the CRF by pydensecrf, which takes less to start on an image of this size.  Each row is a step: its
seconds, the milliseconds of each image more than the count before has, and the MB of its largest process at the peak.
The reference of a row is the first count's time for as many images: a ratio of 1 or more means that nothing grows
faster than the split (the start counts but once).
"""
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.measure import ROOT, Parser, Table
from models.backbone import BACKBONES, BackbonePlug
from utils.datasets import DATASETS
from utils.datasets.base import Dataset, Layout
from utils.errors import UserError
from utils.files import short_hash
from utils.recipes import by_step
from utils.runtime import run_main
from utils.transforms import IMAGENET

NAME, CLASSES, SIZE = "drawn", 80, (24, 32)
BACKBONE = "few_layers"
MACHINE = ("--device", "cpu", "--precision", "fp32", "--workers", "2")
CRF = ("--crf_backend", "pydensecrf")
STEPS = {
    "step 1": ("run_train.py", "--stage", "1", "--dataset", NAME, "--data_root", ".", "--backbone", BACKBONE,
               "--pretrained", "none", "--method", "cam", "--head_only", "--scales", "1"),
    "step 2": ("run_train.py", "--stage", "2", "--epochs", "1", "--batch_size", "32", "--crop_size", "33", *CRF),
    "step 3": ("run_inference.py", "--walk_steps", "8", *CRF),
    "step 4": ("run_eval.py", "--walk_steps", "8", *CRF)}


class Drawn(Dataset):
    """Photos that are drawn when they are asked for: an ellipse of its class's colour on noise."""

    def image(self, index: int) -> np.ndarray:
        inside, classes = drawing(self.ids[index])
        rng = np.random.default_rng(int(self.ids[index]))
        colours = np.random.default_rng(0).integers(0, 256, (CLASSES + 1, 3))
        noise = rng.integers(-40, 40, (*SIZE, 3))
        return np.clip(colours[np.where(inside, classes[0] + 1, 0)] + noise, 0, 255).astype(np.uint8)

    def size(self, index: int) -> tuple[int, int]:
        return SIZE

    def stamps(self, labels: bool) -> list[str]:
        return [short_hash(image_id.encode()) for image_id in self.ids]


class FewLayers(nn.Module):
    """A backbone of three strided convolutions."""
    stages, channels, stride, normalise = ("a", "b", "c"), {"a": 8, "b": 16, "c": 32}, 8, IMAGENET

    def __init__(self, **_: object):
        super().__init__()
        sizes = (3, *self.channels.values())
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 3, stride=2, padding=1) for pair in zip(sizes, sizes[1:]))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = {}
        for stage, layer in zip(self.stages, self.layers):
            images = maps[stage] = layer(images).relu()
        return maps

    def blocks(self) -> list[list[nn.Module]]:
        return [[layer] for layer in self.layers]

    def pairs(self) -> tuple[()]:
        return ()


def drawing(image_id: str) -> tuple[np.ndarray, list[int]]:
    """(where the object is (H, W) bool, the classes of the image, zero-based, that of the object first)."""
    rng = np.random.default_rng((1, int(image_id)))
    (y, x), (b, a) = rng.uniform(0.3, 0.7, 2) * SIZE, rng.uniform(0.15, 0.35, 2) * SIZE
    rows, columns = np.ogrid[:SIZE[0], :SIZE[1]]
    return ((rows - y) / b) ** 2 + ((columns - x) / a) ** 2 < 1, rng.permutation(CLASSES)[:rng.integers(1, 4)].tolist()


def truth(image_id: str, _: np.ndarray | None) -> tuple[str, np.ndarray]:
    """Ground truth as `utils.datasets.base.Truth` has it."""
    inside, classes = drawing(image_id)
    return image_id, (inside * (classes[0] + 1)).astype(np.uint8)


def open_drawn(root: Path, split: str | None, difficult: bool) -> Dataset:
    """A split is as many images as its name says."""
    split = split or "100"
    ids = [f"{number:012d}" for number in range(int(split))]
    labels = np.zeros((len(ids), CLASSES), np.uint8)
    for row, image_id in zip(labels, ids):
        row[drawing(image_id)[1]] = 1
    return Drawn(NAME, root, split, (split,), [f"class{k}" for k in range(CLASSES)], ids, labels, root,
                 [f"{image_id}.jpg" for image_id in ids], truth)


def measured(argv: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """(seconds, MB of the largest process at its peak) of a step in a folder; UserError if it fails."""
    command = [sys.executable, "-m", "benchmarks.scale", *argv, *MACHINE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with open(folder / "said.txt", "a", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (folder / "said.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        raise UserError(f"{' '.join(argv[:3])} in {folder}: {last}")
    return time.perf_counter() - started, used.ru_maxrss / 1024


def main() -> None:
    parser = Parser("benchmarks.scale", __doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 82081],
                        help="images of the splits, ascending (default: 1000 82081)")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS), help="default: all four")
    parser.add_argument("--folder", help="where the steps work, kept; by default a temporary folder")
    args = parser.parse_args()
    table, first, last = Table(), {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for count in args.counts:
            folder = Path(args.folder or temporary).resolve() / str(count)
            folder.mkdir(parents=True)
            for step in args.steps:
                argv = STEPS[step] + ("--split", str(count)) * (step == "step 1")
                seconds, peak = measured(argv, folder)
                first.setdefault(step, seconds / count)
                images, before = last.get(step, (0, 0))
                last[step] = count, seconds
                table.add(f"{step}, {count} images", seconds, first[step] * count, peak_mb=round(peak),
                          ms_a_further_image=round(1000 * (seconds - before) / (count - images), 2))
    table.finish()


def script(argv: list[str]) -> None:
    """Run a script with the dataset and the backbone of this file."""
    BACKBONES[BACKBONE] = BackbonePlug(FewLayers)
    DATASETS[NAME] = Layout(open_drawn, ".", defaults=by_step(max(SIZE)))
    sys.argv = argv
    run_main(runpy.run_path(str(ROOT / argv[0]))["main"])


if __name__ == "__main__":
    from benchmarks import scale  # so that worker processes find the dataset's class by its module
    if sys.argv[1:2] and sys.argv[1].endswith(".py"):
        scale.script(sys.argv[1:])
    else:
        run_main(scale.main)
