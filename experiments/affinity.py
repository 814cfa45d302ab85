"""How well the affinities of a CAM network tell objects apart, on ground truth, which no training has seen.

Of each image: the mean of A over pairs of cells in the object, over pairs across its border and over pairs in the
background, and the area under the ROC curve of A as a classifier of pairs: same object, or across the border. The
figures are means over images, of a stage-1 checkpoint's affinities: with AVC its head's, else those of the backbone's
features.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Parser
from src.affinity_maps import cam_vector, picture, place
from src.pipeline import Pipeline
from utils.config import DataConfig
from utils.datasets import Dataset, open_dataset
from utils.grids import Size, capped_size, resize_image
from utils.labels import IGNORE
from utils.loader import Views, WholeImages, whole_image_loader
from utils.log import progress
from utils.runtime import run_main
from utils.visualize import panel


def roc_area(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Probability that a positive value exceeds a negative one, ties counting half: the area under the ROC curve.

    positive: (n,), negative: (m,) floats, n and m > 0.
    """
    values = torch.cat([positive, negative])
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2  # mean rank of each value, from 1
    total = ranks[inverse[:len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2
    return float(total / (len(positive) * len(negative)))


def sampled_mask(mask: np.ndarray, grid: Size) -> torch.Tensor:
    """Ground truth (H, W) at the cells of a grid, corners on corners: (N,) tensor."""
    rows, columns = (np.linspace(0, side - 1, count).round().astype(int) for side, count in zip(mask.shape, grid))
    return torch.from_numpy(mask[np.ix_(rows, columns)].astype(np.int64)).flatten()


def pair_quality(matrix: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float, float] | None:
    """(mean A in the object, across its border, in the background, ROC area), or None without object or background.

    matrix: (N, N).  truth: (N,) int: 0 background, 255 ignored.  Pairs of a cell with itself do not count.
    """
    inside, ground = (truth > 0) & (truth < IGNORE), truth == 0
    if inside.sum() < 2 or ground.sum() < 2:
        return None
    same, across = _pairs(matrix, inside), matrix[inside][:, ground].flatten()
    return same.mean().item(), across.mean().item(), _pairs(matrix, ground).mean().item(), roc_area(same, across)


def _pairs(matrix: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    block = matrix[chosen][:, chosen]
    rows, columns = torch.triu_indices(len(block), len(block), offset=1)
    return block[rows, columns]


@torch.no_grad()
def measure(pipeline: Pipeline, dataset: Dataset) -> np.ndarray:
    """Mean of `pair_quality` over the images of a split: (4,)."""
    classifier, machine = pipeline.classifier, pipeline.machine
    views = Views((1.0,), pipeline.maps.max_size, classifier.backbone.stride, classifier.backbone.normalise)
    found = []
    for item in progress(whole_image_loader(WholeImages(dataset, views), machine), "affinity", len(dataset)):
        view = item["views"][0][None].contiguous(memory_format=torch.channels_last)
        with machine.autocast():
            matrix, grid = classifier.seed.affinities(classifier, view)
        found.append(pair_quality(matrix[0], sampled_mask(dataset.mask(item["index"]), grid)))
    return np.mean([entry for entry in found if entry is not None], axis=0)


def draw(pipelines: Sequence[Pipeline], dataset: Dataset, path: str | Path, count: int = 4) -> None:
    """Affinity of the middle pixel of images spread over the split, one column a network; written to `path` (JPEG)."""
    rows, max_size = [], pipelines[0].maps.max_size
    for index in np.linspace(0, len(dataset) - 1, count + 2).astype(int)[1:-1]:
        image = dataset.image(int(index))
        image = resize_image(image, capped_size(image.shape[:2], max_size))
        middle = image.shape[1] // 2, image.shape[0] // 2
        at = place(middle, image.shape[:2])
        rows.append([image, *(picture(image, cam_vector(pipeline, image, at), middle) for pipeline in pipelines)])
    titles = ["image", "before", "after"] if len(pipelines) == 2 else ["image", *map(str, range(1, len(pipelines) + 1))]
    panel(rows, titles).convert("RGB").save(path, format="JPEG", quality=85)


def main() -> None:
    parser = Parser("experiments.affinity", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="stage-1 checkpoints, ours or published")
    parser.flag("data_root", "data/oxford-iiit-pet", "Pet dataset")
    parser.flag("split", "trainval", "split")
    parser.add_argument("--ids", metavar="FILE", help="only the images of this list")
    parser.flag("max_size", 256, "long side in pixels")
    parser.flag("precision", "fp32", "arithmetic of the networks")
    parser.add_argument("--picture", metavar="FILE.jpg", help="also draw the affinity of the middle pixel of 4 images")
    args = parser.parse_args()
    dataset = open_dataset(DataConfig("pet", args.data_root, args.split, args.ids))
    pipelines = [Pipeline.load(path, "cpu", args.precision, max_size=args.max_size) for path in args.checkpoints]
    print(f"{'in object':>10}{'across':>10}{'background':>12}{'ROC area':>10}")
    if args.picture:
        draw(pipelines, dataset, args.picture)
    for path, pipeline in zip(args.checkpoints, pipelines):
        same, across, ground, area = measure(pipeline, dataset)
        print(f"{same:>10.3f}{across:>10.3f}{ground:>12.3f}{area:>10.3f}  {path}")


if __name__ == "__main__":
    run_main(main)
