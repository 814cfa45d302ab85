"""DeepLabV1: trained on pseudo-masks (or on ground truth, the ceiling) and tested with several scales, flip and CRF."""
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from models.build import build_network, pack, unpack
from models.deeplab import labelled_pixels, segmentation_loss
from models.fuse import for_inference
from src import engine, masks
from src.cams import label_keys
from src.eval import Stage, evaluate
from src.inference import save_scores
from src.records import record_hash
from src.train import initialise, network_options, rounded_crop, split_holdout
from utils import distributed
from utils.artifacts import Folder, made_of
from utils.errors import UserError
from utils.loader import TrainingSamples, WholeImages, whole_image_loader
from utils.log import environment, progress
from utils.maps import capped_size, grid_size
from utils.metrics import confusion, scores
from utils.options import skips_bad
from utils.transforms import Augmentation, resize_labels

SCALE = {"seamv1": (0.5, 1.5), "mctformer": (0.7, 1.3)}  # random scale of a training image, by DeepLab's head
MIN_PROBABILITY = 0.05  # classes that nowhere reach it are left out of the CRF; the likeliest is always kept


def newest_checkpoint():
    """Path of the newest output/deeplab_*/model_best.pth.tar; UserError if there is none."""
    found = sorted(Path("output").glob("deeplab_*/model_best.pth.tar"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no DeepLab checkpoint in output/; run: python train_deeplab.py")
    print(f"Using {found[-1]}, the newest of {len(found)}", file=sys.stderr)
    return str(found[-1])


def mask_reader(dataset, mask_dir):
    """Function index -> training mask of a dataset: from a folder, or its ground truth if mask_dir is "gt".

    Every mask is looked for at once, so that a missing one does not stop a run at its end.
    """
    if mask_dir == "gt":
        dataset.check_truth()
        return dataset.mask
    missing = masks.missing(mask_dir, dataset.ids)
    if missing:
        raise UserError(f"no mask {Path(mask_dir) / missing[0]}.png (and {len(missing) - 1} more); run: "
                        "python run_inference.py")

    def read(index):
        path = Path(mask_dir) / f"{dataset.ids[index]}.png"
        return masks.read_checked(path, dataset.size(index), len(dataset.classes), ignore=True)
    return read


def run_training(dataset, read, options, device):
    """Step 5: train DeepLabV1.  read: function index -> mask, from `mask_reader`."""
    torch.manual_seed(options["seed"])
    how = {**network_options("deeplab", options, len(dataset.classes)), "head": options["head"]}
    network = build_network(**how)
    initialise(network, options)
    learn, held = split_holdout(dataset, options["val_fraction"], options["seed"])
    augmentation = Augmentation(rounded_crop(options), scale=SCALE[options["head"]], max_size=options["max_size"])
    samples = TrainingSamples(dataset.subset(learn), augmentation, options["seed"], lambda index: read(learn[index]),
                              skips_bad(options))
    held_set = dataset.subset(held)
    task = engine.Task(
        "deeplab", network, _loss, samples, len(learn),
        _validation(held_set, lambda index: read(held[index]), options, device) if held else None,
        lambda: {"classes": list(dataset.classes), "networks": {"deeplab": pack(network, **how)}},
        lambda batch: labelled_pixels(batch["target"]))
    return engine.train(task, options, options["output_dir"], device)


def _loss(network, batch, part):
    return segmentation_loss(network(batch["image"]), batch["target"], pixels=part.totals), {}


def _validation(dataset, read, options, device):
    """mIoU with the held-out images' masks of --mask_dir, one scale: pseudo-masks choose, not ground truth."""
    classes = len(dataset.classes) + 1

    def validate(network):
        total = np.zeros((classes, classes), np.int64)
        own = distributed.share(range(len(dataset)))
        images = WholeImages(dataset.subset(own), max_size=options["max_size"], stride=network.trunk.stride,
                             skip_bad=skips_bad(options))
        for item in whole_image_loader(images, options["workers"], device):
            logits = network(item["views"][0][None].to(device, memory_format=torch.channels_last)).float()
            size = logits.shape[-2:]
            prediction = logits[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
            total += confusion(prediction, resize_labels(read(own[int(item["index"])]), size), classes)
        return {"score": scores(sum(distributed.gather(total)))["miou"]}
    return validate


@torch.no_grad()
def multi_scale_probabilities(network, views, grid, flip, merge, device, precision):
    """Class probabilities from several scales and, if `flip`, their mirror images (recipes.md, DeepLabV1 test).

    views: list of (3, h, w), one per scale.  grid: (h, w) of the result.  merge: "mean", the softmax of the mean of the
    logits (seamv1), or "max", the largest softmax of each class (MCTformer), which is divided by its sum over classes.
    Returns (C, *grid) float32 numpy.
    """
    maps = []
    for view in views:
        batch = torch.stack([view, view.flip(-1)] if flip else [view]).to(device, memory_format=torch.channels_last)
        with engine.autocast(device, precision):
            logits = network(batch)
        if flip:
            logits = torch.stack([logits[0], logits[1].flip(-1)])
        maps.append(F.interpolate(logits.float(), size=grid, mode="bilinear", align_corners=True))
    logits = torch.cat(maps)  # (scales and flips, C, *grid)
    if merge == "mean":
        return logits.mean(dim=0).softmax(dim=0).cpu().numpy()
    largest = logits.softmax(dim=1).amax(dim=0)
    return (largest / largest.sum(dim=0)).cpu().numpy()


def kept_classes(probabilities, labels, mode):
    """Zero-based classes worth keeping of one image: the known ones, or those that somewhere reach MIN_PROBABILITY."""
    if mode == "gt":
        return np.flatnonzero(labels)
    return label_keys(probabilities[1:].max(axis=(1, 2)) - MIN_PROBABILITY, labels, mode)


def make_scores(record, dataset, folder, options, device):
    """Write every image's class probabilities on the stride-8 grid; finished ones of the same options are kept."""
    folder.begin()
    pending = folder.pending(dataset)
    if pending.ids:
        network = for_inference(unpack(record), device)
        images = WholeImages(pending, options["scales"], options["max_size"], network.trunk.stride,
                             skip_bad=skips_bad(options))
        for item in progress(whole_image_loader(images, options["workers"], device), "DeepLab", len(pending)):
            index = item["index"]
            grid = grid_size(capped_size(item["size"], options["max_size"]), 8)
            probabilities = multi_scale_probabilities(network, item["views"], grid, options["flip"], options["merge"],
                                                      device, options["precision"])
            keys = kept_classes(probabilities, pending.label(index), options["labels"])
            kept = probabilities[np.concatenate([[0], keys + 1])]
            save_scores(folder.path, pending.ids[index], keys, kept / np.maximum(kept.sum(axis=0), 1e-8), item["size"])
        folder.failures.update(images.failures)
    folder.finish(dataset.ids, options, environment(device))


def run_test(payload, dataset, options, device):
    """Step 6: masks and scores of a split from a DeepLab checkpoint.

    Writes masks/, and scores.json, plots and panels where the split has ground truth.  Returns the folder of masks.
    """
    record, home = payload["networks"]["deeplab"], Path(options["output_dir"])
    names = ("scales", "flip", "merge", "labels", "max_size", "precision")
    identity = {"deeplab": record_hash(record), "dataset": dataset.name, **{name: options[name] for name in names}}
    maps = Folder(home / "scores", "deeplab", ".npz", identity)
    make_scores(record, dataset, maps, options, device)
    dataset = made_of(dataset, maps.path)
    folder = masks.mask_folder(home / "masks", maps, options)
    folder.begin()
    masks.make_masks(dataset, maps.path, folder, options, options["save_overlays"])
    folder.finish(dataset.ids, options, {**environment(device), "classes": list(dataset.classes)}, parent=maps.path)
    print(f"Wrote {len(dataset)} masks to {folder.path}")
    if dataset.truth is None:
        print(f"{dataset.root} has no ground truth for split {dataset.split}: masks only, no scores")
        return folder.path
    stages = [Stage("deeplab", "scores", maps.path)] + [Stage("+ CRF", "scores", maps.path, crf=True)] * options["crf"]
    evaluate(dataset, stages, options)
    return folder.path
