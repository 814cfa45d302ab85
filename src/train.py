"""Stage 1, the CAM classifier, and stage 2, AffinityNet: what is trained, on what, with which loss."""
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.affinitynet import KINDS, affinity_loss, pair_counts
from models.backbone import Network, build_backbone
from models.classifier import Classifier
from models.weights import build_network, load_pretrained, pack, unpack
from src.features import Features, Kept
from src.inference import cam_folder, crf_identity, make_cams
from src.masks import LabelConfig, write_label
from src.pipeline import WALK_STRIDE, Pipeline
from src.records import record_hash
from src.seeds import attach, is_fitted
from src.seeds.cam import Plan, Seed
from src.split_map import map_split, through_workers
from src.training.head import fit_head
from src.training.loop import MicroBatch, Task, check_finite, train
from src.training.resume import check_same_data, data_hash, files_hash, resumed
from utils import distributed
from utils.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from utils.config import BackboneConfig, Config, Machine, MapConfig, TrainConfig, WalkConfig
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.files import contents_hash, write_json
from utils.grids import largest_view, snapped_size
from utils.labels import read_mask
from utils.loader import TrainingSamples, Views, WholeImages, whole_image_loader
from utils.log import environment, say, warn
from utils.metrics import average_precision
from utils.random_walk import half_disc
from utils.runtime import release_memory
from utils.store import BEST, NEWEST, Folder, read_manifest
from utils.transforms import Augmentation

LONG_SIDE = (0.625, 1.25)  # range of the image's long side in crop sizes: 320..640 at crop 512 (IRN)
Options = Mapping[str, object]  # the flat record of a run's flags: written to files, never read here


# --- what stages share -----------------------------------------------------------------------------------------------

def initialise(network: Network, backbone: str, pretrained: str, freeze: int, bn: str) -> Collection[str]:
    """Load --pretrained into the backbone, then freeze by --freeze and --bn; says what it did.

    Returns the names of the modules that came from the file, relative to the backbone.
    """
    loaded, line = load_pretrained(network.backbone, backbone, pretrained)
    say(line)
    network.freeze(freeze if loaded else 0, bn, loaded)
    return loaded


def deepest_loaded(backbone: nn.Module, loaded: Collection[str]) -> str:
    """The deepest stage of a backbone that came from a file; the last one if none did.  loaded: see `initialise`.

    A file may end before the network does, and a head fitted to features of random weights says little.
    """
    return next((stage for stage in reversed(backbone.stages) if any(f".{stage}." in f".{name}." for name in loaded)),
                backbone.stages[-1])


