"""Every resampling of an image, a label map or a score map.

Score maps are resampled corners on corners, up and down: the first and the last cell of each axis stay where they are
(`align_corners=True` in PyTorch's words). Cell i of a strided network looks at pixel i * stride, not at the middle of a
block of pixels: the half-cell convention would shift every map by (stride - 1) / 2 pixels. Inputs are resized to
k * stride + 1 pixels, so that the corners of every grid lie on the corners of the image.
Images, and label maps with them, are resampled as pictures, each pixel an area: corners then move by at most half a
pixel. Aligning these too was tried, and made the seeds of the toy data spread worse (docs/experiments.md).
numpy and Pillow alone at the top: CRF workers import this file.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]  # (height, width)


def capped_size(size: Size, max_size: int) -> Size:
    """(H, W) scaled down, keeping its shape, so that the long side is at most `max_size` pixels."""
    scale = min(1.0, max_size / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def largest_view(max_size: int, scales: Iterable[float]) -> float:
    """Pixels of the long side of the largest view of an image capped at `max_size`, itself included."""
    return max_size * max(1, *scales)


def grid_size(size: Size, stride: int) -> Size:
    """Pixels (H, W) -> cells of a grid whose first and last cells lie on the first and last pixels."""
    return tuple(max(2, round((side - 1) / stride) + 1) for side in size)


def snapped_size(size: Size, stride: int) -> Size:
    """(H, W) moved to the nearest k * stride + 1, where the grid's corners lie exactly on the image's corners."""
    return tuple((side - 1) * stride + 1 for side in grid_size(size, stride))


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 of `size`: bilinear, with antialiasing where it shrinks."""
    return image if image.shape[:2] == tuple(size) else _resize(image, size, Image.Resampling.BILINEAR)


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (H, W) -> uint8 of `size`, nearest neighbour, placed as `resize_image` places its image."""
    return labels if labels.shape == tuple(size) else _resize(labels, size, Image.Resampling.NEAREST)


def _resize(picture: np.ndarray, size: Size, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), method))


def resize_maps(maps: np.ndarray, size: Size, rows: tuple[int, int] | None = None) -> np.ndarray:
    """float (K, h, w) -> float32 (K, *size): bilinear, with antialiasing where it shrinks.

    rows: (first, end) of the new rows that are wanted, float32 (K, end - first, W); left out, all.
    """
    maps = np.asarray(maps, np.float32)
    first, end = rows or (0, size[0])
    if maps.shape[1:] == tuple(size):
        return maps[:, first:end]
    out = np.empty((len(maps), end - first, size[1]), np.float32)  # of no maps too: an image may show no class
    for k, one in enumerate(maps):
        out[k] = _corner_aligned(one, size, first, end)
    return out


def resize_tensor(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """float (B, C, h, w) -> (B, C, *size) on its device: bilinear, without antialiasing."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    from torch.nn.functional import interpolate
    return interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _corner_aligned(one: np.ndarray, size: Size, first: int, end: int) -> np.ndarray:
    """Rows `first` to `end` of a map (h, w) at another size.

    By Pillow, whose source box is set so that the centres of the outer cells meet.

    Where a map shrinks, the filter reaches beyond its edges: the outer cells are repeated there.
    """
    margins = [_margin(old, new) for old, new in zip(one.shape, size)]
    pads = [int(np.ceil(1 - 2 * margin)) if margin < 0 else 0 for margin in margins]  # the new pixels' spacing
    (top, left), (height, width) = (pad + margin for pad, margin in zip(pads, margins)), one.shape
    one = np.pad(one, [(pad, pad) for pad in pads], mode="edge") if any(pads) else one
    row = (height - 2 * margins[0]) / size[0]  # height of a new row in old ones
    box = (left, top + first * row, left + width - 2 * margins[1], top + end * row)
    return np.asarray(Image.fromarray(one).resize((size[1], end - first), Image.Resampling.BILINEAR, box=box))


def _margin(old: int, new: int) -> float:
    """How far inside the edge of the first pixel (outside if negative) the source box begins, in source pixels.

    Pillow spreads the box evenly over the new pixels: the first one's centre is half a new pixel from the box's edge.
    """
    if new == 1 or old == 1:
        return 0.0
    return 0.5 - 0.5 * (old - 1) / (new - 1)
