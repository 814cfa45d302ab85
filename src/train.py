"""Stage 1, the CAM classifier, and stage 2, AffinityNet: what is trained, on what, with which loss."""
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from models.affinitynet import KINDS, affinity_loss, pair_counts
from models.build import build_network, pack, unpack
from models.classifier import classification_loss
from models.weights import load_pretrained
from src import engine, masks
from src.avc import avc_loss, last_epoch_counts, record_of
from src.cams import cam_folder, make_cams
from src.inference import WALK_STRIDE
from src.records import record_hash
from utils import distributed
from utils.artifacts import Folder, made_of, read_manifest, write_json
from utils.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.loader import TrainingSamples, WholeImages, whole_image_loader
from utils.log import environment, progress
from utils.maps import snapped_size
from utils.metrics import average_precision
from utils.options import NETWORK, skips_bad
from utils.random_walk import half_disc
from utils.transforms import Augmentation, cutmix
from utils.visualize import read_mask

LONG_SIDE = (0.625, 1.25)  # range of the image's long side in crop sizes: 320..640 at crop 512 (IRN)
DESCRIPTORS = 65_536  # to which the common-object head is fitted: 0.27 GB at 1024 channels


def network_options(kind, options, classes=0):
    """How `build_network` is to build the network of a run."""
    return {"kind": kind, **{name: options[name] for name in NETWORK}, "classes": classes}


def network_of(payload, args):
    """How a checkpoint's classifier was built; UserError if the flags ask for another network."""
    record = payload["networks"]["classifier"]
    built = {name: record[name] for name in NETWORK if name in record}
    for name, value in built.items():
        if getattr(args, name) not in (None, value):
            raise UserError(f"{args.model_path} has {name} {value}, not {getattr(args, name)}; leave --{name} out")
    return built


def initialise(network, options):
    """Load --pretrained into the trunk, then freeze by --freeze and --bn; says what it did.

    With --pretrained left out, ImageNet weights are used where they can be had, and their absence is announced.
    """
    source = options["pretrained"] or ("none" if options["backbone"] == "resnet38" else None)
    try:
        loaded, line = load_pretrained(network.trunk, options["backbone"], source or "imagenet")
    except UserError as error:
        if source is not None:
            raise
        loaded, line = load_pretrained(network.trunk, options["backbone"], "none")
        print(f"WARNING: {error}\nWARNING: training starts from RANDOM weights; masks will be much worse",
              file=sys.stderr)
        options["pretrained"] = "none"
    print(line, file=sys.stderr)
    if "method" in options:
        _settle_method(network, options, bool(loaded))
    network.freeze(options["freeze"] if loaded else 0, options["bn"], loaded)


def _settle_method(network, options, pretrained):
    """Fill --method and --freeze if they were left out: `common` reads pretrained features, which must stay frozen."""
    needed = len(network.trunk.blocks()) - 1
    options["method"] = options["method"] or ("common" if pretrained else "cam")
    common = options["method"] == "common"
    if common and not pretrained:
        raise UserError("--method common reads pretrained features; pass --pretrained PATH, or --method cam")
    if options["method"] == "avc" and options["cutmix"]:
        raise UserError("--cutmix pastes images together, and --method avc asks what is one object; "
                        "leave one of them out")
    if options["method"] == "avc" and options["accumulate"] > 1:
        raise UserError("--method avc compares all images of a step, which --accumulate takes apart; leave one of them "
                        "out")
    if options["freeze"] is None:
        options["freeze"] = needed if common or options["method"] == "avc" else 2
        print(f"Chose method={options['method']} freeze={options['freeze']}", file=sys.stderr)
    if common and options["freeze"] < needed:
        raise UserError(f"--method common needs the features of the pretrained trunk: pass --freeze {needed} or more, "
                        "or --method cam")


def split_holdout(dataset, fraction, seed):
    """(positions to learn from, positions held out): a fixed random share, from the seed alone."""
    order = np.random.default_rng((seed, 7)).permutation(len(dataset)).tolist()
    held = round(len(dataset) * fraction) if len(dataset) >= 8 else 0
    return sorted(order[held:]), sorted(order[:held])


def rounded_crop(options):
    """The crop side moved to 16k + 1, where grid corners lie on pixel corners."""
    return snapped_size((options["crop_size"],) * 2, 16)[0]


