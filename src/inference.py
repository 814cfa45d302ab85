"""Image -> CAM -> walked scores -> mask: one image, or a whole split with every expensive result kept."""
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from models.affinitynet import affinity_stencil
from models.build import unpack
from models.fuse import for_inference
from models.weights import load_model
from src import masks
from src.engine import autocast
from utils.artifacts import Folder, load_cam, read_manifest, run_dir, save_arrays, save_cam
from utils.checkpoint import is_checkpoint
from utils.errors import UserError
from utils.images import SUFFIXES, read_image
from utils.loader import WholeImages, scaled_views, whole_image_loader
from utils.log import environment, progress
from utils.maps import capped_size, foreground_share, resize_image, resize_maps, with_background
from utils.random_walk import half_disc, random_walk, walk_frames
from utils.visualize import heatmap, overlay, overlay_mask, save_gif, save_mask, save_picture

CAM_STRIDE, WALK_STRIDE = 4, 8
SHARPNESS = 2.2  # 0.5 ** 2.2 = 0.22, which is (1 - 0.22) ** 6


def record_hash(record):
    """First 16 hex digits of the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(record["state"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_classes(dataset, classes, source):
    """UserError unless a checkpoint or folder was made for the classes of the dataset."""
    if list(classes) != list(dataset.classes):
        raise UserError(f"{source} knows {len(classes)} classes ({', '.join(classes[:3])}, ...), but {dataset.root} "
                        f"has {len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); pass another --data_root "
                        "or --model_path")


def settle_classes(payload, dataset, source):
    """As `check_classes` for a checkpoint; a published one knows only how many there are, and takes the dataset's."""
    if payload["classes"] is None:
        (record,) = payload["networks"].values()
        if record["classes"] != len(dataset.classes):
            raise UserError(f"{source} knows {record['classes']} classes, but {dataset.root} has "
                            f"{len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); pass another --data_root "
                            "or --model_path")
        payload["classes"] = list(dataset.classes)
    check_classes(dataset, payload["classes"], source)


def check_same_classifier(classifier, manifest, model_path, cam_dir):
    """UserError unless the CAMs of a folder were made by this stage-1 checkpoint, which goes into stage 2's."""
    if record_hash(classifier["networks"]["classifier"]) != manifest["identity"]["classifier"]:
        raise UserError(f"the CAMs in {cam_dir} were not made by {model_path}; run: python run_train.py --stage 1, or "
                        "pass the checkpoint that made them with --model_path")


def label_keys(logits, labels, mode):
    """Zero-based classes whose maps are kept: the known ones, or the predicted ones (at least the likeliest).

    logits: (K,).  labels: (K,) in {0, 1} or None.  mode: "gt" or "predicted".
    """
    if mode == "gt":
        return np.flatnonzero(labels)
    keys = np.flatnonzero(logits > 0)
    return keys if len(keys) else np.array([int(logits.argmax())])


@torch.no_grad()
def multi_scale_cam(classifier, views, size, flip, device, precision):
    """CAMs summed, and the common object's log-odds averaged, over scales and flips (recipes.md, CAM inference).

    views: list of (3, h, w) normalised images, one per scale.  size: (h, w) of the result.
    Returns (logits (K,) averaged over the views, cam (K, *size), log-odds (*size)), numpy float32.
    """
    logits, total, odds = 0, 0, 0
    for view in views:
        batch = torch.stack([view, view.flip(-1)] if flip else [view]).to(device, memory_format=torch.channels_last)
        with autocast(device, precision):
            scores, cam, common = classifier.localise(batch)
        total = total + _resized(cam.relu(), size).sum(dim=0)
        odds = odds + _resized(common[:, None], size).mean(dim=(0, 1)) / len(views)
        logits = logits + scores.float().mean(dim=0) / len(views)
    return logits.cpu().numpy(), total.cpu().numpy(), odds.cpu().numpy()


