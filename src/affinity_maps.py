"""The affinity vector of a chosen pixel as a heat map over its image, for the CAM network and for AffinityNet."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from src.inference import result_names
from src.pipeline import Pipeline
from utils import distributed
from utils.datasets.base import Dataset
from utils.errors import ImageError, UserError
from utils.grids import Size, resize_maps
from utils.images import image_size, read_image
from utils.loader import Views
from utils.log import progress, warn
from utils.visualize import heatmap, overlay, save_picture

COUNT = 8   # images of a split that are shown
MARK = 255, 0, 0


def show_affinity(pipeline: Pipeline, paths: Sequence[Path], chosen: tuple[int, int], folder: Path) -> None:
    """Write <folder>/<name>_cam.png and, of a stage-2 checkpoint, <name>_affinitynet.png.

    paths: of the images, from `shown_images`.  chosen: (x, y) in pixels of the images.
    """
    if not distributed.is_main():
        return
    shown = 0
    for path, name in progress(list(zip(paths, result_names(paths))), "affinity"):
        try:
            image = read_image(path, displayed=True)
        except ImageError as error:  # damaged behind its header
            if not pipeline.machine.skip_bad:
                raise
            warn(f"Skipping {path}: {error}")
            continue
        shown += 1
        at = place(chosen, image.shape[:2])
        save_picture(folder / f"{name}_cam.png", picture(image, cam_vector(pipeline, image, at), chosen))
        if "affinity" in pipeline.records:
            vector = walk_vector(pipeline, image, at)
            save_picture(folder / f"{name}_affinitynet.png", picture(image, vector, chosen))
    print(f"Wrote the affinity of pixel {chosen[0]},{chosen[1]} in {shown} images to {folder}")


def shown_images(chosen: tuple[int, int] | None, dataset: Dataset | None, paths: Sequence[Path] | None = None,
                 skip_bad: bool = False) -> list[Path]:
    """Paths of the images to show: all of `paths`, or the first COUNT of a split; none if no pixel was chosen.

    skip_bad: leave out those that cannot be decoded.
    Raises UserError, before the step's work, if one is too small to have the pixel (x, y).
    """
    if chosen is None:
        return []
    paths = paths or [dataset.image_path(i) for i in range(min(COUNT, len(dataset)))]
    found = []
    for path in paths:
        try:
            height, width = image_size(path, displayed=True)
        except ImageError:  # whoever makes its mask says that it is skipped
            if not skip_bad:
                raise
            continue
        if chosen[0] >= width or chosen[1] >= height:
            raise UserError(f"--show_affinity {chosen[0]},{chosen[1]}: {path} is {width}x{height} pixels; pass an X "
                            f"below {width} and a Y below {height}, or other images")
        found.append(path)
    return found


def place(chosen: tuple[int, int], size: Size) -> tuple[float, float]:
    """(x, y) in pixels -> (row, column) in [0, 1], the first and last pixels at 0 and 1.  size: (H, W)."""
    return tuple(at / max(1, side - 1) for at, side in zip(chosen[::-1], size))


@torch.no_grad()
def cam_vector(pipeline: Pipeline, image: np.ndarray, at: tuple[float, float]) -> np.ndarray:
    """Affinities, as the seed method has them, of the cell nearest to a place with all cells: (h, w) in [0, 1].

    image: uint8 (H, W, 3).  at: (row, column) in [0, 1], see `place`.
    """
    classifier, machine = pipeline.classifier, pipeline.machine
    views = Views((1.0,), pipeline.maps.max_size, classifier.backbone.stride, classifier.backbone.normalise)
    with machine.autocast():
        matrix, (h, w) = classifier.seed.affinities(
            classifier, views(image)[0][None].to(machine.device, memory_format=torch.channels_last))
    row, column = _cell(at, (h, w))
    return matrix[0, row * w + column].reshape(h, w).float().cpu().numpy()


@torch.no_grad()
def walk_vector(pipeline: Pipeline, image: np.ndarray, at: tuple[float, float]) -> np.ndarray:
    """As `cam_vector`, AffinityNet's affinities exp(-mean |f_i - f_j|)."""
    with pipeline.machine.autocast():
        view = pipeline.walk_views()(image)[0][None]
        features = pipeline.affinity_net(view.to(pipeline.machine.device, memory_format=torch.channels_last))[0].float()
    row, column = _cell(at, features.shape[-2:])
    return torch.exp(-(features - features[:, row, column, None, None]).abs().mean(dim=0)).cpu().numpy()


def _cell(at: tuple[float, float], grid: Size) -> tuple[int, int]:
    return tuple(round(part * (side - 1)) for part, side in zip(at, grid))


def picture(image: np.ndarray, vector: np.ndarray, chosen: tuple[int, int]) -> np.ndarray:
    """The heat map of an affinity vector (h, w) over its image, the chosen pixel marked with a cross."""
    size = image.shape[:2]
    drawn = overlay(image, heatmap(resize_maps(vector[None], size)[0]), 0.6)
    arm = max(2, min(size) // 40)
    x, y = chosen
    thick = max(1, arm // 4)
    drawn[max(0, y - thick):y + thick + 1, max(0, x - arm):x + arm + 1] = np.uint8(MARK)
    drawn[max(0, y - arm):y + arm + 1, max(0, x - thick):x + thick + 1] = np.uint8(MARK)
    return drawn
