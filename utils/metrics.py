"""Streaming int64 confusion matrices and the scores computed from them.  numpy only: worker processes import this."""
from __future__ import annotations

import numpy as np

from utils.labels import IGNORE


def confusion(prediction: np.ndarray, truth: np.ndarray, classes: int, ignore: int = IGNORE) -> np.ndarray:
    """Count the pixels of one image by true and predicted class.

    prediction: (H, W) uint8, every value below `classes` (so 255 is an error too, also under an ignored truth).
    truth: (H, W) uint8, values below `classes`, or `ignore`, whose pixels are left out.
    classes: C, background included, 1..255.
    Returns (C, C) int64, rows truth, columns prediction.  Raises ValueError for another shape, dtype or value.
    """
    _check_labels("prediction", prediction, classes)
    _check_labels("truth", truth, classes, ignore)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth {truth.shape}; resize the prediction to the truth")
    counts = np.bincount(_pairs(truth, prediction), minlength=256 * 256).reshape(256, 256)
    counts[ignore] = 0  # counted and dropped: faster than picking the other pixels first
    return counts[:classes, :classes].astype(np.int64)


def scores(confusion: np.ndarray) -> dict[str, float | list[float | None]]:
    """Compute the scores of a confusion matrix.

    confusion: (C, C) integer, rows truth, columns prediction, class 0 the background; of one image or of a split.
    Returns a dict of plain Python values: `miou`, the mean IoU over the classes, background included, that occur in
    truth or prediction; `fg_iou`, see `foreground_iou`; `iou`, the IoU of each class; `pixel_accuracy`.
    A class in neither truth nor prediction has no IoU: None in `iou`, left out of `miou`. Without any pixel the other
    values are NaN.
    Raises ValueError if the matrix is not a square of integers.
    """
    counts = _check_confusion(confusion)
    hit = np.diag(counts)
    iou = _ratio(hit, counts.sum(axis=0) + counts.sum(axis=1) - hit)  # (C,)
    present = iou[~np.isnan(iou)]
    return {
        "miou": float(present.mean()) if present.size else float("nan"),
        "fg_iou": foreground_iou(counts),
        "iou": [None if np.isnan(value) else float(value) for value in iou],
        "pixel_accuracy": float(_ratio(hit.sum(), counts.sum())),
    }


def foreground_iou(confusion: np.ndarray) -> float:
    """Class-agnostic IoU of the foreground: any class but 0 counts as the same.

    confusion: (C, C) integer, rows truth, columns prediction; of one image, for a mean over images, or of a split.
    Returns a float, NaN where neither truth nor prediction has foreground.  Raises ValueError as `scores` does.
    """
    counts = _check_confusion(confusion)
    return float(_ratio(counts[1:, 1:].sum(), counts.sum() - counts[0, 0]))


def central_box(height: int, width: int, ratio: float = 0.6) -> np.ndarray:
    """A reference mask that does not depend on the image: a central box.

    height, width: pixels, at least 1.  ratio: of the box's sides to the image's, in (0, 1].
    Returns (H, W) bool, true inside; each side is rounded to whole pixels, at least one.
    Raises ValueError for an empty image or a ratio outside (0, 1].
    """
    if height < 1 or width < 1 or not 0 < ratio <= 1:
        raise ValueError(f"no central box of ratio {ratio} in {height} x {width}; give sides >= 1, a ratio in (0, 1]")
    box = np.zeros((height, width), dtype=bool)
    rows, columns = max(1, round(height * ratio)), max(1, round(width * ratio))
    top, left = (height - rows) // 2, (width - columns) // 2
    box[top : top + rows, left : left + columns] = True
    return box


