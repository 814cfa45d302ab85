"""Class activation maps of images and splits, over several scales and mirror images (recipes.md, CAM inference)."""
import numpy as np
import torch
from torch.nn import functional as F

from models.build import unpack
from models.fuse import for_inference
from src.engine import autocast
from src.records import record_hash
from utils.artifacts import Folder, save_cam
from utils.loader import WholeImages, equal_batches, whole_image_loader
from utils.log import environment, progress
from utils.maps import capped_size
from utils.options import skips_bad

CAM_STRIDE = 4
SHARPNESS = 2.2  # 0.5 ** 2.2 = 0.22, which is (1 - 0.22) ** 6
# Images of equal size that go through the network together. Two cores are kept busy by one: batches of four gained 2 to
# 10 % there, and an image's map would depend, in its last bits, on which others are done in the same run.
TOGETHER = {"cpu": 1, "cuda": 16}
PIXELS = {"cpu": 1 << 20, "cuda": 1 << 24}  # in one forward pass, which bounds its memory; one view at least


def label_keys(logits, labels, mode):
    """Zero-based classes whose maps are kept: the known ones, or the predicted ones (at least the likeliest).

    logits: (K,).  labels: (K,) in {0, 1} or None.  mode: "gt" or "predicted".
    """
    if mode == "gt":
        return np.flatnonzero(labels)
    keys = np.flatnonzero(logits > 0)
    return keys if len(keys) else np.array([int(logits.argmax())])


def image_cams(classifier, items, labels, options, device):
    """[(keys, cam)] of items of `WholeImages` of equal size: each image's classes and their normalised maps.

    labels: of each, (K,) in {0, 1} or None.
    """
    scales = [view_maps(classifier, views, options["flip"], device, options["precision"])
              for views in zip(*(item["views"] for item in items))]
    logits = (sum(scores.mean(dim=1) for scores, _, _ in scales) / len(scales)).cpu().numpy()  # (B, K)
    results = []
    for i, item in enumerate(items):
        keys = label_keys(logits[i], labels[i], options["labels"])
        size = cam_size(item["size"], options["max_size"])
        cam = _merged([cam[i, :, keys].relu() for _, cam, _ in scales], size)
        odds = None
        if classifier.common.fitted:
            odds = _merged([one[i, :, None] for _, _, one in scales], size)[0] / scales[0][2].shape[1] / len(scales)
        if classifier.avc is not None and odds is None:
            maps = refined_cam(cam, len(scales) * scales[0][0].shape[1], classifier.avc)
        else:
            maps = normalised_cam(cam, odds)
        results.append((keys, maps))
    return results


@torch.no_grad()
def view_maps(classifier, views, flip, device, precision):
    """What a classifier says of images of one size: logits (B, V, K), CAMs (B, V, K, h, w), log-odds of the common object
    (B, V, h', w'); float32, on the device, CAMs before ReLU.

    views: B normalised images (3, H, W).  V is 2 with `flip`, the second of the mirror image, else 1.
    """
    batch = torch.stack([turned for view in views for turned in ([view, view.flip(-1)] if flip else [view])])
    parts = []
    for part in batch.split(max(1, PIXELS[device.type] // batch[0, 0].numel())):
        with autocast(device, precision):
            parts.append(classifier.localise(part.to(device, memory_format=torch.channels_last)))
    return [torch.cat(part).float().unflatten(0, (len(views), -1)) for part in zip(*parts)]


def _merged(scales, size):
    """Sum of the maps (V, K, h, w) of several scales, resized, mirror images turned back.  Returns (K, *size) numpy."""
    total = np.zeros((scales[0].shape[1], *size), np.float32)
    if not len(total):  # an image without a class
        return total
    for maps in scales:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
        total += (maps[0] if len(maps) == 1 else maps[0] + maps[1].flip(-1)).cpu().numpy()
    return total


def normalised_cam(cam, odds=None, refined=False):
    """Maps (K, h, w), at least 0, of an image's classes, each divided by its own maximum: in [0, 1].

    refined: whether the maps are averages by affinities, which leave a floor under them (shares do not). It is taken
    away, and the map sharpened so that what is halfway from it to the maximum meets the background score of the default
    alpha.

    odds: log-odds (h, w) of the common object, or None for plain CAMs.  With them, a pixel's map is the probability of
    the object, sharpened so that an undecided pixel meets the background score of the default alpha, shared out among
    the classes by their CAMs: the object says where, the CAM says which.
    """
    if odds is not None and len(cam):
        share = (cam + 1e-6) / (cam.max(axis=0) + 1e-6)
        cam = share / (1 + np.exp(-np.clip(odds, -30, 30))) ** SHARPNESS
    elif refined:
        cam = cam - cam.min(axis=(1, 2), keepdims=True)
        cam = (cam / np.maximum(cam.max(axis=(1, 2), keepdims=True), 1e-8)) ** SHARPNESS
    return cam / np.maximum(cam.max(axis=(1, 2), keepdims=True), 1e-8)


def refined_cam(cam, views, head):
    """`normalised_cam` of the sum (K, h, w) over so many views of what an affinity head refined."""
    return normalised_cam(sharpened(cam / views)) if head.colour else normalised_cam(cam, refined=True)


def sharpened(shares):
    """`models.avc.refined_shares` (K, h, w), of which 0.5 is undecided, as maps: 0.5, once divided by its map's maximum,
    meets the background score of the default alpha.  In a map up to 0.55 that is nine tenths of the maximum."""
    highest = np.maximum(shares.max(axis=(1, 2), keepdims=True), 1e-8)
    undecided = np.minimum(0.5 / highest, 0.9)
    return (shares / highest) ** (SHARPNESS * np.log(0.5) / np.log(undecided))


def cam_size(size, max_size):
    """Grid of a stored CAM: a quarter of the capped image, rounded up."""
    return tuple(-(-side // CAM_STRIDE) for side in capped_size(size, max_size))


def cam_folder(path, record, classes, dataset_name, options):
    """The `Folder` of CAMs of a classifier: what decides its files."""
    identity = {name: options[name] for name in ("scales", "flip", "labels", "max_size", "precision", "difficult")}
    return Folder(path, "cam", ".npz", {**identity, "dataset": dataset_name, "classes": list(classes),
                                        "classifier": record_hash(record)})


def make_cams(record, dataset, folder, options, device):
    """Write the CAM of every image of a split that is not there yet; the manifest comes last."""
    folder.begin()
    pending = folder.pending(dataset)
    if pending.ids:
        classifier = for_inference(unpack(record), device)
        images = WholeImages(pending, options["scales"], options["max_size"], classifier.trunk.stride,
                             skip_bad=skips_bad(options))
        items = progress(whole_image_loader(images, options["workers"], device), "CAM", len(pending))
        for batch in equal_batches(items, TOGETHER[device.type]):
            labels = [pending.label(item["index"]) for item in batch]
            for item, (keys, cam) in zip(batch, image_cams(classifier, batch, labels, options, device)):
                save_cam(folder.path, pending.ids[item["index"]], keys, cam, item["size"])
        folder.failures.update(images.failures)
    folder.finish(dataset.ids, options, environment(device))