def _resized(maps, size):
    """Maps (B, K, h, w) of an image and, if B is 2, of its mirror image: resized, and the second turned back."""
    maps = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=True)
    return maps if len(maps) == 1 else torch.stack([maps[0], maps[1].flip(-1)])


def normalised_cam(cam, keys, odds=None, refined=False):
    """The maps of the classes `keys`, each divided by its own maximum: (len(keys), h, w) in [0, 1].

    refined: whether the maps are averages by affinities, which leave a floor under them. It is taken away, and the map
    sharpened so that what is halfway from it to the maximum meets the background score of the default alpha.

    odds: log-odds (h, w) of the common object, or None for plain CAMs.  With them, a pixel's map is the probability of
    the object, sharpened so that an undecided pixel meets the background score of the default alpha, shared out among
    the classes by their CAMs: the object says where, the CAM says which.
    """
    cam = cam[keys]
    if odds is not None and len(keys):
        share = (cam + 1e-6) / (cam.max(axis=0) + 1e-6)
        cam = share / (1 + np.exp(-np.clip(odds, -30, 30))) ** SHARPNESS
    elif refined:
        cam = cam - cam.min(axis=(1, 2), keepdims=True)
        cam = (cam / np.maximum(cam.max(axis=(1, 2), keepdims=True), 1e-8)) ** SHARPNESS
    return cam / np.maximum(cam.max(axis=(1, 2), keepdims=True), 1e-8)


