"""The affinity vector of a chosen pixel as a heat map over its image, for the CAM network and for AffinityNet."""
from pathlib import Path

import numpy as np
import torch

from models.build import unpack
from models.fuse import for_inference
from src.engine import autocast
from src.inference import WALK_STRIDE
from utils import distributed
from utils.errors import UserError
from utils.images import image_size, read_image
from utils.loader import scaled_views
from utils.log import progress
from utils.maps import resize_maps
from utils.visualize import heatmap, overlay, save_picture

COUNT = 8   # images of a split that are shown
MARK = 255, 0, 0
STEMS = {"classifier": "cam", "affinity": "affinitynet"}


def show_affinity(payload, paths, chosen, options, device):
    """Write <output_dir>/affinity/<name>_cam.png and, of a stage-2 checkpoint, <name>_affinitynet.png.

    paths: of the images, from `shown_images`.  chosen: (x, y) in pixels of the images.
    """
    if not distributed.is_main():
        return
    folder = Path(options["output_dir"]) / "affinity"
    networks = {kind: for_inference(unpack(payload["networks"][kind]), device)
                for kind in STEMS if kind in payload["networks"]}
    for path in progress(paths, "affinity", len(paths)):
        image = read_image(path)
        for kind, network in networks.items():
            view = scaled_views(image, (1.0,), options["max_size"],
                                network.trunk.stride if kind == "classifier" else WALK_STRIDE)[0]
            vector = affinity_vector(kind, network, view, place(chosen, image.shape[:2]), device, options["precision"])
            save_picture(folder / f"{path.stem}_{STEMS[kind]}.png", picture(image, vector, chosen))
    print(f"Wrote the affinity of pixel {chosen[0]},{chosen[1]} in {len(paths)} images to {folder}")


def shown_images(chosen, dataset, paths=None):
    """Paths of the images to show: all of `paths`, or the first COUNT of a split; none if no pixel was chosen.

    Raises UserError, before the step's work, if one is too small to have the pixel (x, y).
    """
    if chosen is None:
        return []
    paths = paths or [dataset.image_path(i) for i in range(min(COUNT, len(dataset)))]
    for path in paths:
        height, width = image_size(path)
        if chosen[0] >= width or chosen[1] >= height:
            raise UserError(f"--show_affinity {chosen[0]},{chosen[1]}: {path} is {width}x{height} pixels; pass an X "
                            f"below {width} and a Y below {height}, or other images")
    return paths


def place(chosen, size):
    """(x, y) in pixels -> (row, column) in [0, 1], the first and last pixels at 0 and 1.  size: (H, W)."""
    return tuple(at / max(1, side - 1) for at, side in zip(chosen[::-1], size))


@torch.no_grad()
def affinity_vector(kind, network, view, at, device, precision):
    """Affinities of the grid cell nearest to a place with all cells: (h, w) float32 in [0, 1], numpy.

    kind: "classifier": ReLU of cosines of its features, or what its affinity head says, if it has one;
    "affinity": exp(-mean |f_i - f_j|).  view: (3, H, W) normalised.  at: (row, column) in [0, 1], see `place`.
    """
    images = view[None].to(device, memory_format=torch.channels_last)
    with autocast(device, precision):
        if kind == "classifier":
            matrix, (h, w) = network.affinities(images)
        else:
            features = network(images)
            h, w = features.shape[-2:]
    row, column = round(at[0] * (h - 1)), round(at[1] * (w - 1))
    if kind == "classifier":
        return matrix[0, row * w + column].reshape(h, w).cpu().numpy()
    features = features[0].float()
    return torch.exp(-(features - features[:, row, column, None, None]).abs().mean(dim=0)).cpu().numpy()


def picture(image, vector, chosen):
    """The heat map of an affinity vector (h, w) over its image, the chosen pixel marked with a cross."""
    size = image.shape[:2]
    drawn = overlay(image, heatmap(resize_maps(vector[None], size)[0]), 0.6)
    arm = max(2, min(size) // 40)
    x, y = chosen
    thick = max(1, arm // 4)
    drawn[max(0, y - thick):y + thick + 1, max(0, x - arm):x + arm + 1] = np.uint8(MARK)
    drawn[max(0, y - arm):y + arm + 1, max(0, x - thick):x + thick + 1] = np.uint8(MARK)
    return drawn
