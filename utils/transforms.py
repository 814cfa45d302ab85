"""Pixel normalisation, and joint augmentation of an image and its label map.

All random numbers come from the numpy Generator that is passed in.
"""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from utils.grids import Size, resize_image, resize_labels
from utils.labels import IGNORE

JITTER = (0.3, 0.3, 0.3, 0.1)  # brightness, contrast, saturation, hue (PSA)


@dataclass(frozen=True)
class Normalise:
    """(value / 255 - mean) / std of each RGB channel; the statistics are ImageNet's by default."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """uint8 (H, W, 3) -> float32 (3, H, W)."""
        x = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).float().div_(255)
        return x.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.std)[:, None, None])


IMAGENET = Normalise()


@dataclass(frozen=True)
class Augmentation:
    """Random scale, horizontal flip, crop and colour jitter of a training sample.

    crop: side of the square crop in pixels.  long_side: (low, high) in pixels, the range of the image's long side, or
    None.  scale: (low, high), used without long_side, relative to the image capped at `max_size` pixels.
    flip: horizontally, with probability 1/2.  jitter: of brightness, contrast, saturation and hue.
    """
    crop: int
    long_side: tuple[float, float] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    max_size: int = 512
    flip: bool = True
    jitter: bool = True
    normalise: Normalise = IMAGENET

    def __call__(self, image: np.ndarray, target: np.ndarray | None,
                 rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw a sample of an image, uint8 (H, W, 3), and its label map, uint8 (H, W) or None.

        Returns (float32 (3, crop, crop), int64 (crop, crop) or None).  Padding is 0 in the image after normalisation,
        that is, the mean colour, and 255 in the target.
        """
        size = self._draw_size(image.shape[:2], rng)
        image = resize_image(image, size)
        target = None if target is None else resize_labels(target, size)
        image, target = _flip(image, target) if self.flip and rng.random() < 0.5 else (image, target)
        window = _draw_window(size, self.crop, rng)
        image = image[window]
        image = _jitter(image, rng) if self.jitter else image
        return _place(self.normalise(image), target if target is None else target[window], self.crop, rng)

    @property
    def largest(self) -> float:
        """Pixels of the long side that an image is resized to at most."""
        return self.long_side[1] if self.long_side is not None else self.max_size * max(1, self.scale[1])

    def _draw_size(self, size: Size, rng: np.random.Generator) -> Size:
        if self.long_side is not None:
            factor = rng.uniform(*self.long_side) / max(size)
        else:
            factor = rng.uniform(*self.scale) * min(1.0, self.max_size / max(size))
        return tuple(max(1, round(side * factor)) for side in size)


def _flip(image, target):
    return image[:, ::-1], None if target is None else target[:, ::-1]


def _draw_window(size, crop, rng):
    starts = [int(rng.integers(0, max(0, side - crop) + 1)) for side in size]
    return tuple(slice(start, start + crop) for start in starts)


def _place(image, target, crop, rng):
    """Put a normalised image, (3, h, w) of at most the crop's size, at a random place of the crop."""
    h, w = image.shape[1:]
    top, left = int(rng.integers(0, crop - h + 1)), int(rng.integers(0, crop - w + 1))
    out = torch.zeros(3, crop, crop)
    out[:, top:top + h, left:left + w] = image
    if target is None:
        return out, None
    labels = torch.full((crop, crop), IGNORE, dtype=torch.int64)
    labels[top:top + h, left:left + w] = torch.from_numpy(np.array(target, np.int64))
    return out, labels


def _jitter(image, rng):
    """Brightness, contrast, saturation and hue in a random order, each by a random factor."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    from torchvision.transforms import functional as TF  # takes seconds to import; inference goes without
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    centres = (1, 1, 1, 0)
    for i in rng.permutation(4):
        picture = operations[i](picture, float(centres[i] + rng.uniform(-JITTER[i], JITTER[i])))
    return np.asarray(picture)
