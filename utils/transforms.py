"""Joint augmentation of an image and its label map; every random number comes from the generator that is handed in."""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from utils.labels import IGNORE
from utils.maps import resize_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for RGB in [0, 1]
JITTER = (0.3, 0.3, 0.3, 0.1)  # brightness, contrast, saturation, hue (PSA)


def normalise(image):
    """uint8 RGB (H, W, 3) -> float32 tensor (3, H, W), zero mean and unit variance over ImageNet."""
    x = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).float().div_(255)
    return x.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


@dataclass(frozen=True)
class Augmentation:
    """How samples are varied.

    crop: side of the square crop in pixels.  long_side: (low, high) in pixels; the image's long side is drawn from it.
    scale: (low, high), relative to the image capped at `max_size`, instead of long_side.  jitter: colour jitter.
    """
    crop: int
    long_side: tuple = None
    scale: tuple = (1.0, 1.0)
    max_size: int = 512
    flip: bool = True
    jitter: bool = True

    def __call__(self, image, target, rng):
        """image: uint8 (H, W, 3).  target: uint8 (H, W) or None.  rng: numpy Generator.

        Returns (float32 (3, crop, crop), int64 (crop, crop) or None).  Padding is 0 in the image, that is, the mean
        colour, and 255 in the target.
        """
        size = self._draw_size(image.shape[:2], rng)
        image = resize_image(image, size)
        target = None if target is None else resize_labels(target, size)
        image, target = _flip(image, target) if self.flip and rng.random() < 0.5 else (image, target)
        window = _draw_window(size, self.crop, rng)
        image = image[window]
        image = _jitter(image, rng) if self.jitter else image
        return _place(image, target if target is None else target[window], self.crop, rng)

    def _draw_size(self, size, rng):
        if self.long_side is not None:
            factor = rng.uniform(*self.long_side) / max(size)
        else:
            factor = rng.uniform(*self.scale) * min(1.0, self.max_size / max(size))
        return tuple(max(1, round(side * factor)) for side in size)


def resize_labels(target, size):
    """uint8 (H, W) -> uint8 of `size`, nearest neighbour."""
    return np.asarray(Image.fromarray(target).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _flip(image, target):
    return image[:, ::-1], None if target is None else target[:, ::-1]


def _draw_window(size, crop, rng):
    starts = [int(rng.integers(0, max(0, side - crop) + 1)) for side in size]
    return tuple(slice(start, start + crop) for start in starts)


def _place(image, target, crop, rng):
    """Put an image no larger than the crop at a random place in it."""
    h, w = image.shape[:2]
    top, left = int(rng.integers(0, crop - h + 1)), int(rng.integers(0, crop - w + 1))
    out = torch.zeros(3, crop, crop)
    out[:, top:top + h, left:left + w] = normalise(image)
    if target is None:
        return out, None
    labels = torch.full((crop, crop), IGNORE, dtype=torch.int64)
    labels[top:top + h, left:left + w] = torch.from_numpy(np.array(target, np.int64))
    return out, labels


def cutmix(images, labels):
    """Each image gets a rectangle of the one before it in the batch, and that share of its labels.

    CutMix (Yun et al., ICCV 2019); the first image takes from the last. A class can then no longer be told by the
    absence of the others, and its map stays where its evidence is.
    images: (B, 3, H, W).  labels: (B, K) in [0, 1].  Draws from torch's global generator.
    Returns (images, labels float32), both new; the share is uniform in [0, 1], the rectangle shaped like the image.
    """
    labels = labels.float()
    height, width = images.shape[-2:]
    side = torch.rand(()).sqrt()
    h, w = int(height * side), int(width * side)
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    mixed, share = images.clone(), h * w / (height * width)
    mixed[..., top:top + h, left:left + w] = images[..., top:top + h, left:left + w].roll(1, 0)
    return mixed, (1 - share) * labels + share * labels.roll(1, 0)


def _jitter(image, rng):
    """Brightness, contrast, saturation and hue in a random order, each by a random factor."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    centres = (1, 1, 1, 0)
    for i in rng.permutation(4):
        picture = operations[i](picture, float(centres[i] + rng.uniform(-JITTER[i], JITTER[i])))
    return np.asarray(picture)