def run_stage1(dataset, options, device):
    """Train the classifier, then write the split's CAMs to --cam_dir."""
    if dataset.labels is None or not dataset.labels.any():
        raise UserError(f"no image of split {dataset.split} in {dataset.root} has a label; stage 1 needs image labels")
    torch.manual_seed(options["seed"])
    how = network_options("classifier", options, len(dataset.classes))
    avc = options["method"] == "avc"
    how.update(record_of(options) if avc else {})
    network = build_network(**how)
    initialise(network, options)
    learn, held = split_holdout(dataset, options["val_fraction"], options["seed"])
    crop = rounded_crop(options)
    augmentation = Augmentation(crop, long_side=tuple(options["long_side"] or (crop * part for part in LONG_SIDE)))
    samples = TrainingSamples(dataset.subset(learn), augmentation, options["seed"], skip_bad=skips_bad(options))
    validate = _classifier_validation(dataset.subset(held), options, device) if held else None
    task = engine.Task(
        "stage1", network, avc_loss(options, len(learn)) if avc else _classifier_loss(options["cutmix"]), samples,
        len(learn), last_epoch_counts(validate) if avc else validate,
        lambda: {"classes": list(dataset.classes), "networks": {"classifier": pack(network, **how)}}, idle=avc)
    best_path = engine.train(task, options, options["output_dir"], device)
    best = load_checkpoint(best_path)
    record = best["networks"]["classifier"]
    if options["method"] == "common":
        if distributed.is_main():  # its samples are one stream of random numbers over all images
            record = fit_common_object(record, dataset, options, device)
            save_checkpoint(best_path, {**best, "networks": {"classifier": record}})
        distributed.barrier()
        record = load_checkpoint(best_path)["networks"]["classifier"]
    _write_cams(record, dataset, options, best_path, device)


def adopt_classifier(payload, dataset, options, device):
    """Stage 1 without training: take a classifier as it is, ours or a published one, and write the split's CAMs.

    A published one is copied to --output_dir, so that the CAMs' record points to a checkpoint of this project.
    Raises UserError if another classifier is there already.
    """
    record, path = payload["networks"]["classifier"], Path(options["model_path"])
    if not is_checkpoint(payload):
        path = Path(options["output_dir"]) / "model_best.pth.tar"
        if path.is_file() and record_hash(load_checkpoint(path)["networks"]["classifier"]) != record_hash(record):
            raise UserError(f"{path} is there already, with another classifier; pass another --output_dir")
        distributed.barrier()  # all have looked
        if distributed.is_main():
            save_checkpoint(path, {"step": "stage1", "options": options, "epoch": 0, "classes": payload["classes"],
                                   "networks": {"classifier": record}})
            write_json(path.parent / "options.json", {"step": "stage1", "options": options, **environment(device)})
    _write_cams(record, dataset, options, path, device)


def _write_cams(record, dataset, options, path, device):
    """The CAMs of a split; their record names the checkpoint `path`, which step 2 takes the classifier from."""
    folder = cam_folder(options["cam_dir"], record, dataset.classes, dataset.name, options)
    make_cams(record, dataset, folder, {**options, "model_path": str(path)}, device)