def cam_size(size, max_size):
    """Grid of a stored CAM: a quarter of the capped image, rounded up."""
    return tuple(-(-side // CAM_STRIDE) for side in capped_size(size, max_size))


def image_cam(classifier, item, labels, options, device):
    """(keys, cam) of one item of `WholeImages`: its classes and their normalised maps."""
    logits, cam, odds = multi_scale_cam(classifier, item["views"], cam_size(item["size"], options["max_size"]),
                                        options["flip"], device, options["precision"])
    keys = label_keys(logits, labels, options["labels"])
    return keys, normalised_cam(cam, keys, odds if classifier.common.fitted else None, classifier.avc is not None)


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
        images = WholeImages(pending, options["scales"], options["max_size"], classifier.trunk.stride)
        for item in progress(whole_image_loader(images, options["workers"], device), "CAM", len(pending)):
            index = item["index"]
            keys, cam = image_cam(classifier, item, pending.label(index), options, device)
            save_cam(folder.path, pending.ids[index], keys, cam, item["size"])
    folder.finish(dataset.ids, options, environment(device))


@torch.no_grad()
def image_affinity(affinity_net, view, offsets, device, precision):
    """Affinity stencil (P, h, w) of one normalised image (3, 8(h-1)+1, 8(w-1)+1)."""
    with autocast(device, precision):
        features = affinity_net(view[None].to(device, memory_format=torch.channels_last))
    return affinity_stencil(features[0].float(), offsets)


def walk_scores(stencil, cam, offsets, options):
    """Propagate a CAM and its background score: probabilities (K + 1, h, w) on the affinity's grid, numpy float32."""
    scores = with_background(resize_maps(cam, stencil.shape[-2:]), options["bg_alpha"])
    walked = random_walk(torch.from_numpy(scores).to(stencil.device), stencil, offsets, options["beta"],
                         options["walk_steps"], options["walk_eps"])
    return (walked / walked.sum(dim=0).clamp(min=1e-8)).cpu().numpy()


def walk_folder(path, record, cams, options):
    """The `Folder` of walked scores of an AffinityNet over the CAMs of a `Folder`."""
    names = ("beta", "walk_steps", "walk_eps", "radius", "bg_alpha", "max_size", "precision")
    identity = {name: options[name] for name in names}
    return Folder(path, "walk", ".npz", {**identity, "cam": cams.identity, "affinity": record_hash(record)})


def make_walks(record, dataset, cams, folder, options, device):
    """Write the walked scores of every image of a split that are not there yet; the manifest comes last."""
    if folder.holds(dataset):
        print(f"Using the walked scores in {folder.path}: same networks and options")
        return  # its manifest stays as it is: that of the masks made from it holds its hash
    folder.begin()
    pending = folder.pending(dataset)
    if pending.ids:
        affinity_net = for_inference(unpack(record), device)
        offsets = half_disc(options["radius"])
        images = WholeImages(pending, (1.0,), options["max_size"], WALK_STRIDE)
        for item in progress(whole_image_loader(images, options["workers"], device), "random walk", len(pending)):
            image_id = pending.ids[item["index"]]
            keys, cam, _ = load_cam(cams.path, image_id)
            stencil = image_affinity(affinity_net, item["views"][0], offsets, device, options["precision"])
            save_scores(folder.path, image_id, keys, walk_scores(stencil, cam, offsets, options), item["size"])
    folder.finish(dataset.ids, options, environment(device), parent=cams.path)


def save_scores(folder, image_id, keys, probabilities, size):
    """keys: (K,).  probabilities: (K + 1, h, w), background first.  size: (H, W) of the image."""
    save_arrays(folder, image_id, keys=np.asarray(keys, np.int64), size=np.asarray(size, np.int64),
                probabilities=np.asarray(probabilities, np.float16))


def split_cams(payload, dataset, options, device):
    """The `Folder` of a split's CAMs: --cam_dir if it holds them, else one beside the checkpoint, made or completed."""
    record = payload["networks"]["classifier"]
    # Step 1's folder is never completed from here: its manifest is the record that step 2 reads.
    for path in (options["cam_dir"], scores_home(payload, dataset, options, "cam")):
        cams = cam_folder(path, record, payload["classes"], dataset.name, options)
        if cams.holds(dataset):
            print(f"Using the CAMs in {cams.path}: same classifier and options")
            return cams
    make_cams(record, dataset, cams, options, device)
    return cams


def scores_home(payload, dataset, options, name):
    """Where maps of a split are kept: beside the checkpoint they are made from; for a published one, in output/."""
    path = Path(options["model_path"])
    home = path.parent / "scores" if is_checkpoint(payload) else run_dir("scores", path.stem)
    return home / f"{name}_{dataset.split}_{options['labels']}"


def make_scores(payload, dataset, options, device):
    """CAMs and walked scores of a split from a stage-2 checkpoint; both kept beside it and reused.

    Returns (cam Folder, walk Folder).
    """
    cams, record = split_cams(payload, dataset, options, device), payload["networks"]["affinity"]
    walks = walk_folder(scores_home(payload, dataset, options, "walk"), record, cams, options)
    make_walks(record, dataset, cams, walks, options, device)
    return cams, walks


def run(payload, dataset, options, device):
    """Step 3: pseudo-masks of a split in --output_dir."""
    masks_out = Path(options["output_dir"])
    cams, walks = make_scores(payload, dataset, options, device)
    folder = masks.mask_folder(masks_out, walks, options)
    folder.begin()
    masks.make_masks(dataset, walks.path, folder, options, options["save_overlays"])
    if options["save_walk"]:
        save_walks(payload, dataset, cams, masks_out / "walks", options, device)
    folder.finish(dataset.ids, options, {**environment(device), "classes": list(dataset.classes)}, parent=walks.path)
    return masks_out


def open_checkpoint(path, default, cam_dir, steps=("stage2",)):
    """The checkpoint at `path`, of one of `steps`; without one, the newest of stage 2 in output/, the default first.

    A published AffinityNet comes without a classifier: it gets the one that made the CAMs in `cam_dir`.
    Returns (payload, path).
    """
    if path is None:
        found = sorted(Path("output").glob("stage2_*/model_best.pth.tar"), key=lambda p: p.stat().st_mtime)
        path = default if Path(default).is_file() or not found else str(found[-1])
        print(f"Using {path}", file=sys.stderr)
    payload = load_model(path, steps)
    if list(payload["networks"]) == ["affinity"]:
        manifest = read_manifest(cam_dir, "cam")
        source = manifest["options"]["model_path"]
        classifier = load_model(source, ("stage1",))
        check_same_classifier(classifier, manifest, source, cam_dir)
        print(f"Taking the classifier from {source}, which made the CAMs in {cam_dir}", file=sys.stderr)
        payload = {**payload, "classes": classifier["classes"], "options": {**manifest["options"], "cam_dir": cam_dir},
                   "networks": {**payload["networks"], **classifier["networks"]}}
    return payload, str(path)


def save_walks(payload, dataset, cams, folder, options, device, count=8):
    """Animate the propagation of up to `count` images: one GIF each, frames at doubling numbers of steps."""
    affinity_net = for_inference(unpack(payload["networks"]["affinity"]), device)
    images = WholeImages(dataset.subset(range(min(count, len(dataset)))), (1.0,), options["max_size"], WALK_STRIDE)
    for item in whole_image_loader(images, 0, device):
        keys, cam, _ = load_cam(cams.path, dataset.ids[item["index"]])
        path = Path(folder) / f"{dataset.ids[item['index']]}.gif"
        save_walk(path, affinity_net, item["views"][0], keys, cam, dataset.image(item["index"]), options, device)


def save_walk(path, affinity_net, view, keys, cam, image, options, device):
    """Animate the propagation of one image: the foreground's share after 0, 1, 2, 4, ... steps."""
    offsets = half_disc(options["radius"])
    stencil = image_affinity(affinity_net, view, offsets, device, options["precision"])
    scores = torch.from_numpy(with_background(resize_maps(cam, stencil.shape[-2:]), options["bg_alpha"])).to(device)
    shown = {0} | {2 ** k for k in range(options["walk_steps"].bit_length())} | {options["walk_steps"]}
    small = resize_image(image, capped_size(image.shape[:2], 320))
    frames = []
    for step, walked in walk_frames(scores, stencil, offsets, options["beta"], options["walk_steps"], every=1):
        if step in shown:
            share, _ = foreground_share(masks.full_size(walked.cpu().numpy(), small.shape[:2]), keys)
            frames.append(overlay(small, heatmap(share), 0.6))
    save_gif(path, frames, seconds_per_frame=0.4)


def run_images(payload, paths, options, device):
    """Masks and overlays of image files; labels are predicted."""
    networks = {name: for_inference(unpack(payload["networks"][name]), device)
                for name in ("classifier", "affinity")}
    out = Path(options["output_dir"])
    for file in progress(paths, "masks"):
        mask, keys = _one_image(networks, file, out, options, device)
        named = ", ".join(payload["classes"][key] for key in keys)
        share = np.mean(mask > 0)
        print(f"{file}: {named}; foreground {share:.0%} -> {out / f'{file.stem}.png'}")


def _one_image(networks, file, out, options, device):
    image = read_image(file)
    views = scaled_views(image, options["scales"], options["max_size"], networks["classifier"].trunk.stride)
    item = {"views": views, "size": image.shape[:2]}
    keys, cam = image_cam(networks["classifier"], item, None, options, device)
    offsets = half_disc(options["radius"])
    view = scaled_views(image, (1.0,), options["max_size"], WALK_STRIDE)[0]
    stencil = image_affinity(networks["affinity"], view, offsets, device, options["precision"])
    mask = masks.decide(image, keys, walk_scores(stencil, cam, offsets, options), masks.chosen_crf(options),
                        options["max_size"], options["bg_threshold"])
    if options["save_walk"]:
        save_walk(out / "walks" / f"{file.stem}.gif", networks["affinity"], view, keys, cam, image, options, device)
    save_mask(out / f"{file.stem}.png", mask)
    save_picture(out / f"{file.stem}_overlay.png", overlay_mask(image, mask))
    return mask, keys


def list_images(path):
    """The image files at a path: itself, or those of a folder, sorted; UserError if there is none."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise UserError(f"{path} holds no image ({', '.join(SUFFIXES[:6])}); pass another --images")
        return found
    if not path.is_file():
        raise UserError(f"no image {path}; pass an image or a folder with --images")
    return [path]
