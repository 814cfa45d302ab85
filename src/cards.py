"""Cards of the gallery in report.html: one image's small pictures.  No torch, as worker processes import this."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.masks import read_checked
from utils import thumbnails
from utils.datasets.base import Dataset
from utils.errors import ImageError
from utils.files import load_scores
from utils.maps import foreground_probability
from utils.metrics import scores


def card_of(one: Dataset, heats: Sequence[thumbnails.Layer], mask: np.ndarray, truth: np.ndarray | None = None,
            matrix: np.ndarray | None = None) -> dict[str, object]:
    """The card of the only image of a split, for `utils.report.Cards.add`.

    heats: layers of `thumbnails.heat`.  mask, truth: uint8 (H, W).  matrix: their confusion, if there is a truth.
    """
    layers = [*heats, *(thumbnails.labels(values) for values in (mask, truth) if values is not None)]
    if matrix is None:
        iou, shown, found = {}, None, np.bincount(mask.ravel())
    else:
        iou = {k: round(value, 4) for k, value in enumerate(scores(matrix)["iou"]) if value is not None}
        shown, found = _objects(matrix.sum(axis=1)), matrix.sum(axis=0)
    return {"photo": _photo(one), "layers": layers, "size": list(mask.shape), "iou": iou, "truth": shown,
            "found": _objects(found)}


def unscored_card(item: tuple[str, Dataset], score_dir: Path, mask_dir: Path) -> tuple[str, dict[str, object]]:
    """(image id, card) of an image without ground truth, from its score maps and its mask."""
    image_id, one = item
    mask = read_checked(mask_dir / f"{image_id}.png", one.size(0), len(one.classes))
    keys, probabilities = load_scores(score_dir, image_id)
    probability, _ = foreground_probability(probabilities, keys)
    return image_id, card_of(one, [thumbnails.heat(probability)], mask)


def _objects(counts: np.ndarray) -> list[int]:
    """Mask values above 0 that were counted."""
    return [int(value) for value in np.flatnonzero(counts) if value > 0]


def _photo(one: Dataset) -> str | None:
    """None for a photo that cannot be decoded: scoring masks does without it."""
    try:
        return thumbnails.photo(one.thumbnail(0, thumbnails.SIDE))
    except ImageError:
        return None
