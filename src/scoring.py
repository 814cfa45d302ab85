"""Counting score maps and masks against ground truth over a split.  No torch, as worker processes import this."""
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from src.cards import card_of
from src.masks import MaskConfig, full_size, mask_path, read_checked, refine
from utils import distributed, thumbnails
from utils.datasets.base import Dataset
from utils.files import load_cam, load_scores
from utils.grids import Size
from utils.maps import foreground_probability, to_mask, with_background
from utils.metrics import SweepHistogram, central_box, confusion, foreground_iou, scores
from utils.parallel import map_parallel
from utils.report import Cards

BOX = "central box"


@dataclass(frozen=True)
class Stage:
    """A row of the score table and where its maps come from.

    kind: "cam" (folder of CAMs), "scores" (folder of probabilities), or "mask" (folder of PNG, no sweep).
    crf: refine the maps with a CRF before scoring.  bg_alpha: of CAMs.
    """
    name: str
    kind: str
    folder: Path
    crf: bool = False
    bg_alpha: float = 6.0

    @property
    def soft(self) -> bool:
        """Whether it has maps of its own to look at: a CRF's are nearly a mask."""
        return self.kind != "mask" and not self.crf

    def probabilities(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """(keys (K,), probabilities (K + 1, h, w)) on the grid they were computed on."""
        if self.kind == "cam":
            keys, cam = load_cam(self.folder, image_id)
            return keys, with_background(cam, self.bg_alpha)
        return load_scores(self.folder, image_id)


@dataclass
class Tally:
    """What is counted for one stage: confusion at the fixed threshold, each image's foreground IoU, and the sweep."""
    classes: int
    sweep: SweepHistogram
    fixed: np.ndarray | None = None
    images: dict[str, float] = field(default_factory=dict)

    def add(self, image_id: str, matrix: np.ndarray, sweep: tuple | None) -> None:
        """Count an image.  matrix: its confusion at the fixed threshold.  sweep: from `SweepHistogram.count`."""
        self.fixed = matrix if self.fixed is None else self.fixed + matrix
        self.images[image_id] = foreground_iou(matrix)
        if sweep is not None:
            self.sweep.add_image(sweep)

    def merge(self, other: "Tally") -> None:
        """Add what another rank counted of its own images."""
        counted = [matrix for matrix in (self.fixed, other.fixed) if matrix is not None]
        self.fixed = sum(counted) if counted else None
        self.images.update(other.images)
        self.sweep.add(other.sweep)

    def fixed_scores(self) -> dict[str, object]:
        """Scores at the fixed threshold, with the mean over images of their foreground IoU."""
        return {**scores(self.fixed), "image_fg_iou": float(np.nanmean(list(self.images.values())))}

    def curve(self) -> list[float]:
        """mIoU at each threshold of the sweep."""
        return [scores(matrix)["miou"] for matrix in self.sweep.confusions()]


def score_split(dataset: Dataset, stages: Sequence[Stage], how: MaskConfig, workers: int, cards: Cards | None = None
                ) -> dict[str, Tally]:
    """Count every stage on every image, in worker processes; of several ranks each counts its part.

    how: the threshold, and the CRF of the stages that have one.  cards: takes a card of each image that it wants, made
    of what the scores are counted from; of several ranks each one's take those of its part.
    Returns {stage name: Tally}, with the central box beside them, the same in all ranks.
    """
    dataset.check_truth()
    classes = len(dataset.classes) + 1
    tallies = {name: Tally(classes, SweepHistogram(classes)) for name in [BOX] + [stage.name for stage in stages]}
    threads = any(stage.crf for stage in stages) and how.crf.backend == "torch"
    work = partial(_score_image, stages=stages, how=how, pictured=cards.wanted if cards else frozenset())
    for image_id, counted, card in map_parallel(work, dataset.shard(), workers, "scoring", threads):
        for name, (matrix, sweep) in counted.items():
            tallies[name].add(image_id, matrix, sweep)
        if card is not None:
            cards.add(image_id, card)
    return tallies if distributed.world() == 1 else _combined(distributed.gather(tallies), dataset)


def _combined(parts: list[dict[str, Tally]], dataset: Dataset) -> dict[str, Tally]:
    """One {stage name: Tally} of those of all ranks, its images in the order of the split."""
    tallies = parts[0]
    for part in parts[1:]:
        for name, tally in part.items():
            tallies[name].merge(tally)
    for tally in tallies.values():
        tally.images = {image_id: tally.images[image_id] for image_id in dataset.ids}
    return tallies


def _score_image(item: tuple[str, Dataset], stages: Sequence[Stage], how: MaskConfig, pictured: Collection[str]
                 ) -> tuple[str, dict[str, tuple], dict | None]:
    """(image id, {stage name: (confusion, sweep)}, the image's card or None)."""
    image_id, one = item
    truth, classes = one.mask(0), len(one.classes) + 1
    counted = {BOX: (confusion(_labelled_box(truth.shape, one.label(0)), truth, classes), None)}
    heats = []
    for stage in stages:
        mask, found = _mask_of(stage, image_id, one, truth.shape, how)
        sweep = None if found is None else SweepHistogram(classes).count(*found, truth)
        counted[stage.name] = (confusion(mask, truth, classes), sweep)
        if image_id in pictured and stage.soft:
            heats.append(thumbnails.heat(found[0]))
    if image_id not in pictured:
        return image_id, counted, None
    return image_id, counted, card_of(one, heats, mask, truth, counted[stages[-1].name][0])


def _labelled_box(size: tuple[int, int], labels: np.ndarray | None) -> np.ndarray:
    """The central box with the image's class, of several the first; nothing where it has none."""
    labelled = labels is not None and labels.any()
    return central_box(*size) * np.uint8(labels.argmax() + 1 if labelled else 0)


def _mask_of(stage: Stage, image_id: str, one: Dataset, size: Size, how: MaskConfig
             ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """(the mask of an image at the fixed threshold, its foreground probability and best class), all (H, W).

    Of a stage that is a folder of masks, the second is None.
    """
    if stage.kind == "mask":
        return read_checked(mask_path(stage.folder, image_id), size, len(one.classes)), None
    keys, probabilities = stage.probabilities(image_id)
    threshold = how.bg_threshold
    if stage.crf:
        image, _ = one.photo(0, how.max_size)
        (probabilities,), threshold = refine(image, [probabilities], how.crf, how.max_size, threshold), 0.5
    maps = full_size(probabilities, size)
    return to_mask(maps, keys, threshold), foreground_probability(maps, keys)