@torch.no_grad()
def fit_common_object(record, dataset, options, device):
    """The classifier's record with its common-object head fitted to descriptors sampled from the split's images."""
    classifier = unpack(record).to(device, memory_format=torch.channels_last)
    per_image = max(4, DESCRIPTORS // len(dataset))
    rng = torch.Generator().manual_seed(options["seed"])
    images = WholeImages(dataset, max_size=options["max_size"], stride=classifier.trunk.stride,
                         skip_bad=skips_bad(options))
    samples = []
    for item in progress(whole_image_loader(images, options["workers"], device), "common object", len(dataset)):
        labels = np.flatnonzero(dataset.labels[item["index"]])
        if len(labels):
            view = item["views"][0][None].to(device, memory_format=torch.channels_last)
            samples.append(_sample_descriptors(classifier, view, labels, per_image, rng, options["precision"]))
    descriptors, classes, cams = (torch.cat(parts) for parts in zip(*samples))
    classifier.cpu()
    share = classifier.common.fit(descriptors, classes, cams)
    print(f"Common object: fitted to {len(descriptors)} descriptors, {share:.0%} of them object", file=sys.stderr)
    return {**record, "state": {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}}


def _sample_descriptors(classifier, view, labels, count, rng, precision):
    """Up to `count` random cells of an image: features (n, D), the one of its classes whose normalised CAM is highest
    there (n,), and that CAM (n,)."""
    with engine.autocast(view.device, precision):
        maps = classifier.trunk(view)
        cam = classifier.head(maps[classifier.trunk.stages[-1]])[:, torch.from_numpy(labels)].float().relu()
    features = maps[classifier.trunk.stages[1]][0].float().flatten(1).T  # (N, D)
    cam = F.interpolate(cam, size=maps[classifier.trunk.stages[1]].shape[-2:], mode="bilinear", align_corners=True)
    chosen = torch.randperm(len(features), generator=rng)[:count]
    highest, which = (cam / cam.amax(dim=(2, 3), keepdim=True).clamp(min=1e-8))[0].flatten(1).cpu().max(dim=0)  # (N,)
    return features.cpu()[chosen], torch.from_numpy(labels)[which[chosen]], highest[chosen]


def _classifier_loss(cutmix_probability):
    def loss(network, batch, part):
        images, labels = batch["image"], batch["labels"]
        if cutmix_probability and torch.rand(()) < cutmix_probability:
            images, labels = cutmix(images, labels)
        return classification_loss(network(images), labels) * part.share, {}
    return loss


def _classifier_validation(dataset, options, device):
    """Mean average precision over the held-out images' labels."""
    def validate(network):
        own = dataset.share()
        images = WholeImages(own, max_size=rounded_crop(options), stride=network.trunk.stride,
                             skip_bad=skips_bad(options))
        logits = {}
        for item in whole_image_loader(images, options["workers"], device):
            view = item["views"][0][None].to(device, memory_format=torch.channels_last)
            logits[own.ids[item["index"]]] = network(view)[0].float().cpu().numpy()
        logits = distributed.merged(logits, dataset.ids)
        labels = {image_id: dataset.labels[index] for index, image_id in enumerate(dataset.ids)}
        found = average_precision(np.stack(list(logits.values())), np.stack([labels[image_id] for image_id in logits]))
        return {"score": float(np.nan_to_num(found))}
    return validate


def run_stage2(dataset, classifier, options, device):
    """Train AffinityNet on affinity labels made from the CAMs in --cam_dir.

    classifier: the stage-1 checkpoint that made them; it goes into this stage's checkpoint too.
    """
    record, dataset = classifier["networks"]["classifier"], made_of(dataset, options["cam_dir"])
    torch.manual_seed(options["seed"])
    how = network_options("affinity", options)
    network = build_network(**how)
    initialise(network, options)
    labels = _affinity_labels(dataset, options)
    learn, held = split_holdout(dataset, options["val_fraction"], options["seed"])
    learning = dataset.subset(learn)
    augmentation = Augmentation(rounded_crop(options), max_size=options["max_size"])
    samples = TrainingSamples(learning, augmentation, options["seed"], labels.reader(learning), skips_bad(options))
    offsets = half_disc(options["radius"])
    task = engine.Task(
        "stage2", network, _affinity_loss(offsets), samples, len(learn),
        _affinity_validation(dataset.subset(held), labels, offsets, options, device) if held else None,
        lambda: {"classes": list(dataset.classes), "networks": {
            "affinity": pack(network, **how), "classifier": record}}, _pair_totals(offsets))
    engine.train(task, options, options["output_dir"], device)


class _Labels(Folder):
    """The folder of affinity labels."""

    def reader(self, dataset):
        return lambda index: read_mask(self.path / f"{dataset.ids[index]}.png")


def _affinity_labels(dataset, options):
    manifest = read_manifest(options["cam_dir"], "cam")
    settings = {name: options[name] for name in ("alpha_low", "alpha_high", "max_size")}
    folder = _Labels(Path(options["output_dir"]) / "affinity_labels", "affinity_labels", ".png",
                     {"cam": manifest["identity"], **settings, **masks.crf_identity(options)})
    kept = folder.begin()
    if kept:
        print(f"{kept} affinity labels in {folder.path} have the same options and are kept", file=sys.stderr)
    masks.make_affinity_labels(dataset, options["cam_dir"], folder, options)
    folder.finish(dataset.ids, options, environment(), parent=options["cam_dir"])
    return folder


def _affinity_loss(offsets):
    def loss(network, batch, part):
        features = network(batch["image"])
        value, terms = affinity_loss(features, batch["target"][:, ::WALK_STRIDE, ::WALK_STRIDE], offsets, part.totals)
        return value, dict(zip(KINDS, terms))
    return loss


def _pair_totals(offsets):
    return lambda batch: pair_counts(batch["target"][:, ::WALK_STRIDE, ::WALK_STRIDE], offsets)


def _affinity_validation(dataset, labels, offsets, options, device):
    """Minus the mean affinity loss over the held-out images, whole."""
    def validate(network):
        own = dataset.share()
        images = WholeImages(own, max_size=options["max_size"], stride=WALK_STRIDE, target=labels.reader(own),
                             skip_bad=skips_bad(options))
        losses = {}
        for item in whole_image_loader(images, options["workers"], device):
            features = network(item["views"][0][None].to(device, memory_format=torch.channels_last))
            target = item["target"][None, ::WALK_STRIDE, ::WALK_STRIDE].to(device)
            losses[own.ids[item["index"]]] = affinity_loss(features, target, offsets)[0].item()
        return {"score": -float(np.mean(list(distributed.merged(losses, dataset.ids).values())))}
    return validate
