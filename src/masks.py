"""From score maps to masks, one image at a time: CRF, threshold, affinity labels. No torch: CRF workers import this."""
import os
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.artifacts import Folder, load_arrays, load_cam
from utils.crf import CRF, PRESETS, CRFParams, dense_crf
from utils.errors import ImageError, UserError
from utils.labels import IGNORE
from utils.layouts.base import check_size
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


def chosen_crf(options):
    """The `CRF` that the flags ask for: the preset, what is given explicitly, the settled backend; None for --no-crf.
    """
    if not options.get("crf", True):  # step 2 has no such flag
        return None
    params = replace(PRESETS[options["crf_preset"]], **_explicit(options))
    if options["crf_backend"] == "pydensecrf":
        return CRF(params, "pydensecrf", "cpu")
    from utils.options import pick_device
    return CRF(params, options["crf_backend"], str(pick_device(options["device"])))


def crf_identity(options):
    """What decides a CRF's results, for the identity of a folder: the preset, and how the run departs from it."""
    preset = PRESETS[options["crf_preset"]]
    changed = {f"crf_{name}": value for name, value in _explicit(options).items() if value != getattr(preset, name)}
    backend = {} if options["crf_backend"] == "pydensecrf" else {"crf_backend": options["crf_backend"]}
    return {"crf_preset": options["crf_preset"], **changed, **backend}


def _explicit(options):
    given = {field.name: options[f"crf_{field.name}"] for field in fields(CRFParams)}
    return {name: value for name, value in given.items() if value is not None}


def refine(image, fields, crf, max_size, bg_threshold=0.5):
    """CRF posteriors (P, K + 1, H, W) of P fields over an image, at the image's size.

    The CRF runs at the capped size the networks saw: its kernel widths, in pixels, are made for such photos.
    fields: list of P maps (K + 1, h, w).  crf: `CRF`.  A share of `bg_threshold` before the CRF counts as undecided.
    """
    size = capped_size(image.shape[:2], max_size)
    moved = np.stack([move_threshold(full_size(maps, size), bg_threshold) for maps in fields])
    posteriors = dense_crf(np.ascontiguousarray(resize_image(image, size)), moved, *crf)
    return np.stack([full_size(posterior, image.shape[:2]) for posterior in posteriors])


def decide(image, keys, probabilities, crf, max_size, bg_threshold):
    """The mask of an image, uint8 (H, W): 0 background, class + 1.  crf: `CRF`, or None to do without."""
    if crf is None:
        return to_mask(full_size(probabilities, image.shape[:2]), keys, bg_threshold)
    return to_mask(refine(image, [probabilities], crf, max_size, bg_threshold)[0], keys, 0.5)


def affinity_label(image, keys, cam, alpha_low, alpha_high, crf, max_size):
    """Confident labels for AffinityNet (PSA, Sec. 3.2.2), uint8 (H, W): 0, class + 1, or 255 where not confident.

    Foreground where the CRF of the CAM against the strong background score (low alpha) finds a class; background where
    the CRF against the weak one (high alpha) still finds none; a pixel that is both is not confident.
    """
    size = capped_size(image.shape[:2], max_size)
    small = resize_image(image, size)
    fields = [with_background(resize_maps(cam, size), alpha) for alpha in (alpha_low, alpha_high)]
    labels = [to_mask(posterior, keys, 0.5) for posterior in refine(small, fields, crf, max_size)]
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
    settings = {name: options[name] for name in ("alpha_low", "alpha_high", "max_size")}
    settings["crf"] = chosen_crf(options)
    work = partial(_label_file, cam_dir=str(cam_dir), folder=str(folder.path), settings=settings)
    _run(work, dataset, folder, options, settings["crf"], "affinity labels")


def _label_file(item, cam_dir, folder, settings):
    image_id, one = item
    keys, cam, _ = load_cam(cam_dir, image_id)
    save_mask(Path(folder) / f"{image_id}.png", affinity_label(one.image(0), keys, cam, **settings))


def make_masks(dataset, score_dir, folder, options, overlays=False):
    """Write the masks of a split, overlays/ beside them if asked for; finished ones of the same options are kept."""
    settings = {**{name: options[name] for name in ("max_size", "bg_threshold")}, "crf": chosen_crf(options)}
    work = partial(_mask_file, score_dir=str(score_dir), folder=str(folder.path), settings=settings, overlays=overlays)
    _run(work, dataset, folder, options, settings["crf"], "masks", overlays)


def _mask_file(item, score_dir, folder, settings, overlays):
    image_id, one = item
    keys, probabilities, _ = load_scores(score_dir, image_id)
    image = one.image(0)
    mask = decide(image, keys, probabilities, **settings)
    if overlays:
        save_picture(Path(folder) / "overlays" / f"{image_id}.png", overlay_mask(image, mask))
    save_mask(Path(folder) / f"{image_id}.png", mask)


def _run(work, dataset, folder, options, crf, description, redo=False):
    work = partial(_or_reason, work) if skips_bad(options) else work
    chosen = dataset.share() if redo else folder.pending(dataset)
    for failure in map_parallel(work, chosen, options["workers"], description, in_threads(crf)):
        folder.failures.update(failure or {})


def _or_reason(work, item):
    """Work on an item; {image id: reason} if its image cannot be decoded."""
    try:
        work(item)
    except ImageError as error:
        return {item[0]: str(error)}


def in_threads(crf):
    """Whether the work with a `CRF`, or with None, is for threads: that in torch, which this process has loaded."""
    return crf is not None and crf.backend == "torch"


def mask_folder(path, parent, options):
    """The `Folder` of masks made from the scores described by `parent`'s identity."""
    identity = {"scores": parent.identity, **{name: options[name] for name in ("crf", "bg_threshold")}}
    if options["crf"]:
        identity.update(max_size=options["max_size"], **crf_identity(options))
    return Folder(path, "mask", ".png", identity)
