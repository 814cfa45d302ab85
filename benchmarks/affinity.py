"""How well the affinities of a CAM network tell objects apart, on ground truth, which no training has seen.

Of each image: the mean of A over pairs of cells in the object, over pairs across its border and over pairs in the
background, and the area under the ROC curve of A as a classifier of pairs: same object, or across the border. The
figures are means over images, of a stage-1 checkpoint's affinities (with AVC, its head's; else of trunk features).
"""
import argparse

import numpy as np
import torch

from models.build import unpack
from models.fuse import for_inference
from models.weights import load_model
from src.affinity_maps import affinity_vector, picture, place
from src.engine import autocast
from utils.datasets import open_dataset
from utils.labels import IGNORE
from utils.loader import WholeImages, scaled_views, whole_image_loader
from utils.log import progress
from utils.maps import capped_size, resize_image
from utils.runtime import run_main
from utils.visualize import panel


def roc_area(positive, negative):
    """Probability that a positive value exceeds a negative one, ties counting half: the area under the ROC curve.

    positive: (n,), negative: (m,) floats, n and m > 0.
    """
    values = torch.cat([positive, negative])
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2  # mean rank of each value, from 1
    total = ranks[inverse[:len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2
    return float(total / (len(positive) * len(negative)))


def sampled_mask(mask, grid):
    """Ground truth (H, W) at the cells of a grid, corners on corners: (N,) tensor."""
    rows, columns = (np.linspace(0, side - 1, count).round().astype(int) for side, count in zip(mask.shape, grid))
    return torch.from_numpy(mask[np.ix_(rows, columns)].astype(np.int64)).flatten()


def pair_quality(matrix, truth):
    """(mean A in the object, across its border, in the background, ROC area), or None without object or background.

    matrix: (N, N).  truth: (N,) int: 0 background, 255 ignored.  Pairs of a cell with itself do not count.
    """
    inside, ground = (truth > 0) & (truth < IGNORE), truth == 0
    if inside.sum() < 2 or ground.sum() < 2:
        return None
    same, across = _pairs(matrix, inside), matrix[inside][:, ground].flatten()
    return same.mean().item(), across.mean().item(), _pairs(matrix, ground).mean().item(), roc_area(same, across)


def _pairs(matrix, chosen):
    block = matrix[chosen][:, chosen]
    rows, columns = torch.triu_indices(len(block), len(block), offset=1)
    return block[rows, columns]


@torch.no_grad()
def measure(network, dataset, max_size, precision, workers):
    """Mean of `pair_quality` over the images of a split: (4,) numpy."""
    device = torch.device("cpu")
    images = WholeImages(dataset, (1.0,), max_size, network.trunk.stride)
    found = []
    for item in progress(whole_image_loader(images, workers, device), "affinity", len(dataset)):
        view = item["views"][0][None].contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            matrix, grid = network.affinities(view)
        found.append(pair_quality(matrix[0], sampled_mask(dataset.mask(item["index"]), grid)))
    return np.mean([entry for entry in found if entry is not None], axis=0)


def draw(networks, dataset, max_size, precision, path, count=4):
    """Affinity of the middle pixel of images spread over the split, one column a network; written to `path` (JPEG)."""
    rows = []
    for index in np.linspace(0, len(dataset) - 1, count + 2).astype(int)[1:-1]:
        image = dataset.image(int(index))
        image = resize_image(image, capped_size(image.shape[:2], max_size))
        middle = image.shape[1] // 2, image.shape[0] // 2
        at, vectors = place(middle, image.shape[:2]), []
        for network in networks:
            view = scaled_views(image, (1.0,), max_size, network.trunk.stride)[0]
            vectors.append(affinity_vector("classifier", network, view, at, torch.device("cpu"), precision))
        rows.append([image, *(picture(image, vector, middle) for vector in vectors)])
    titles = ["image", "before", "after"] if len(networks) == 2 else ["image", *map(str, range(1, len(networks) + 1))]
    panel(rows, titles).convert("RGB").save(path, format="JPEG", quality=85)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="stage-1 checkpoints, ours or published")
    parser.add_argument("--data_root", default="data/oxford-iiit-pet", help="Pet dataset (default: %(default)s)")
    parser.add_argument("--split", default="trainval", help="split (default: %(default)s)")
    parser.add_argument("--ids", metavar="FILE", help="only the images of this list")
    parser.add_argument("--max_size", type=int, default=256, help="long side in pixels (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="reading processes (default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE.jpg", help="also draw the affinity of the middle pixel of 4 images")
    args = parser.parse_args()
    dataset = open_dataset("pet", args.data_root, args.split, None, args.ids)
    print(f"{'in object':>10}{'across':>10}{'background':>12}{'ROC area':>10}")
    networks = [for_inference(unpack(load_model(path, steps=("stage1",))["networks"]["classifier"]))
                for path in args.checkpoints]
    if args.picture:
        draw(networks, dataset, args.max_size, args.precision, args.picture)
    for path, network in zip(args.checkpoints, networks):
        same, across, ground, area = measure(network, dataset, args.max_size, args.precision, args.workers)
        print(f"{same:>10.3f}{across:>10.3f}{ground:>12.3f}{area:>10.3f}  {path}")


if __name__ == "__main__":
    run_main(main)
