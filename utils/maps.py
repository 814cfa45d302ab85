"""Arithmetic on score maps (K, h, w) in numpy: background score, foreground probability, threshold.  No torch."""
from collections.abc import Sequence

import numpy as np


def with_background(cam: np.ndarray, bg_alpha: float) -> np.ndarray:
    """Prepend the background score (1 - max_k cam_k)^alpha (PSA, Sec. 3.1) and normalise each pixel to sum 1.

    cam: (K, h, w) float, clipped to [0, 1].  Returns float32 (K + 1, h, w), row 0 background.
    """
    cam = np.clip(np.asarray(cam, np.float32), 0, 1)
    highest = cam.max(axis=0, initial=0.0)
    scores = np.concatenate([(1 - highest[None]) ** bg_alpha, cam])
    return scores / np.maximum(scores.sum(axis=0), 1e-8)


def foreground_probability(probabilities: np.ndarray, keys: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each pixel's best class against background, best / (best + background), and that class's label.

    probabilities: (K + 1, H, W) float, row 0 background.  keys: (K,) zero-based class indices of rows 1..K.
    Returns (probability float32 (H, W) in [0, 1], label uint8 (H, W) = class + 1).  Where the probability is at least
    0.5, the label is the argmax over all rows.  Without any class, the probability is 0 and the label a meaningless 1.
    """
    if len(keys) == 0:
        return np.zeros(probabilities.shape[1:], np.float32), np.ones(probabilities.shape[1:], np.uint8)
    best = probabilities[1:].max(axis=0)
    label = (np.asarray(keys)[probabilities[1:].argmax(axis=0)] + 1).astype(np.uint8)
    return (best / np.maximum(best + probabilities[0], 1e-12)).astype(np.float32), label


def move_threshold(probabilities: np.ndarray, bg_threshold: float) -> np.ndarray:
    """Reweight background and foreground so that a foreground probability of `bg_threshold` becomes 0.5.

    The CRF decides by the most probable class, that is, at 0.5; this makes it decide at the user's threshold.
    probabilities: (K + 1, H, W) float.  bg_threshold: in [0, 1].  Returns the same shape, each pixel summing to 1.
    """
    weights = np.full(len(probabilities), 1 - bg_threshold, np.float32)
    weights[0] = bg_threshold
    moved = probabilities * np.maximum(weights, 1e-6)[:, None, None]
    return moved / np.maximum(moved.sum(axis=0), 1e-12)


def to_mask(probabilities: np.ndarray, keys: Sequence[int], bg_threshold: float) -> np.ndarray:
    """uint8 (H, W): the best class + 1 where the foreground probability is at least `bg_threshold`, else 0."""
    probability, label = foreground_probability(probabilities, keys)
    return np.where((probability >= bg_threshold) & (len(keys) > 0), label, 0).astype(np.uint8)
