"""Label maps: the value that stands for no label, and the palette PNG they are kept in."""
import functools
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import atomic_path
from utils.images import DAMAGED

IGNORE = 255


@functools.cache
def voc_palette() -> np.ndarray:
    """The colour map of PASCAL VOC.  Returns (256, 3) uint8, read-only; row k is the colour of mask value k.

    Bits 0, 1, 2 of the index are the top bits of red, green, blue, bits 3, 4, 5 the next ones, and so on.
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * level + channel) & 1) << (7 - level)).astype(np.uint8)
    palette.flags.writeable = False
    return palette


def save_mask(path: str | Path, mask: np.ndarray) -> None:
    """Write a mask as an 8-bit palette PNG in VOC colours; the file appears whole or not at all.

    mask: (H, W) integers in 0..255: 0 background, class k = k + 1, 255 ignore.
    Raises ValueError for another shape, dtype or range: a float mask is a score map, which a cast would truncate.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or mask.size == 0:
        raise ValueError(f"{path}: a mask is (H, W) integers, not {mask.shape} {mask.dtype}")
    if mask.min() < 0 or mask.max() > 255:
        raise ValueError(f"{path}: mask values must lie in 0..255, not {mask.min()}..{mask.max()}")
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def read_mask(path: str | Path) -> np.ndarray:
    """Read the indices of an 8-bit palette or grey picture.  Returns (H, W) uint8.

    Raises UserError if the file is missing or damaged, or if it holds colours instead of indices.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("P", "L"):
                return np.array(image, dtype=np.uint8)
            mode = image.mode
    except FileNotFoundError:
        raise UserError(f"no mask {path}; run the step that writes it, or name another folder") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than 178 megapixels; pass --large_images if it is meant") from None
    except DAMAGED as error:
        raise UserError(f"cannot decode {path} ({error}); replace the file, or delete it and make it again") from None
    raise UserError(f"{path} has mode {mode}, but labels are an 8-bit palette or grey picture of class indices; map "
                    "its colours to indices, and write them with utils.labels.save_mask")
