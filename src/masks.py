"""From score maps to masks, one image at a time: CRF, threshold, affinity labels. No torch: CRF workers import this."""
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.artifacts import Folder, load_arrays, load_cam
from utils.crf import PRESETS, dense_crf
from utils.errors import ImageError, UserError
from utils.layouts.base import IGNORE, check_size
from utils.maps import capped_size, move_threshold, resize_image, resize_maps, to_mask, with_background
from utils.options import skips_bad
from utils.parallel import map_parallel
from utils.visualize import overlay_mask, read_mask, save_mask, save_picture


def load_scores(folder, image_id):
    """(keys (K,), probabilities float32 (K + 1, h, w), size) of one image, as written by `src.inference`."""
    keys, probabilities, size = load_arrays(folder, image_id, "keys", "probabilities", "size",
                                            remedy="run: python run_inference.py")
    return keys, probabilities.astype(np.float32), size


def full_size(probabilities, size):
    """Score maps at the size of the image, each pixel summing to 1."""
    maps = resize_maps(probabilities, tuple(int(side) for side in size))
    return maps / np.maximum(maps.sum(axis=0), 1e-8)


def refine(image, probabilities, preset, max_size, bg_threshold=0.5):
    """CRF posterior (K + 1, H, W) at the image's size.

    The CRF runs at the capped size the networks saw: its kernel widths, in pixels, are made for such photos.
    probabilities: (K + 1, h, w).  A share of `bg_threshold` before the CRF counts as undecided.
    """
    size = capped_size(image.shape[:2], max_size)
    moved = move_threshold(full_size(probabilities, size), bg_threshold)
    posterior = dense_crf(np.ascontiguousarray(resize_image(image, size)), moved, PRESETS[preset])
    return full_size(posterior, image.shape[:2])


def decide(image, keys, probabilities, crf, crf_preset, max_size, bg_threshold):
    """The mask of an image, uint8 (H, W): 0 background, class + 1."""
    if crf:
        return to_mask(refine(image, probabilities, crf_preset, max_size, bg_threshold), keys, 0.5)
    return to_mask(full_size(probabilities, image.shape[:2]), keys, bg_threshold)


def affinity_label(image, keys, cam, alpha_low, alpha_high, crf_preset, max_size):
    """Confident labels for AffinityNet (PSA, Sec. 3.2.2), uint8 (H, W): 0, class + 1, or 255 where not confident.

    Foreground where the CRF of the CAM against the strong background score (low alpha) finds a class; background where
    the CRF against the weak one (high alpha) still finds none; a pixel that is both is not confident.
    """
    size = capped_size(image.shape[:2], max_size)
    small = resize_image(image, size)
    labels = [decide(small, keys, with_background(resize_maps(cam, size), alpha), True, crf_preset, max_size, 0.5)
              for alpha in (alpha_low, alpha_high)]
    label = np.where(labels[0] > 0, labels[0], IGNORE).astype(np.uint8)
    background = labels[1] == 0
    label[background] = np.where(labels[0][background] > 0, IGNORE, 0)
    return np.asarray(Image.fromarray(label).resize(image.shape[1::-1], Image.Resampling.NEAREST))


def missing(mask_dir, image_ids):
    """The ids of which a folder has no mask."""
    there = set(os.listdir(mask_dir)) if Path(mask_dir).is_dir() else set()
    return [image_id for image_id in image_ids if f"{image_id}.png" not in there]


def read_checked(path, size, classes, ignore=False):
    """The mask at a path, uint8 (H, W); UserError unless it is of `size` and holds 0 to `classes`, or 255 if `ignore`.
    """
    mask = read_mask(path)
    check_size(path, mask, size, "make the masks at the images' own size")
    wrong = mask[(mask > classes) & ~((mask == IGNORE) & ignore)]
    if wrong.size:
        raise UserError(f"{path} holds the value {wrong[0]}, but the dataset has {classes} classes; are these the masks "
                        "of another dataset?")
    return mask


def make_affinity_labels(dataset, cam_dir, folder, options):
    """Write the affinity labels of a split as PNG; finished ones with the same options are kept.

    folder: a `Folder`.  Returns nothing; the manifest is left to the caller.
    """
    settings = {name: options[name] for name in ("alpha_low", "alpha_high", "crf_preset", "max_size")}
    work = partial(_label_file, cam_dir=str(cam_dir), folder=str(folder.path), settings=settings)
    _run(work, dataset, folder, options, "affinity labels")


def _label_file(item, cam_dir, folder, settings):
    image_id, one = item
    keys, cam, _ = load_cam(cam_dir, image_id)
    save_mask(Path(folder) / f"{image_id}.png", affinity_label(one.image(0), keys, cam, **settings))


def make_masks(dataset, score_dir, folder, options, overlays=False):
    """Write the masks of a split, overlays/ beside them if asked for; finished ones of the same options are kept."""
    settings = {name: options[name] for name in ("crf", "crf_preset", "max_size", "bg_threshold")}
    work = partial(_mask_file, score_dir=str(score_dir), folder=str(folder.path), settings=settings, overlays=overlays)
    _run(work, dataset, folder, options, "masks", overlays)


def _mask_file(item, score_dir, folder, settings, overlays):
    image_id, one = item
    keys, probabilities, _ = load_scores(score_dir, image_id)
    image = one.image(0)
    mask = decide(image, keys, probabilities, **settings)
    if overlays:
        save_picture(Path(folder) / "overlays" / f"{image_id}.png", overlay_mask(image, mask))
    save_mask(Path(folder) / f"{image_id}.png", mask)


def _run(work, dataset, folder, options, description, redo=False):
    work = partial(_or_reason, work) if skips_bad(options) else work
    chosen = dataset.share() if redo else folder.pending(dataset)
    for failure in map_parallel(work, chosen, options["workers"], description):
        folder.failures.update(failure or {})


def _or_reason(work, item):
    """Work on an item; {image id: reason} if its image cannot be decoded."""
    try:
        work(item)
    except ImageError as error:
        return {item[0]: str(error)}


def mask_folder(path, parent, options):
    """The `Folder` of masks made from the scores described by `parent`'s identity."""
    names = ("crf", "crf_preset", "max_size", "bg_threshold") if options["crf"] else ("crf", "bg_threshold")
    return Folder(path, "mask", ".png", {"scores": parent.identity, **{name: options[name] for name in names}})
