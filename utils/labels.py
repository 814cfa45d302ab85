"""Label maps: pictures of class indices, and the value that stands for no label."""
import numpy as np
from PIL import Image

from utils.errors import UserError

IGNORE = 255


def read_labels(path, missing, remedy):
    """The values of an 8-bit palette or grey picture: uint8 (H, W).

    missing: the message of the UserError if there is no such file.  remedy: what to do if it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("P", "L"):
                return np.array(image, dtype=np.uint8)
            mode = image.mode
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot decode {path} ({error}); {remedy}") from None
    raise UserError(f"{path} has mode {mode}, but labels are an 8-bit palette or grey picture of class indices; map its "
                    f"colours to indices, and write them with utils.visualize.save_mask")