class SweepHistogram:
    """Confusion matrices at every foreground threshold, from one pass over each image.

    At threshold t, a pixel whose foreground probability is at least t gets its best foreground class, any other is
    background. The histogram counts pixels by the number of thresholds they reach, so every matrix equals, exactly, the
    one counted at that threshold.

    classes: C, background included, 2..255.  bins: T thresholds, evenly from 0 to 1, at least 2.
    Memory: (T + 1) C^2 int64 counts, 5 MB at C = 81 and T = 101.
    Raises ValueError for other classes or bins.
    """

    def __init__(self, classes: int, bins: int = 101):
        if not 2 <= classes <= IGNORE or bins < 2:
            raise ValueError(f"classes is {classes} and bins {bins}; give 2..{IGNORE} classes and 2 bins or more")
        self.classes = classes
        # float32, as the probabilities: 0.3 then selects the same pixels here and in numpy's `probability >= 0.3`.
        self._thresholds = np.linspace(0, 1, bins).astype(np.float32)
        # Axes: number of thresholds reached, truth, best foreground class.
        self.counts = np.zeros((bins + 1, classes, classes), dtype=np.int64)
        self.iou_sum = np.zeros(bins)
        self.iou_images = np.zeros(bins, dtype=np.int64)

    def thresholds(self) -> np.ndarray:
        """Return the (T,) float32 thresholds, ascending from 0 to 1."""
        return self._thresholds.copy()

    def update(self, probability: np.ndarray, foreground_class: np.ndarray, truth: np.ndarray) -> None:
        """Count one image.

        probability: (H, W) float32 or float64 in [0, 1], of foreground (see `utils.maps.foreground_probability`).
        foreground_class: (H, W) uint8, the best foreground label of each pixel, 1..C-1.
        truth: (H, W) uint8, values below C, or 255, whose pixels are left out.
        Raises ValueError for another shape, dtype or value.
        """
        self.add_image(self.count(probability, foreground_class, truth))

    def count(self, probability: np.ndarray, foreground_class: np.ndarray,
              truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The counts of one image for `add_image`, without adding them; arguments and errors as of `update`.

        Returns (cells (M,), counts (M,), iou (T,)): positions in the flattened histogram, the number of pixels at each,
        and the image's foreground IoU at each threshold.  An image shows few classes: with COCO's 81, a whole histogram
        has 5 MB, these some KB.
        """
        self._check(probability, foreground_class, truth)
        pair = _pairs(truth, foreground_class)
        present = np.flatnonzero(np.bincount(pair, minlength=256 * 256))
        place = np.zeros(256 * 256, np.int64)
        place[present] = np.arange(len(present))
        cell = self._reached(probability.ravel()) * len(present) + place[pair]
        counts = np.bincount(cell, minlength=len(self.counts) * len(present)).reshape(-1, len(present))
        kept = present >> 8 != IGNORE
        counts, truths, labels = counts[:, kept], present[kept] >> 8, present[kept] & 255
        reached, which = counts.nonzero()
        cells = (reached * self.classes + truths[which]) * self.classes + labels[which]
        return cells, counts[reached, which], _image_iou(counts, truths)

    def _reached(self, probability: np.ndarray) -> np.ndarray:
        """How many thresholds are at most a probability: (N,) -> int64 (N,).

        As they are even, rounding finds the last of them up to one; a binary search takes up to ten times as long.
        """
        last = len(self._thresholds) - 1
        index = (probability * np.float32(last)).astype(np.int64)
        index += np.append(self._thresholds, np.float32(2))[index + 1] <= probability
        index -= self._thresholds[index] > probability
        return index + 1

    def add_image(self, counted: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Add what `count` returned, here or in another process, of a histogram with the same classes and bins."""
        cells, counts, iou = counted
        self.counts.reshape(-1)[cells] += counts
        self.iou_sum += np.nan_to_num(iou)
        self.iou_images += ~np.isnan(iou)

    def add(self, other: SweepHistogram) -> None:
        """Add the counts of another histogram, for instance of another rank's images.

        Raises ValueError if its classes or bins differ.
        """
        if self.counts.shape != other.counts.shape:
            mine, its = self.counts.shape, other.counts.shape
            raise ValueError(f"cannot add histograms of {mine} and {its}; use the same classes and bins")
        self.counts += other.counts
        self.iou_sum += other.iou_sum
        self.iou_images += other.iou_images

    def confusions(self) -> np.ndarray:
        """Return the (T, C, C) int64 confusion matrices, one for each threshold, rows truth, columns prediction."""
        foreground = _reaching(self.counts)  # (T, C, C)
        background = self.counts.sum(axis=(0, 2)) - foreground.sum(axis=2)  # (T, C)
        foreground[:, :, 0] = background  # empty so far: no pixel's best foreground class is 0
        return foreground

    def mean_image_fg_iou(self) -> np.ndarray:
        """Return the (T,) mean over images of each image's foreground IoU, NaN at a threshold where no image has one.

        Images without foreground, in truth and prediction, are left out.
        """
        return _ratio(self.iou_sum, self.iou_images)

    def oracle(self, key: str = "miou") -> tuple[float, dict]:
        """Find the threshold with the best score: an oracle, to be reported apart from the score at a fixed threshold.

        key: `miou`, `fg_iou`, `pixel_accuracy` or `image_fg_iou` (the mean over images).
        Returns (threshold, scores): a float, the lowest of equally good ones, and the dict of `scores` there with
        `image_fg_iou` added.  Raises ValueError for another key, or if the score is NaN everywhere (no image counted).
        """
        table = [scores(matrix) for matrix in self.confusions()]
        for entry, image_iou in zip(table, self.mean_image_fg_iou()):
            entry["image_fg_iou"] = float(image_iou)
        if key not in ("miou", "fg_iou", "pixel_accuracy", "image_fg_iou"):
            raise ValueError(f"no score {key!r} to choose by; use miou, fg_iou, pixel_accuracy or image_fg_iou")
        values = np.array([entry[key] for entry in table])
        if np.isnan(values).all():
            raise ValueError(f"{key} is undefined at every threshold; count images with update() first")
        best = int(np.nanargmax(values))
        return float(str(self._thresholds[best])), table[best]  # 0.3, not 0.30000001192: the same float32

    def _check(self, probability: np.ndarray, foreground_class: np.ndarray, truth: np.ndarray) -> None:
        _check_labels("foreground_class", foreground_class, self.classes)
        _check_labels("truth", truth, self.classes, IGNORE)
        if not probability.shape == foreground_class.shape == truth.shape:
            shapes = f"probability {probability.shape}, foreground_class {foreground_class.shape}, truth {truth.shape}"
            raise ValueError(f"shapes differ: {shapes}; resize them to the truth")
        if probability.dtype not in (np.float32, np.float64) or not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError(f"probability ({probability.dtype}) must be float32 or float64, in [0, 1]; normalise it")
        if (foreground_class == 0).any():
            raise ValueError("foreground_class has 0, the background; give every pixel its best label of 1..C-1")


def _pairs(truth: np.ndarray, label: np.ndarray) -> np.ndarray:
    """256 * truth + label of each pixel, uint16 (N,), of two uint8 (H, W)."""
    pairs = truth.astype(np.uint16)
    pairs <<= 8
    pairs |= label
    return pairs.ravel()


def _image_iou(counts: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """(T,) foreground IoU of an image.  counts: (T + 1, pairs of truth and label).  truths: of the pairs."""
    foreground = _reaching(counts)  # (T, pairs) pixels predicted foreground
    real = truths > 0
    # The union: true foreground, and background predicted as foreground.
    return _ratio(foreground[:, real].sum(axis=1), counts[:, real].sum() + foreground[:, ~real].sum(axis=1))


def _reaching(counts: np.ndarray) -> np.ndarray:
    """Sum, for each threshold, the counts of the pixels that reach it: (T + 1, ...) -> (T, ...)."""
    return counts[:0:-1].cumsum(axis=0)[::-1]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


def _check_labels(name: str, labels: np.ndarray, classes: int, ignore: int | None = None) -> None:
    if not 1 <= classes <= IGNORE:
        raise ValueError(f"classes is {classes}; give 1..{IGNORE}, background included")
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"{name} is {labels.dtype} {labels.shape}; give uint8 (H, W)")
    over = labels >= classes
    if ignore is not None:
        over &= labels != ignore
    wrong = labels[over]
    if wrong.size:
        allowed = f"0..{classes - 1}" + ("" if ignore is None else f" or {ignore} (ignore)")
        raise ValueError(
            f"{name} has {wrong.size} pixels of value {wrong[0]}, allowed are {allowed}; "
            "check the number of classes, and that the file holds labels"
        )


def _check_confusion(confusion: np.ndarray) -> np.ndarray:
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.dtype.kind not in "iu":
        raise ValueError(f"a confusion matrix is a square of integers, not {counts.dtype} {counts.shape}")
    return counts


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the area under the precision-recall curve (mAP); classes without a positive are left out.

    scores: (N, K) float.  labels: (N, K) in {0, 1}.  Returns a float in [0, 1], NaN if no class has a positive.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(np.asarray(labels, np.float64), order, axis=0)  # (N, K), best score first
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    positives = hits.sum(axis=0)
    areas = ((precision * hits).sum(axis=0) / np.maximum(positives, 1))[positives > 0]
    return float(areas.mean()) if areas.size else float("nan")
