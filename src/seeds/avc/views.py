"""The second view of a batch: how it is cut from the images, and how its cells are carried back to theirs."""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from utils.grids import Size

CELL = 16                         # crops are CELL * k + 1 pixels wide, so are the windows and the views
LEAST, ZOOM = 0.6, (0.75, 1.25)   # least side of a window in crops, and how much it is scaled
COLOUR = (0.2, 0.2)               # how far contrast and brightness go, in standard deviations of ImageNet


@dataclass(frozen=True)
class View:
    """How a second view is cut from images.  window: (top, left, height, width) in pixels.  size: after scaling."""
    window: tuple[int, int, int, int]
    size: Size
    flip: bool


def draw_view(size: Size) -> View:
    """A View of images of `size`, both sides CELL * k + 1, from torch's global generator."""
    cells = [(side - 1) // CELL for side in size]
    extent = [max(1, round(count * (LEAST + (1 - LEAST) * float(torch.rand(()))))) for count in cells]
    start = [int(torch.randint(count - part + 1, ())) for count, part in zip(cells, extent)]
    zoom = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * float(torch.rand(()))
    scaled = [min(count, max(1, round(part * zoom))) for count, part in zip(cells, extent)]
    return View((start[0] * CELL, start[1] * CELL, extent[0] * CELL + 1, extent[1] * CELL + 1),
                tuple(part * CELL + 1 for part in scaled), bool(torch.rand(()) < 0.5))


def valid_pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool: pixels that are no padding, which is exactly 0; no 8-bit colour is, once normalised."""
    return (images != 0).any(dim=1, keepdim=True)


def cut(images: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """The second view of images (B, 3, H, W): window, scale, flip and other colours; padding stays 0.

    Returns (images, pixels that are no padding (B, 1, h, w) bool).
    """
    top, left, height, width = view.window
    part = images[:, :, top:top + height, left:left + width]
    valid = valid_pixels(part)
    if part.shape[-2:] != view.size:
        part = F.interpolate(part, size=view.size, mode="bilinear", align_corners=True, antialias=True)
        # A pixel that padding has been mixed into is neither.
        valid = F.interpolate(valid.float(), size=view.size, mode="bilinear", align_corners=True) > 0.999
    if view.flip:
        part, valid = part.flip(-1), valid.flip(-1)
    draws = torch.rand(2, len(part), 3, 1, 1, device="cpu").to(part, non_blocking=True) * 2 - 1
    part = part * (1 + COLOUR[0] * draws[0, :, :1]) + COLOUR[1] * draws[1]
    last = images.is_contiguous(memory_format=torch.channels_last)
    return (part * valid).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), valid


def valid_cells(valid: torch.Tensor, grid: Size) -> torch.Tensor:
    """(B, N) bool: cells of a grid whose own pixel is no padding.  valid: (B, 1, H, W) bool.  grid: (h, w)."""
    rows, columns = (torch.linspace(0, side - 1, count).round().long().to(valid.device, non_blocking=True)
                     for side, count in zip(valid.shape[-2:], grid))
    return valid[:, 0][:, rows][:, :, columns].flatten(1)


def carrier(source: Size, target: Size, size: Size, view: View, device: torch.device | str = "cpu") -> torch.Tensor:
    """The matrix M that carries a view's cells back to its image's grid: maps x become x M^T, A becomes M A M^T.

    source: (h, w), the view's grid.  target: (H, W), the image's.  size: of the image in pixels.  device: of M.
    Grids lie corners on corners. Returns M (H*W, h*w) float32: bilinear weights of sum 1, or 0 for a cell outside the
    window. Where cells meet cells each row is a single 1: such flips and crops are undone without loss.
    """
    rows = _weights(source[0], target[0], size[0], view.window[0], view.window[2])
    columns = _weights(source[1], target[1], size[1], view.window[1], view.window[3])
    if view.flip:
        columns = columns.flip(1)
    # M is made on the device: only its two small factors are copied there, so that nothing waits for it.
    return torch.kron(rows.to(device, non_blocking=True), columns.to(device, non_blocking=True))


def _weights(source: int, target: int, size: int, start: int, extent: int) -> torch.Tensor:
    """Bilinear weights (target, source) along one axis of `carrier`."""
    at = (torch.linspace(0, size - 1, target, dtype=torch.float64) - start) * (source - 1) / (extent - 1)
    at = torch.where((at - at.round()).abs() < 1e-6, at.round(), at)
    inside = (at >= 0) & (at <= source - 1)
    low = at.floor().long().clamp(0, source - 2)
    part = torch.where(inside, at - low, 0).float()
    weights = torch.zeros(target, source)
    rows = torch.arange(target)
    weights[rows, low] = 1 - part
    weights[rows, low + 1] = part
    return weights * inside[:, None]
