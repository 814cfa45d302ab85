"""Small pictures for a report, as text: photos as JPEG, label maps and heat maps as compressed bytes.  No torch."""
import base64
import io
import zlib

import numpy as np
from PIL import Image

from utils.grids import Size, capped_size

SIDE = 192       # long side of photos and label maps in pixels
HEAT_SIDE = 96   # of heat maps, which are smooth
LEVELS = 32      # of a heat map
QUALITY = 75     # of the JPEG

Layer = list[int | str]  # width, height, base64 of the zlib-compressed uint8 values, row by row


def photo(image: np.ndarray) -> str:
    """RGB uint8 (H, W, 3), small already -> base64 of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return _text(buffer.getvalue())


def labels(mask: np.ndarray) -> Layer:
    """uint8 (H, W) -> a layer of the same values, every n-th pixel of them."""
    return _layer(_sampled(mask, capped_size(mask.shape, SIDE)))


def heat(values: np.ndarray) -> Layer:
    """float (H, W) in [0, 1] -> a layer of the levels 0 to LEVELS - 1."""
    small = _sampled(values, capped_size(values.shape, HEAT_SIDE))
    return _layer((np.nan_to_num(small).clip(0, 1) * (LEVELS - 1)).round().astype(np.uint8))


def _sampled(values: np.ndarray, size: Size) -> np.ndarray:
    """Nearest pixels.  (H, W) -> size."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.int64) for old, new in zip(values.shape, size))
    return values[rows][:, columns]


def _layer(values: np.ndarray) -> Layer:
    height, width = values.shape
    return [width, height, _text(zlib.compress(np.ascontiguousarray(values), 4))]


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
