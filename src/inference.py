"""CAM -> walked scores -> mask: one image, or a whole split with every expensive result kept."""
import sys
from pathlib import Path

import numpy as np
import torch

from models.affinitynet import affinity_stencil
from models.build import unpack
from models.fuse import for_inference
from src import masks
from src.cams import TOGETHER, cam_folder, image_cams, make_cams
from src.engine import autocast
from src.records import record_hash
from utils import distributed
from utils.artifacts import Folder, load_cam, made_of, run_dir, save_arrays
from utils.checkpoint import is_checkpoint
from utils.errors import ImageError, UserError
from utils.images import SUFFIXES, read_image
from utils.loader import WholeImages, equal_batches, scaled_views, whole_image_loader
from utils.log import environment, progress
from utils.maps import capped_size, foreground_share, resize_image, resize_maps, with_background
from utils.options import skips_bad
from utils.random_walk import half_disc, random_walks, walk_frames
from utils.visualize import heatmap, overlay, overlay_mask, save_gif, save_mask, save_picture

WALK_STRIDE = 8


@torch.no_grad()
def affinities(affinity_net, views, offsets, device, precision):
    """Affinity stencils, each (P, h, w), of normalised images (3, 8(h-1)+1, 8(w-1)+1) of one size."""
    with autocast(device, precision):
        features = affinity_net(torch.stack(views).to(device, memory_format=torch.channels_last))
    return [affinity_stencil(one.float(), offsets) for one in features]


def walk_scores(stencils, cams, offsets, options):
    """Propagate CAMs and their background scores: probabilities (K + 1, h, w) of each image on its affinity's grid,
    numpy float32."""
    scores = [torch.from_numpy(with_background(resize_maps(cam, stencil.shape[-2:]), options["bg_alpha"]))
              .to(stencil.device) for cam, stencil in zip(cams, stencils)]
    walked = random_walks(scores, stencils, offsets, options["beta"], options["walk_steps"], options["walk_eps"])
    return [(maps / maps.sum(dim=0).clamp(min=1e-8)).cpu().numpy() for maps in walked]


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
    dataset = made_of(dataset, cams.path)
    folder.begin()
    pending = folder.pending(dataset)
    if pending.ids:
        affinity_net = for_inference(unpack(record), device)
        offsets = half_disc(options["radius"])
        images = WholeImages(pending, (1.0,), options["max_size"], WALK_STRIDE, skip_bad=skips_bad(options))
        items = progress(whole_image_loader(images, options["workers"], device), "random walk", len(pending))
        for batch in equal_batches(items, TOGETHER[device.type]):
            stencils = affinities(affinity_net, [item["views"][0] for item in batch], offsets, device,
                                  options["precision"])
            keys, maps, _ = zip(*(load_cam(cams.path, pending.ids[item["index"]]) for item in batch))
            for item, key, scores in zip(batch, keys, walk_scores(stencils, maps, offsets, options)):
                save_scores(folder.path, pending.ids[item["index"]], key, scores, item["size"])
        folder.failures.update(images.failures)
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
    dataset = made_of(dataset, walks.path)
    folder = masks.mask_folder(masks_out, walks, options)
    folder.begin()
    masks.make_masks(dataset, walks.path, folder, options, options["save_overlays"])
    if options["save_walk"] and distributed.is_main():
        save_walks(payload, dataset, cams, masks_out / "walks", options, device)
    folder.finish(dataset.ids, options, {**environment(device), "classes": list(dataset.classes)}, parent=walks.path)
    return masks_out


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
    (stencil,) = affinities(affinity_net, [view], offsets, device, options["precision"])
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
    for file in progress(distributed.share(paths), "masks"):
        try:
            mask, keys = _one_image(networks, file, out, options, device)
        except ImageError as error:
            if not skips_bad(options):
                raise
            print(f"Skipping {file}: {error}", file=sys.stderr)
            continue
        named = ", ".join(payload["classes"][key] for key in keys)
        share = np.mean(mask > 0)
        print(f"{file}: {named}; foreground {share:.0%} -> {out / f'{file.stem}.png'}")


def _one_image(networks, file, out, options, device):
    image = read_image(file)
    views = scaled_views(image, options["scales"], options["max_size"], networks["classifier"].trunk.stride)
    item = {"views": views, "size": image.shape[:2]}
    ((keys, cam),) = image_cams(networks["classifier"], [item], [None], options, device)
    offsets = half_disc(options["radius"])
    view = scaled_views(image, (1.0,), options["max_size"], WALK_STRIDE)[0]
    stencils = affinities(networks["affinity"], [view], offsets, device, options["precision"])
    (probabilities,) = walk_scores(stencils, [cam], offsets, options)
    mask = masks.decide(image, keys, probabilities, masks.chosen_crf(options), options["max_size"],
                        options["bg_threshold"])
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