def split_holdout(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(images to train on, images held out): a fixed random part, from the seed alone."""
    order = np.random.default_rng((seed, 7)).permutation(len(dataset)).tolist()
    held = round(len(dataset) * fraction) if len(dataset) >= 8 else 0
    return dataset.subset(sorted(order[held:])), dataset.subset(sorted(order[:held]))


def rounded_crop(crop_size: int) -> int:
    """The crop side moved to 16k + 1, where grid corners lie on pixel corners."""
    return snapped_size((crop_size, crop_size), 16)[0]


def held_out(dataset: Dataset, images: Callable[[Dataset], WholeImages], machine: Machine
             ) -> Iterator[tuple[str, torch.Tensor, dict]]:
    """This rank's images of a split: (id, the first view as a batch on the device, item of `WholeImages`)."""
    own = dataset.shard()
    for item in whole_image_loader(images(own), machine):
        view = item["views"][0][None].to(machine.device, memory_format=torch.channels_last)
        yield own.ids[item["index"]], view, item


# --- stage 1 ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ClassifierPlan:
    """How stage 1 trains: the backbone and its initial weights, the seed method and its settings, and whereto.

    long_side: range of an image's long side in pixels, None for LONG_SIDE crops.  head_only: fit the head to features
    of whole images instead of training.
    """
    backbone: BackboneConfig
    pretrained: str
    training: TrainConfig
    seed: type[Seed]
    settings: Config
    maps: MapConfig
    long_side: tuple[int, int] | None = None
    head_only: bool = False


def settled_freeze(seed: type[Seed], settings: Config, backbone: BackboneConfig, pretrained: str, freeze: int | None,
                   accumulate: int, head_only: bool) -> int:
    """--freeze, by default what the seed method needs; UserError if stage 1 cannot run as planned."""
    with torch.device("meta"):
        blocks = len(build_backbone(**_built(backbone)).blocks())
    seed.check(Plan(settings, pretrained != "none", blocks, freeze, accumulate, head_only))
    return seed.default_freeze(blocks) if freeze is None else freeze


def _built(backbone: BackboneConfig) -> dict[str, object]:
    return {"name": backbone.backbone, "output_stride": backbone.output_stride, "width": backbone.width,
            "dilated": backbone.dilated}


def check_labelled(dataset: Dataset) -> None:
    """UserError unless there is a label to train the classifier on."""
    if dataset.labels is None or not dataset.labels.any():
        raise UserError(f"no image of split {dataset.split} in {dataset.root} has a label; stage 1 needs image labels")


def run_stage1(dataset: Dataset, plan: ClassifierPlan, machine: Machine, out: Path, cam_dir: Path, options: Options
               ) -> None:
    """Train the classifier in `out`, fit its seed, then write the split's CAMs to `cam_dir`."""
    best, kept = out / BEST, None
    if plan.head_only and plan.training.resume and _head_is_made(best, dataset, options):
        say(f"Resuming with {best}, which is finished: CAMs")
    else:
        best, kept = _make_classifier(dataset, plan, machine, out, options)
    kept = kept if any(plan.maps.plain()) else None
    release_memory()
    pipeline = Pipeline(load_checkpoint(best), plan.maps, WalkConfig(), machine)
    _write_cams(pipeline, best, dataset, cam_folder(cam_dir, pipeline, bool(options["overwrite"])), options, kept)


def _head_is_made(path: Path, dataset: Dataset, options: Options) -> bool:
    """Whether an earlier run has fitted this head and its seed; UserError if it had other options or data, or none."""
    payload = resumed(path, "stage1", options)
    check_same_data(payload, path, dataset)
    return is_fitted(payload["networks"]["classifier"])


def _make_classifier(dataset: Dataset, plan: ClassifierPlan, machine: Machine, out: Path, options: Options
                     ) -> tuple[Path, Kept]:
    """Train the classifier and fit its seed: the path of model_best, and the features that were kept on the way."""
    config = plan.training
    torch.manual_seed(config.seed)
    how = {"kind": "classifier", **asdict(plan.backbone), "classes": len(dataset.classes), "bias": plan.head_only}
    network = build_network(**how)
    loaded = initialise(network, plan.backbone.backbone, plan.pretrained, config.freeze, config.bn)
    last = deepest_loaded(network.backbone, loaded)
    if plan.head_only and last != network.last:
        say(f"The head reads {last}: the weights end there")
        how["last"] = last
        network = Classifier(network.backbone, len(dataset.classes), bias=True, last=last)
    how["seed"] = plan.seed.record(plan.settings)
    attach(network, how["seed"])

    def contents() -> dict[str, object]:
        return {"classes": list(dataset.classes), "networks": {"classifier": pack(network, **how)}}
    # Rank 0 alone fits the seed, whose samples are one stream of random numbers: the others keep nothing for it.
    wanted = network.seed.wanted(dataset.labels, config.seed) if plan.head_only and distributed.is_main() else ()
    kept = Kept((*network.seed.depths, network.last), {dataset.ids[i] for i in wanted})
    largest = largest_view(plan.maps.max_size, plan.maps.scales)
    if plan.head_only:
        features = Features(network, dataset, config.max_size, machine, kept, largest)
        best = _fit_head(network, features, contents, out, options)
    else:
        best = _train_classifier(network, dataset, contents, plan, machine, out, options)
    if plan.seed.closed_form:
        if distributed.is_main():
            payload = load_checkpoint(best)
            classifier = unpack(payload["networks"]["classifier"], attach)
            features = Features(classifier, dataset, config.max_size, machine, kept, largest)
            record = {**payload["networks"]["classifier"], "state": _fitted(classifier, features, config.seed)}
            save_checkpoint(best, {**payload, "networks": {"classifier": record}})
        distributed.barrier()
    return best, kept


def _train_classifier(network: Network, dataset: Dataset, contents: Callable[[], dict[str, object]],
                      plan: ClassifierPlan, machine: Machine, out: Path, options: Options) -> Path:
    """Train the classifier by gradient descent; returns the path of model_best.  contents: of its checkpoint."""
    config = plan.training
    learn, held = split_holdout(dataset, config.val_fraction, config.seed)
    crop = rounded_crop(config.crop_size)
    augmentation = Augmentation(crop, long_side=tuple(plan.long_side or (crop * part for part in LONG_SIDE)),
                                normalise=network.backbone.normalise)
    task = Task(
        "stage1", network, lambda net, batch, micro: net.seed.loss(net, batch, micro, plan.settings),
        TrainingSamples(learn, augmentation, config.seed, skip_bad=machine.skip_bad),
        partial(_mean_average_precision, held=held, max_size=crop, machine=machine) if len(held) else None,
        contents, sparse=plan.seed.sparse, keeps_last=plan.seed.keeps_last)
    return train(task, config, machine, out, options)


def _fit_head(network: Network, features: Features, contents: Callable[[], dict[str, object]], out: Path,
              options: Options) -> Path:
    """Fit the classifier's head to the pooled features of whole images; returns the path of model_best.

    Nothing is chosen by held-out images, so none are held out.
    """
    path, dataset = out / BEST, features.dataset
    pooled, seen = torch.zeros(len(dataset), network.head.in_channels), torch.zeros(len(dataset))
    for position, maps in features.maps(distributed.shard(range(len(dataset))), "features"):
        pooled[position] = maps[network.last].float().mean(dim=(2, 3))[0]
        seen[position] = 1
    pooled, seen = distributed.all_reduce(pooled), distributed.all_reduce(seen).bool()  # each rank has its own rows
    if not seen.any():
        raise UserError(f"none of the {len(dataset)} images of split {dataset.split} in {dataset.root} can be decoded")
    if distributed.is_main():
        rows = slice(None) if seen.all() else seen  # a mask would copy them
        weight, bias = fit_head(pooled[rows], torch.from_numpy(dataset.labels)[rows])
        with torch.no_grad():
            network.head.weight.copy_(weight[:, :, None, None])
            network.head.bias.copy_(bias)
        record = {"step": "stage1", "options": dict(options)}
        write_json(out / "options.json", {**record, **environment(features.machine.device)})
        (out / NEWEST).unlink(missing_ok=True)  # of an earlier training, which must not be resumed here
        save_checkpoint(path, {**record, "epoch": 0, "data": data_hash(dataset), "files": files_hash(dataset),
                               **contents()})
    distributed.barrier()
    return path


def check_adopted(payload: dict, path: Path) -> None:
    """UserError, before any work, if a published classifier would be copied over another one."""
    record = payload["networks"]["classifier"]
    if not is_checkpoint(payload) and path.is_file() \
            and record_hash(load_checkpoint(path)["networks"]["classifier"]) != record_hash(record):
        raise UserError(f"{path} is there already, with another classifier; pass another --output_dir")


def adopt_classifier(payload: dict, pipeline: Pipeline, path: Path, dataset: Dataset, folder: Folder, options: Options
                     ) -> None:
    """Stage 1 without training: take a classifier as it is, ours or a published one, and write the split's CAMs.

    payload: of the checkpoint at options["model_path"], and of the pipeline.  path: where a published one is copied to,
    so that the CAMs' record points to a checkpoint of this project.
    """
    if is_checkpoint(payload):
        path = Path(options["model_path"])
    else:
        distributed.barrier()  # all have looked
        if distributed.is_main():
            save_checkpoint(path, {"step": "stage1", "options": dict(options), "epoch": 0,
                                   "classes": payload["classes"], "networks": payload["networks"]})
            write_json(path.parent / "options.json", {"step": "stage1", "options": dict(options),
                                                      **environment(pipeline.machine.device)})
    _write_cams(pipeline, path, dataset, folder, options)


def _write_cams(pipeline: Pipeline, path: Path, dataset: Dataset, folder: Folder, options: Options,
                kept: Kept | None = None) -> None:
    """The CAMs of a split; their record names the checkpoint `path`, which step 2 takes the classifier from.

    kept: see `make_cams`.
    """
    record = {"options": {**options, "model_path": str(path)}, **environment(pipeline.machine.device)}
    made = make_cams(pipeline, dataset, folder, record, kept=kept)
    print(f"Wrote {len(made)} CAMs to {folder.path}")


def _fitted(classifier: Network, features: Features, seed: int) -> dict[str, torch.Tensor]:
    """The state of a classifier with its seed fitted in closed form.  features: of the split, by its backbone."""
    classifier.to(features.machine.device, memory_format=torch.channels_last)
    classifier.seed.fit(classifier, features.reader(f"fitting {classifier.seed.name}"), features.dataset.labels, seed)
    return {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}


def _mean_average_precision(network: Network, held: Dataset, max_size: int, machine: Machine) -> dict[str, float]:
    """Validation of stage 1: mean average precision over the held-out images' labels."""
    backbone = network.backbone

    def images(own: Dataset) -> WholeImages:
        return WholeImages(own, Views((1.0,), max_size, backbone.stride, backbone.normalise), skip_bad=machine.skip_bad)
    logits = {image_id: check_finite(network(view))[0].float().cpu().numpy()
              for image_id, view, _ in held_out(held, images, machine)}
    logits = distributed.gather_dict(logits, held.ids)
    if not logits:  # none can be decoded
        return {"score": math.nan}
    labels = dict(zip(held.ids, held.labels))
    found = average_precision(np.stack(list(logits.values())), np.stack([labels[image_id] for image_id in logits]))
    return {"score": float(np.nan_to_num(found))}


# --- stage 2 ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AffinityPlan:
    """How stage 2 trains: the backbone and its initial weights, the labels it makes from the CAMs in `cam_dir`, and the
    radius of pixel pairs in stride-8 cells."""
    backbone: BackboneConfig
    pretrained: str
    training: TrainConfig
    labels: LabelConfig
    radius: int
    cam_dir: Path


def run_stage2(dataset: Dataset, classifier: dict, plan: AffinityPlan, machine: Machine, out: Path, options: Options
               ) -> None:
    """Train AffinityNet on affinity labels made from the CAMs.

    dataset: the images that have a CAM.  classifier: the record of the classifier that made these; it goes into this
    stage's checkpoint too.
    """
    config = plan.training
    torch.manual_seed(config.seed)
    how = {"kind": "affinity", **asdict(plan.backbone)}
    network = build_network(**how)
    initialise(network, plan.backbone.backbone, plan.pretrained, config.freeze, config.bn)
    folder = label_folder(plan, out, bool(options["overwrite"]))
    dataset = _affinity_labels(dataset, plan, machine, folder, options)
    read = partial(read_label, folder=folder.path)
    if not any((read(dataset, i) % 255).any() for i in range(len(dataset))):  # 255: not confident
        warn(f"WARNING: no affinity label in {folder.path} has any foreground: the CAMs fire nowhere, or --alpha_low "
             "is too low; AffinityNet will learn nothing of objects")
    learn, held = split_holdout(dataset, config.val_fraction, config.seed)
    augmentation = Augmentation(rounded_crop(config.crop_size), max_size=config.max_size,
                                normalise=network.backbone.normalise)
    offsets = half_disc(plan.radius)
    task = Task(
        "stage2", network, partial(_affinity_loss, offsets=offsets),
        TrainingSamples(learn, augmentation, config.seed, read, machine.skip_bad),
        partial(_minus_affinity_loss, held=held, read=read, offsets=offsets, max_size=config.max_size, machine=machine)
        if len(held) else None,
        lambda: {"classes": list(dataset.classes), "networks": {"affinity": pack(network, **how),
                                                                "classifier": classifier}},
        lambda batch: pair_counts(_on_grid(batch["target"]), offsets),
        targets=contents_hash(folder.path / f"{image_id}.png" for image_id in dataset.ids))
    train(task, config, machine, out, options)


def read_label(dataset: Dataset, index: int, folder: Path) -> np.ndarray:
    """The affinity label of an image, uint8 (H, W)."""
    return read_mask(folder / f"{dataset.ids[index]}.png")


def label_folder(plan: AffinityPlan, out: Path, overwrite: bool) -> Folder:
    """The `Folder` of affinity labels in the output folder of stage 2: what decides its files."""
    manifest, how = read_manifest(plan.cam_dir, "cam"), plan.labels
    identity = {"cam": manifest["identity"], "alpha_low": how.alpha_low, "alpha_high": how.alpha_high,
                **crf_identity(how.crf, how.max_size)}
    return Folder(out / "affinity_labels", "affinity_labels", ".png", identity, manifest["labels"], overwrite)


def _affinity_labels(dataset: Dataset, plan: AffinityPlan, machine: Machine, folder: Folder, options: Options
                     ) -> Dataset:
    work = partial(write_label, cam_dir=plan.cam_dir, folder=folder.path, how=plan.labels)
    return map_split(dataset, folder, lambda pending: through_workers(
        pending, work, machine, "affinity labels", plan.labels.crf.backend == "torch"),
        {"options": dict(options), **environment(machine.device)}, plan.cam_dir)


def _on_grid(target: torch.Tensor) -> torch.Tensor:
    return target[:, ::WALK_STRIDE, ::WALK_STRIDE]


def _affinity_loss(network: Network, batch: Mapping[str, torch.Tensor], micro: MicroBatch,
                   offsets: list[tuple[int, int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    value, terms = affinity_loss(network(batch["image"]), _on_grid(batch["target"]), offsets, micro.totals)
    return value, dict(zip(KINDS, terms))


def _minus_affinity_loss(network: Network, held: Dataset, read: Callable[[Dataset, int], np.ndarray],
                         offsets: list[tuple[int, int]], max_size: int, machine: Machine) -> dict[str, float]:
    """Validation of stage 2: minus the mean affinity loss over the held-out images, whole."""
    def images(own: Dataset) -> WholeImages:
        views = Views((1.0,), max_size, WALK_STRIDE, network.backbone.normalise)
        return WholeImages(own, views, read, machine.skip_bad)
    losses = {}
    for image_id, view, item in held_out(held, images, machine):
        target = _on_grid(item["target"][None]).to(machine.device)
        losses[image_id] = affinity_loss(network(view), target, offsets)[0].item()
    return {"score": -float(np.mean(list(distributed.gather_dict(losses, held.ids).values())))}
