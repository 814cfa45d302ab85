"""Reading pictures whatever they are under their name."""
import numpy as np
from PIL import Image

from utils.errors import ImageError, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")


def read_image(path):
    """RGB uint8 (H, W, 3) of any picture Pillow reads: PNG, GIF (first frame), grey, palette, RGBA under any name.

    Transparent pixels are laid on white.  The EXIF orientation is left alone, as masks are drawn on stored pixels.
    Raises UserError naming the file if it is missing, and ImageError if it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"no image {path}; put it there or take its id out of the split file") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot decode image {path} ({error}); replace the file or take its id out of the "
                         "split file") from None


def image_size(path):
    """(H, W) from the header alone."""
    try:
        with Image.open(path) as image:
            return image.size[1], image.size[0]
    except FileNotFoundError:
        raise UserError(f"no image {path}; put it there or take its id out of the split file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot decode image {path} ({error}); replace the file or take its id out of the "
                         "split file") from None
