"""Counting score maps and masks against ground truth over a split. No torch, as worker processes import this."""
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from src.masks import chosen_crf, full_size, in_threads, load_scores, read_checked, refine
from utils import distributed
from utils.artifacts import load_cam
from utils.maps import foreground_share, to_mask, with_background
from utils.metrics import SweepHistogram, central_box, confusion, foreground_iou, scores
from utils.parallel import map_parallel

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
            self.sweep.add_image(sweep)

    def merge(self, other):
        """Add what another process counted of its own images."""
        counted = [matrix for matrix in (self.fixed, other.fixed) if matrix is not None]
        self.fixed = sum(counted) if counted else None
        self.images.update(other.images)
        self.sweep.add(other.sweep)

    def fixed_scores(self):
        return {**scores(self.fixed), "image_fg_iou": float(np.nanmean(list(self.images.values())))}


def score_split(dataset, stages, options):
    """Count every stage on every image, in --workers processes; of several processes each counts its share.

    Returns {stage name: Tally}, with the central box beside them, the same in all processes.
    """
    dataset.check_truth()
    classes = len(dataset.classes) + 1
    tallies = {name: Tally(classes, SweepHistogram(classes)) for name in [BOX] + [stage.name for stage in stages]}
    settings = {name: options.get(name) for name in ("bg_alpha", "bg_threshold", "max_size")}
    settings["crf"] = chosen_crf(options) if any(stage.crf for stage in stages) else None
    work = partial(_score_image, stages=stages, settings=settings)
    for image_id, counted in map_parallel(work, dataset.share(), options["workers"], "scoring",
                                          in_threads(settings["crf"])):
        for name, (matrix, sweep) in counted.items():
            tallies[name].add(image_id, matrix, sweep)
    return tallies if distributed.world() == 1 else _combined(distributed.gather(tallies), dataset)


def _combined(parts, dataset):
    """One {stage name: Tally} of those of all processes, its images in the order of the split."""
    tallies = parts[0]
    for part in parts[1:]:
        for name, tally in part.items():
            tallies[name].merge(tally)
    for tally in tallies.values():
        tally.images = {image_id: tally.images[image_id] for image_id in dataset.ids}
    return tallies


def _score_image(item, stages, settings):
    image_id, one = item
    truth, classes = one.mask(0), len(one.classes) + 1
    counted = {BOX: (confusion(_labelled_box(truth.shape, one.label(0)), truth, classes), None)}
    for stage in stages:
        if stage.kind == "mask":
            mask = read_checked(stage.folder / f"{image_id}.png", truth.shape, len(one.classes))
            counted[stage.name] = (confusion(mask, truth, classes), None)
        else:
            counted[stage.name] = _count_maps(stage, image_id, one, truth, settings)
    return image_id, counted


def _labelled_box(size, labels):
    """The central box with the image's class, of several the first; nothing where it has none."""
    labelled = labels is not None and labels.any()
    return central_box(*size) * np.uint8(labels.argmax() + 1 if labelled else 0)


def _count_maps(stage, image_id, one, truth, settings):
    """Confusion at the fixed threshold and the sweep of one image."""
    keys, probabilities = stage.probabilities(image_id, settings)
    threshold = settings["bg_threshold"]
    if stage.crf:
        (maps,) = refine(one.image(0), [probabilities], settings["crf"], settings["max_size"], threshold)
        threshold = 0.5
    else:
        maps = full_size(probabilities, truth.shape)
    classes = len(one.classes) + 1
    sweep = SweepHistogram(classes).count(*foreground_share(maps, keys), truth)
    return confusion(to_mask(maps, keys, threshold), truth, classes), sweep
