"""Whether ground truth and image labels can be of the same images: a look at a sample, before any work."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils import distributed
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.labels import IGNORE
from utils.log import warn

SAMPLE = 64    # images looked at
FEW = 3        # of fewer masks nothing is refused: one photo may well show a crowd alone
REFUSED = 0.5  # share of images whose mask shows a class that their labels lack, from which on nothing fits
DOUBTFUL = 0.05  # share of images that contradict their labels, from which on a warning is due


@dataclass
class Findings:
    """What masks show beside image labels.

    seen: masks read.  scored: those with a pixel that is not ignored.  shown: those with an object.  labelled: images
    with a label.  unnamed: {image id: classes that only the mask shows}.  unshown: {image id: classes that only the
    labels name}.  unread: {image id: why its mask cannot be read}.
    """
    seen: int = 0
    scored: int = 0
    shown: int = 0
    labelled: int = 0
    unnamed: dict[str, list[str]] = field(default_factory=dict)
    unshown: dict[str, list[str]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def check_against_labels(dataset: Dataset) -> None:
    """UserError if the ground truth of a split cannot belong to its labels; a warning, with counts, if it may not.

    Nothing is said of a split without ground truth, or of masks that cannot be read: whoever reads them will.
    """
    if dataset.truth is None:
        return
    def read(index: int) -> np.ndarray:  # without a look at the image
        return dataset.truth(dataset.ids[index], dataset.label(index))[1]
    found = findings(dataset, dataset.spread(SAMPLE), read)
    wrong = _what_cannot_be(found, dataset.classes)
    if wrong and found.seen >= FEW:
        raise UserError(f"{dataset.root}: {wrong}")
    if wrong:
        if distributed.is_main():
            warn(f"WARNING: {dataset.root}: {wrong}")
        return
    for images, one, other in ((found.unnamed, "mask shows", "labels lack"), (found.unshown, "labels name",
                                                                              "mask lacks")):
        if len(images) > DOUBTFUL * found.seen and distributed.is_main():
            warn(f"WARNING: {dataset.root}: {_told(images, found.seen, one, other)}; for all of them: python -m "
                 f"utils.datasets {dataset.root} --dataset {dataset.name} --split {dataset.split}")


def _what_cannot_be(found: Findings, classes: Sequence[str]) -> str:
    """What shows that masks and labels do not belong together, with the remedy; empty if nothing does."""
    if found.seen and not found.scored:
        return (f"every pixel of the {found.seen} masks looked at is 255, which is ignored; draw class k as k, counted "
                "from 1, and background as 0")
    if found.labelled and found.seen and not found.shown:
        return (f"none of the {found.seen} masks looked at shows an object, though {found.labelled} of their images "
                "have labels; draw class k as k, counted from 1 (255 is ignored)")
    if len(found.unnamed) > REFUSED * found.seen:
        return (f"{_told(found.unnamed, found.seen, 'mask shows', 'labels lack')}; are masks drawn as class k = k, "
                f"counted from 1, in the order of the classes ({', '.join(classes[:4])}"
                f"{', ...' if len(classes) > 4 else ''})?")
    return ""


def findings(dataset: Dataset, positions: Iterable[int], read: Callable[[int], np.ndarray]) -> Findings:
    """Compare masks with labels at some positions of a split.

    read: the mask at a position, uint8 (H, W); its UserError leaves the image out.
    """
    found = Findings()
    for index in positions:
        try:
            mask = read(index)
        except UserError as error:
            found.unread[dataset.ids[index]] = str(error)
            continue
        values = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1))
        shown, labels = {int(value) - 1 for value in values if 0 < value < IGNORE}, dataset.label(index)
        found.seen += 1
        found.scored += any(value != IGNORE for value in values)
        found.shown += bool(shown)
        if labels is None:
            continue
        named = set(np.flatnonzero(labels).tolist())
        found.labelled += bool(named)
        for images, classes in ((found.unnamed, shown - named), (found.unshown, named - shown)):
            if classes:
                images[dataset.ids[index]] = [dataset.classes[k] for k in sorted(classes)]
    return found


def _told(images: dict[str, list[str]], seen: int, one: str, other: str) -> str:
    image_id, classes = next(iter(images.items()))
    return (f"in {len(images)} of {seen} images the {one} classes that the {other}, such as "
            f"{', '.join(classes[:3])} in {image_id}")
