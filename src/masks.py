"""From score maps to masks, one image at a time: CRF, threshold, affinity labels.  No torch: workers import this."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.crf import CRF, dense_crf
from utils.datasets.base import Dataset, check_size
from utils.datasets.lists import mask_file, without_mask
from utils.errors import ImageError, UserError
from utils.files import load_cam, load_scores
from utils.grids import Size, capped_size, resize_image, resize_labels, resize_maps
from utils.labels import IGNORE, read_mask, save_mask
from utils.log import warn
from utils.maps import move_threshold, to_mask, with_background
from utils.visualize import named_overlay, save_picture

BAND = 2**24  # values of a photo's score maps that are held at full size at once


def full_size(probabilities: np.ndarray, size: Size, rows: tuple[int, int] | None = None) -> np.ndarray:
    """Score maps (K + 1, h, w) at the size of the image, each pixel summing to 1.  rows: see `resize_maps`."""
    maps = resize_maps(probabilities, size, rows)
    return maps / np.maximum(maps.sum(axis=0), 1e-8)


def refine(image: np.ndarray, fields: Sequence[np.ndarray], crf: CRF, max_size: int, bg_threshold: float = 0.5
           ) -> np.ndarray:
    """CRF posteriors (P, K + 1, h, w) of P fields over an image, at its capped size, which the networks saw.

    The CRF's kernel widths, in pixels, are made for photos of that size.
    fields: P maps (K + 1, h, w).  bg_threshold: the foreground probability before the CRF that counts as undecided.
    """
    size = capped_size(image.shape[:2], max_size)
    moved = np.stack([move_threshold(full_size(maps, size), bg_threshold) for maps in fields])
    return dense_crf(np.ascontiguousarray(resize_image(image, size)), moved, *crf)


def decide(image: np.ndarray, keys: np.ndarray, probabilities: np.ndarray, crf: CRF | None, max_size: int,
           bg_threshold: float, size: Size | None = None) -> np.ndarray:
    """The mask of an image, uint8 (H, W): 0 background, class k as k + 1.

    keys: (K,) zero-based classes.  probabilities: (K + 1, h, w), background first.  crf: None to do without.
    size: (H, W) of the photo, where `image` is a smaller copy of it; left out, the image's.
    """
    size = image.shape[:2] if size is None else size
    if crf is not None:
        probabilities, bg_threshold = refine(image, [probabilities], crf, max_size, bg_threshold)[0], 0.5
    mask, step = np.empty(size, np.uint8), max(1, BAND // (len(probabilities) * size[1]))
    for first in range(0, size[0], step):
        rows = (first, min(size[0], first + step))
        mask[slice(*rows)] = to_mask(full_size(probabilities, size, rows), keys, bg_threshold)
    return mask


@dataclass(frozen=True)
class LabelConfig:
    """How affinity labels are made from CAMs: the two background exponents, the CRF and the size it runs at."""
    alpha_low: float
    alpha_high: float
    crf: CRF
    max_size: int


def affinity_label(image: np.ndarray, keys: np.ndarray, cam: np.ndarray, how: LabelConfig) -> np.ndarray:
    """Confident labels for AffinityNet (PSA, Sec. 3.2.2), uint8 (H, W): 0, class k as k + 1, 255 where not confident.

    Foreground where the CRF of the CAM against the strong background score (low alpha) finds a class; background where
    the CRF against the weak one (high alpha) still finds none; a pixel that is both is not confident.
    """
    size = capped_size(image.shape[:2], how.max_size)
    small = resize_image(image, size)
    fields = [with_background(resize_maps(cam, size), alpha) for alpha in (how.alpha_low, how.alpha_high)]
    low, high = (to_mask(posterior, keys, 0.5) for posterior in refine(small, fields, how.crf, how.max_size))
    confident = np.where(low > 0, low, IGNORE).astype(np.uint8)
    label = np.where(high == 0, np.where(low > 0, IGNORE, 0), confident).astype(np.uint8)
    return resize_labels(label, image.shape[:2])


# --- files, one image each: what worker processes run ----------------------------------------------------------------

def write_label(item: tuple[str, Dataset], cam_dir: Path, folder: Path, how: LabelConfig) -> None:
    """Write the affinity label of one image from its CAM.  item: (image id, that image alone as a split)."""
    image_id, one = item
    save_mask(folder / f"{image_id}.png", affinity_label(one.image(0), *load_cam(cam_dir, image_id), how))


@dataclass(frozen=True)
class MaskConfig:
    """How a mask is made from score maps: see `decide`.

    bg_alpha: exponent of the background score, for maps that are CAMs; None for walked ones, which have theirs.
    """
    crf: CRF | None
    max_size: int
    bg_threshold: float = 0.5
    bg_alpha: float | None = None


def write_mask(item: tuple[str, Dataset], score_dir: Path, folder: Path, how: MaskConfig, overlays: bool) -> None:
    """Write the mask of one image from its score maps, and an overlay to overlays/ if asked.  item: see `write_label`.
    """
    image_id, one = item
    image, size = one.photo(0, how.max_size)
    if how.bg_alpha is None:
        keys, scores = load_scores(score_dir, image_id)
    else:
        keys, cam = load_cam(score_dir, image_id)
        scores = with_background(cam, how.bg_alpha)
    mask = decide(image, keys, scores, how.crf, how.max_size, how.bg_threshold, size)
    save_mask(folder / f"{image_id}.png", mask)
    if overlays:
        write_overlay(item, folder)
    else:
        overlay_path(folder, image_id).unlink(missing_ok=True)  # of the mask that was there before


def write_overlay(item: tuple[str, Dataset], folder: Path) -> None:
    """Write a photo with its mask of a folder over it to overlays/ there.  item: see `write_label`."""
    image_id, one = item
    mask = read_mask(folder / f"{image_id}.png")
    save_picture(overlay_path(folder, image_id), named_overlay(one.image(0), mask, one.classes))


def overlay_path(folder: Path, image_id: str) -> Path:
    """Where the overlay of an image lies in a folder of masks."""
    return folder / "overlays" / f"{image_id}.png"


def missing(mask_dir: str | Path, image_ids: Sequence[str]) -> list[str]:
    """The ids of which a folder has no mask."""
    return without_mask([Path(mask_dir)], image_ids)


def check_complete(mask_dir: str | Path, image_ids: Sequence[str]) -> None:
    """UserError, before any work, unless a folder has the mask of every image."""
    lacking = missing(mask_dir, image_ids)
    if lacking:
        raise UserError(f"no mask {Path(mask_dir) / lacking[0]}.png (and {len(lacking) - 1} more); run: "
                        "python run_inference.py, or name a folder that has them all")


def decodable(dataset: Dataset) -> Dataset:
    """A split without the images whose header cannot be read, so that their size is not known; says so.

    UserError if none is left.
    """
    damaged = {}
    for index, image_id in enumerate(dataset.ids):
        try:
            dataset.size(index)
        except ImageError as error:
            damaged[image_id] = str(error)
    if not damaged:
        return dataset
    if len(damaged) == len(dataset):
        raise UserError(f"none of the {len(dataset)} images can be decoded: {damaged[dataset.ids[0]]}")
    image_id, reason = next(iter(damaged.items()))
    warn(f"Leaving out {len(damaged)} images that cannot be decoded, such as {image_id}: {reason}")
    return dataset.without(damaged)


def check_cams(cam_dir: str | Path, image_ids: Sequence[str]) -> None:
    """UserError, before any work, unless a folder has the CAM of every image."""
    there = set(os.listdir(cam_dir))
    lacking = [image_id for image_id in image_ids if f"{image_id}.npz" not in there]
    if lacking:
        raise UserError(f"no CAM for {lacking[0]} in {cam_dir} (and {len(lacking) - 1} more); run: python run_train.py "
                        "--stage 1 for these images too, or choose others by --split, --ids or --limit")


def check_whole(mask_dir: str | Path, dataset: Dataset, purpose: str) -> None:
    """UserError unless a folder has the mask of every image of a split.  purpose: what is made of them all."""
    lacking = missing(mask_dir, dataset.ids)
    if lacking:
        raise UserError(f"{mask_dir} lacks {len(lacking)} of the {len(dataset)} masks of split {dataset.split}, such "
                        f"as {lacking[0]}; make them all, then {purpose}")


def mask_path(mask_dir: Path, image_id: str) -> Path:
    """The mask of an image in a folder, in either of Unicode's spellings."""
    return mask_file([mask_dir], image_id) or mask_dir / f"{image_id}.png"


def read_checked(path: Path, size: Size, classes: int, ignore: bool = False) -> np.ndarray:
    """The mask at a path, uint8 (H, W); UserError unless it is of `size` and holds 0 to `classes`, or 255 if `ignore`.
    """
    mask = read_mask(path)
    check_size(path, mask, size, "make the masks at the images' own size")
    wrong = mask[(mask > classes) & ~((mask == IGNORE) & ignore)]
    if wrong.size and (wrong == IGNORE).all():
        raise UserError(f"{path} holds pixels of no class (255), which cannot be scored; give them a class, or 0 for "
                        "the background")
    if wrong.size:
        raise UserError(f"{path} holds the value {wrong[0]}, but the dataset has {classes} classes; are these the "
                        "masks of another dataset?")
    return mask
