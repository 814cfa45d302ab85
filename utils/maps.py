"""Arithmetic on score maps (K, h, w) in numpy: resampling, background, foreground share. No torch, for CRF workers."""
import numpy as np
from PIL import Image


def capped_size(size, max_size):
    """(H, W) scaled down, keeping its shape, so that the long side is at most `max_size` pixels."""
    scale = min(1.0, max_size / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def grid_size(size, stride):
    """Pixels (H, W) -> cells of a grid whose first and last cells lie on the first and last pixels."""
    return tuple(max(2, round((side - 1) / stride) + 1) for side in size)


def snapped_size(size, stride):
    """(H, W) moved to the nearest stride*k + 1, where a network's grid corners lie exactly on the image's corners."""
    return tuple((side - 1) * stride + 1 for side in grid_size(size, stride))


def resize_image(image, size):
    """uint8 (H, W, 3) -> uint8 of `size`, antialiased bilinear."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_maps(maps, size):
    """float (K, h, w) -> float32 (K, *size), bilinear, corners on corners (`align_corners=True` in torch's words).

    A strided network's cell i looks at pixel i * stride, not at the middle of a block of pixels: the usual half-cell
    convention would shift every map by (stride - 1) / 2 pixels.
    """
    maps = np.asarray(maps, np.float32)
    (h, w), (out_h, out_w) = maps.shape[1:], size
    if (h, w) == (out_h, out_w):
        return maps
    top, left = _margin(h, out_h), _margin(w, out_w)
    box = (left, top, w - left, h - top)
    out = np.empty((len(maps), out_h, out_w), np.float32)  # of no maps too: an image may show no class
    for k, one in enumerate(maps):
        out[k] = Image.fromarray(one).resize((out_w, out_h), Image.Resampling.BILINEAR, box=box)
    return out


def _margin(cells, pixels):
    """Pillow maps the centres of pixels; this much off each end of its source box puts corners on corners."""
    return 0.5 - 0.5 * (cells - 1) / (pixels - 1) if pixels > 1 and pixels >= cells else 0.0


def with_background(cam, bg_alpha):
    """Prepend the background score (1 - max_k cam_k)^alpha (PSA, Sec. 3.1) and normalise each pixel to sum 1.

    cam: (K, h, w) in [0, 1].  Returns float32 (K + 1, h, w), row 0 background.
    """
    cam = np.clip(np.asarray(cam, np.float32), 0, 1)
    highest = cam.max(axis=0, initial=0.0)
    scores = np.concatenate([(1 - highest[None]) ** bg_alpha, cam])
    return scores / np.maximum(scores.sum(axis=0), 1e-8)


def foreground_share(probabilities, keys):
    """How strongly the best class outweighs the background: best / (best + background), and which class it is.

    probabilities: (K + 1, H, W).  keys: (K,) zero-based class indices of rows 1..K.
    Returns (share float32 in [0, 1], label uint8 = class + 1).  share >= 0.5 is the argmax over all rows, for any K.
    Without any class the share is 0 (and the label 1, which then stands for nothing).
    """
    if len(keys) == 0:
        return np.zeros(probabilities.shape[1:], np.float32), np.ones(probabilities.shape[1:], np.uint8)
    best = probabilities[1:].max(axis=0)
    label = (np.asarray(keys)[probabilities[1:].argmax(axis=0)] + 1).astype(np.uint8)
    return (best / np.maximum(best + probabilities[0], 1e-12)).astype(np.float32), label


def move_threshold(probabilities, bg_threshold):
    """Weigh background against foreground so that a share of `bg_threshold` becomes one of 0.5.

    The CRF settles each pixel for its most probable class; this puts the user's threshold where it draws the line.
    """
    weights = np.full(len(probabilities), 1 - bg_threshold, np.float32)
    weights[0] = bg_threshold
    moved = probabilities * np.maximum(weights, 1e-6)[:, None, None]
    return moved / np.maximum(moved.sum(axis=0), 1e-12)


def to_mask(probabilities, keys, bg_threshold):
    """uint8 (H, W): 0 where the foreground's share is below `bg_threshold`, else the best class + 1."""
    share, label = foreground_share(probabilities, keys)
    return np.where((share >= bg_threshold) & (len(keys) > 0), label, 0).astype(np.uint8)
