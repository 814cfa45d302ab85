"""Counting score maps and masks against ground truth over a split. No torch, as worker processes import this."""
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from src.masks import full_size, load_scores, refine
from utils.artifacts import load_cam
from utils.errors import UserError
from utils.maps import foreground_share, to_mask, with_background
from utils.metrics import SweepHistogram, central_box, confusion, foreground_iou, scores
from utils.parallel import map_parallel
from utils.visualize import read_mask

BOX = "central box"


@dataclass
class Stage:
    """A row of the score table and where its maps come from.

    kind: "cam" (folder of CAMs), "scores" (folder of probabilities), or "mask" (folder of PNG, no sweep).
    crf: refine the maps with a CRF before scoring.
    """
    name: str
    kind: str
    folder: Path
    crf: bool = False

    def probabilities(self, image_id, options):
        """(keys, probabilities (K + 1, h, w)) on the grid they were computed on."""
        if self.kind == "cam":
            keys, cam, _ = load_cam(self.folder, image_id)
            return keys, with_background(cam, options["bg_alpha"])
        keys, probabilities, _ = load_scores(self.folder, image_id)
        return keys, probabilities


@dataclass
class Tally:
    """What is counted for one stage: confusion at the fixed threshold, each image's foreground IoU, and the sweep."""
    classes: int
    sweep: SweepHistogram
    fixed: np.ndarray = None
    images: dict = field(default_factory=dict)

    def add(self, image_id, matrix, sweep):
        self.fixed = matrix if self.fixed is None else self.fixed + matrix
        self.images[image_id] = foreground_iou(matrix)
        if sweep is not None:
            self.sweep.add(sweep)

    def fixed_scores(self):
        return {**scores(self.fixed), "image_fg_iou": float(np.nanmean(list(self.images.values())))}


def score_split(dataset, stages, options):
    """Count every stage on every image, in --workers processes.

    Returns {stage name: Tally}, with the central box beside them.
    """
    if dataset.mask_paths is None:
        raise UserError(f"{dataset.root} has no ground truth for split {dataset.split}; nothing can be scored")
    classes = len(dataset.classes) + 1
    tallies = {name: Tally(classes, SweepHistogram(classes)) for name in [BOX] + [stage.name for stage in stages]}
    items = [(image_id, dataset.subset([i])) for i, image_id in enumerate(dataset.ids)]
    names = ("bg_alpha", "bg_threshold", "crf_preset", "max_size")
    work = partial(_score_image, stages=stages, settings={name: options.get(name) for name in names})
    for image_id, counted in map_parallel(work, items, options["workers"], "scoring"):
        for name, (matrix, sweep) in counted.items():
            tallies[name].add(image_id, matrix, sweep)
    return tallies


def _score_image(item, stages, settings):
    image_id, one = item
    truth, classes = one.mask(0), len(one.classes) + 1
    box = central_box(*truth.shape) * np.uint8(one.labels[0].argmax() + 1)
    counted = {BOX: (confusion(box, truth, classes), None)}
    for stage in stages:
        if stage.kind == "mask":
            mask = _checked_mask(stage.folder / f"{image_id}.png", truth, classes)
            counted[stage.name] = (confusion(mask, truth, classes), None)
        else:
            counted[stage.name] = _count_maps(stage, image_id, one, truth, settings)
    return image_id, counted


def _checked_mask(path, truth, classes):
    mask = read_mask(path)
    if mask.shape != truth.shape:
        raise UserError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {truth.shape[1]}x{truth.shape[0]}; "
                        "make the masks at the images' own size")
    if mask.max() >= classes:
        raise UserError(f"{path} holds the value {mask.max()}, but the dataset has {classes - 1} classes; "
                        "are these the masks of another dataset?")
    return mask


def _count_maps(stage, image_id, one, truth, settings):
    """Confusion at the fixed threshold and the sweep of one image."""
    keys, probabilities = stage.probabilities(image_id, settings)
    threshold = settings["bg_threshold"]
    if stage.crf:
        maps = refine(one.image(0), probabilities, settings["crf_preset"], settings["max_size"], threshold)
        threshold = 0.5
    else:
        maps = full_size(probabilities, truth.shape)
    classes = len(one.classes) + 1
    sweep = SweepHistogram(classes)
    sweep.update(*foreground_share(maps, keys), truth)
    return confusion(to_mask(maps, keys, threshold), truth, classes), sweep
