"""Reading images, whatever format their content has under their name."""
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from utils.errors import ImageError, UserError

# Of the formats that Pillow reads, in lower case; a file counts with its suffix in any case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jpe", ".jfif", ".avif", ".apng",
            ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga")
# What Pillow raises on damaged content, or on content that is no picture.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
LARGE = "WSSS_LARGE_IMAGES"  # in the environment, so that worker processes know too
# Whether to apply an EXIF orientation, or a function (stored size (H, W), orientation) -> bool, asked if there is one.
Displayed = bool | Callable[[tuple[int, int], int], bool]
AS_STORED = 1  # EXIF orientation of an image that is shown as it is stored

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half of what is refused
if LARGE in os.environ:
    Image.MAX_IMAGE_PIXELS = None


def allow_large_images() -> None:
    """Read pictures of more than 178 megapixels too, in this process and in those that it starts."""
    os.environ[LARGE] = "1"
    Image.MAX_IMAGE_PIXELS = None


def is_image_name(name: str) -> bool:
    """Whether a file's name is that of an image: of a suffix in `SUFFIXES`, and not hidden (macOS's ._a.jpg)."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def read_image(path: str | Path, displayed: Displayed = False) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a picture, see `read_reduced`."""
    return read_reduced(path, None, displayed)[0]


def read_reduced(path: str | Path, used: float | None, displayed: Displayed = False
                 ) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture for a use that shrinks it: (RGB uint8 (h, w, 3), its full size (H, W)).

    Takes any picture that Pillow reads: PNG, GIF (first frame), grey, palette, RGBA under any name.
    used: pixels of the long side that it will be shrunk to. It comes 2, 4 or 8 times as small as in the file if that
    still leaves twice as many; a JPEG is then decoded at that size, which takes a fraction of the time and memory.
    None: full size.
    displayed: whether to apply the EXIF orientation, as a viewer does; else pixels are as stored.
    Transparent pixels are blended with white; more than 8 bits a pixel: see `eight_bits`.
    Raises UserError naming the file if it is missing, and ImageError if it cannot be decoded.
    """
    with _opened(path) as image:
        applied, (width, height) = _applied(image, displayed), image.size
        factor = next((n for n in (8, 4, 2) if used is not None and max(image.size) >= 2 * n * used), 1)
        if factor > 1:
            image.draft(None, (width // factor, height // factor))  # of a JPEG; else nothing
        pixels = _rgb(image)
        if factor > 1 and image.size == (width, height):
            pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
        return turned(pixels, applied), (width, height) if applied >= 5 else (height, width)


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a PIL image of any mode, or of an array (H, W, 3) or (H, W) uint8.

    A PIL image with an EXIF orientation is turned as a viewer displays it.  Arrays stay as they are, such as the photos
    of datasets, which `read_image` reads.
    Raises UserError for anything else, for an array of another shape or type, and for values that mean no picture.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3:
            raise UserError(f"an image is a uint8 array (H, W, 3), RGB, or (H, W), grey, not {image.dtype} "
                            f"{image.shape}; convert it first")
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    if not isinstance(image, Image.Image):
        raise UserError(f"an image is a PIL image or a uint8 array, not a {type(image).__name__}; open a file by "
                        "PIL.Image.open, or convert it to an array first")
    try:
        return turned(_rgb(image), orientation(image))
    except ValueError as error:
        raise UserError(f"{error}; convert the image first") from None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits as uint8, by the picture's largest one.

    Whole numbers up to 255 stay; up to 4095 they count as 12 bits, up to 65535 as 16.  Floats up to 1 are shares of
    white, up to 255 they stay.  Raises ValueError for others.
    """
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    whole = values.dtype.kind in "iu"
    if not (low >= 0 and high <= (65535 if whole else 255)):  # so NaN is refused too
        raise ValueError(f"its grey values, {low} to {high}, are neither of 8, 12 or 16 bits nor floats up to 1 or 255")
    if whole:
        return (values >> (0 if high <= 255 else 4 if high <= 4095 else 8)).astype(np.uint8)
    return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)


# --- orientation -----------------------------------------------------------------------------------------------------

def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; AS_STORED if it has none, or a damaged one."""
    if "exif" not in image.info:  # of TIFF, Pillow turns the pixels itself
        return AS_STORED
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, AS_STORED)
    except Exception:  # on damaged EXIF Pillow raises nearly anything
        return AS_STORED
    return found if found in range(1, 9) else AS_STORED


def _applied(image: Image.Image, displayed: Displayed) -> int:
    """The orientation to apply to an opened image; AS_STORED if none."""
    found = orientation(image)
    if found != AS_STORED and callable(displayed):
        displayed = displayed((image.size[1], image.size[0]), found)
    return found if displayed else AS_STORED


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, ...) as they are displayed by their EXIF orientation."""
    if orientation == AS_STORED:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])


def image_size(path: str | Path, displayed: Displayed = False) -> tuple[int, int]:
    """(H, W) from the header alone.  Arguments and errors as of `read_image`."""
    with _opened(path) as image:
        size = image.size[1], image.size[0]
        return size[::-1] if _applied(image, displayed) >= 5 else size


# --- errors ----------------------------------------------------------------------------------------------------------

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
    except Image.DecompressionBombError:
        raise ImageError(f"image {path} has more than 178 megapixels; pass --large_images if it is meant") from None
    except DAMAGED as error:
        raise ImageError(f"cannot decode image {path} ({error}); replace the file or take its id out of the "
                         "split file") from None
