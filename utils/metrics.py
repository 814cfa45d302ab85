"""Streaming int64 confusion matrices and what is read off them. numpy only: worker processes import this file."""

import numpy as np

from utils.labels import IGNORE


def confusion(prediction, truth, classes, ignore=IGNORE):
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
    kept = truth != ignore
    pair = truth[kept].astype(np.int64) * classes + prediction[kept]
    return np.bincount(pair, minlength=classes**2).reshape(classes, classes).astype(np.int64, copy=False)  # (C, C)


def scores(confusion):
    """Read the scores off a confusion matrix.

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


def foreground_iou(confusion):
    """IoU of foreground (any class but 0) against background, whatever the classes are.

    confusion: (C, C) integer, rows truth, columns prediction; of one image, for a mean over images, or of a split.
    Returns a float, NaN where neither truth nor prediction has foreground.  Raises ValueError as `scores` does.
    """
    counts = _check_confusion(confusion)
    return float(_ratio(counts[1:, 1:].sum(), counts.sum() - counts[0, 0]))


def central_box(height, width, share=0.6):
    """Draw the reference mask that knows nothing of the image: a central box.

    height, width: pixels, at least 1.  share: of each side, in (0, 1].
    Returns (H, W) bool, true inside; each side is rounded to whole pixels, at least one.
    Raises ValueError for an empty image or a share outside (0, 1].
    """
    if height < 1 or width < 1 or not 0 < share <= 1:
        raise ValueError(f"no central box of share {share} in {height} x {width}; give sides >= 1, a share in (0, 1]")
    box = np.zeros((height, width), dtype=bool)
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top, left = (height - rows) // 2, (width - columns) // 2
    box[top : top + rows, left : left + columns] = True
    return box


class SweepHistogram:
    """Confusion matrices at every background threshold, from one pass over each image.

    A pixel is foreground at threshold t where its share >= t, and then has its best foreground class; otherwise it is
    background. The histogram counts pixels by the number of thresholds they reach, so every matrix equals, exactly, the
    one counted at that threshold.

    classes: C, background included, 2..255.  bins: T thresholds, evenly from 0 to 1, at least 2.
    Memory: (T + 1) C^2 int64 counts, 5 MB at C = 81 and T = 101.
    """

    def __init__(self, classes, bins=101):
        if not 2 <= classes <= IGNORE or bins < 2:
            raise ValueError(f"classes is {classes} and bins {bins}; give 2..{IGNORE} classes and 2 bins or more")
        self.classes = classes
        # float32, as the shares: 0.3 then means the same pixels here and in `share >= 0.3` of numpy or torch.
        self._thresholds = np.linspace(0, 1, bins).astype(np.float32)
        # Axes: number of thresholds reached, truth, best foreground class.
        self.counts = np.zeros((bins + 1, classes, classes), dtype=np.int64)
        self.iou_sum = np.zeros(bins)
        self.iou_images = np.zeros(bins, dtype=np.int64)

    def thresholds(self):
        """Return the (T,) float32 thresholds, ascending from 0 to 1."""
        return self._thresholds.copy()

    def update(self, share, foreground_class, truth):
        """Count one image.

        share: (H, W) float32 or float64 in [0, 1], the foreground's share of each pixel's score.
        foreground_class: (H, W) uint8, the best foreground label of each pixel, 1..C-1.
        truth: (H, W) uint8, values below C, or 255, whose pixels are left out.
        Raises ValueError for another shape, dtype or value.
        """
        self.add_image(self.count(share, foreground_class, truth))

    def count(self, share, foreground_class, truth):
        """The counts of one image for `add_image`, without adding them; arguments and errors as of `update`.

        Returns (cells (M,), counts (M,), iou (T,)): positions in the flattened histogram, how often, the image's
        foreground IoU.  An image has a few classes: of COCO's 81, the whole histogram would hold 5 MB, these some KB.
        """
        self._check(share, foreground_class, truth)
        kept = truth != IGNORE
        reached = np.searchsorted(self._thresholds, share[kept], side="right")  # thresholds t <= share
        truths, place = _compact(truth[kept])
        labels, label = _compact(foreground_class[kept])
        shape = (len(self.counts), len(truths), len(labels))
        cell = (reached * len(truths) + place) * len(labels) + label
        counts = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
        found = counts.nonzero()
        cells = (found[0] * self.classes + truths[found[1]]) * self.classes + labels[found[2]]
        return cells, counts[found], _image_iou(counts, truths)

    def add_image(self, counted):
        """Add what `count` returned for an image, perhaps in another process, with the same classes and bins."""
        cells, counts, iou = counted
        self.counts.reshape(-1)[cells] += counts
        self.iou_sum += np.nan_to_num(iou)
        self.iou_images += ~np.isnan(iou)

    def add(self, other):
        """Add the counts of another histogram, for instance of another process's images.

        Raises ValueError if its classes or bins differ.
        """
        if self.counts.shape != other.counts.shape:
            mine, its = self.counts.shape, other.counts.shape
            raise ValueError(f"cannot add histograms of {mine} and {its}; use the same classes and bins")
        self.counts += other.counts
        self.iou_sum += other.iou_sum
        self.iou_images += other.iou_images

    def confusions(self):
        """Return the (T, C, C) int64 confusion matrices, one for each threshold, rows truth, columns prediction."""
        foreground = _reaching(self.counts)  # (T, C, C)
        background = self.counts.sum(axis=(0, 2)) - foreground.sum(axis=2)  # (T, C)
        foreground[:, :, 0] = background  # empty so far: no pixel's best foreground class is 0
        return foreground

    def mean_image_fg_iou(self):
        """Return the (T,) mean over images of each image's foreground IoU; images without any foreground are left out.

        NaN at a threshold where no image is left.
        """
        return _ratio(self.iou_sum, self.iou_images)

    def oracle(self, key="miou"):
        """Find the threshold with the best score: an oracle's choice, to be told apart from a fixed threshold's score.

        key: `miou`, `fg_iou`, `pixel_accuracy` or `image_fg_iou` (the mean over images).
        Returns (threshold, scores): a float, the lowest one of equals, and the dict of `scores` there with
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

    def _check(self, share, foreground_class, truth):
        _check_labels("foreground_class", foreground_class, self.classes)
        _check_labels("truth", truth, self.classes, IGNORE)
        if not share.shape == foreground_class.shape == truth.shape:
            shapes = f"share {share.shape}, foreground_class {foreground_class.shape}, truth {truth.shape}"
            raise ValueError(f"shapes differ: {shapes}; resize them to the truth")
        if share.dtype not in (np.float32, np.float64) or not ((share >= 0) & (share <= 1)).all():
            raise ValueError(f"share ({share.dtype}) must be float32 or float64, and in [0, 1]; divide by the total")
        if (foreground_class == 0).any():
            raise ValueError("foreground_class has 0, the background; give every pixel its best label of 1..C-1")


