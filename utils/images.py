"""Reading images, whatever format their content has under their name."""
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import ImageError, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")
# What Pillow raises on damaged content, or on content that is no picture.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_image(path: str | Path) -> np.ndarray:
    """RGB uint8 (H, W, 3) of any picture Pillow reads: PNG, GIF (first frame), grey, palette, RGBA under any name.

    Transparent pixels are blended with white.  The EXIF orientation is not applied: masks are drawn on stored pixels.
    Raises UserError naming the file if it is missing, and ImageError if it cannot be decoded.
    """
    with _opened(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a PIL image of any mode, as `read_image`, or of an array (H, W, 3) or (H, W) uint8.

    Raises UserError for an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3:
            raise UserError(f"an image is a uint8 array (H, W, 3), RGB, or (H, W), grey, not {image.dtype} "
                            f"{image.shape}; convert it first")
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def image_size(path: str | Path) -> tuple[int, int]:
    """(H, W) from the header alone.  Raises like `read_image`."""
    with _opened(path) as image:
        return image.size[1], image.size[0]


def missing_image(path: str | Path) -> UserError:
    """The error that says that an image is missing."""
    return UserError(f"no image {path}; put it there or take its id out of the split file")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise missing_image(path) from None
    except DAMAGED as error:
        raise ImageError(f"cannot decode image {path} ({error}); replace the file or take its id out of the "
                         "split file") from None