def _compact(labels):
    """(the values that occur, ascending; the position of each label among them), of uint8 labels (N,)."""
    values = np.flatnonzero(np.bincount(labels, minlength=256))
    table = np.zeros(256, np.int64)
    table[values] = np.arange(len(values))
    return values, table[labels]


def _image_iou(counts, truths):
    """(T,) foreground IoU of an image.  counts: (T + 1, truths, foreground classes).  truths: their values."""
    foreground = _reaching(counts.sum(axis=2))  # (T, truths) pixels predicted foreground, by truth
    real = truths > 0
    # The union: true foreground, and background taken for it.
    return _ratio(foreground[:, real].sum(axis=1), counts[:, real].sum() + foreground[:, ~real].sum(axis=1))


def _reaching(counts):
    """Sum, for each threshold, the counts of the pixels that reach it: (T + 1, ...) -> (T, ...)."""
    return counts[:0:-1].cumsum(axis=0)[::-1]


def _ratio(numerator, denominator):
    """Divide, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


def _check_labels(name, labels, classes, ignore=None):
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
            f"check the number of classes, and that the file holds labels"
        )


def _check_confusion(confusion):
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.dtype.kind not in "iu":
        raise ValueError(f"a confusion matrix is a square of integers, not {counts.dtype} {counts.shape}")
    return counts


def average_precision(scores, labels):
    """Mean over classes of the area under the precision-recall curve; classes without a positive are left out.

    scores: (N, K) float.  labels: (N, K) in {0, 1}.  Returns a float in [0, 1], NaN if no class has a positive.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(np.asarray(labels, np.float64), order, axis=0)  # (N, K), best score first
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    positives = hits.sum(axis=0)
    areas = ((precision * hits).sum(axis=0) / np.maximum(positives, 1))[positives > 0]
    return float(areas.mean()) if areas.size else float("nan")
