"""Steps 5 and 6: DeepLabV1 trained on pseudo-masks (or on ground truth, the ceiling), and tested."""
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.backbone import Network
from models.deeplab import labelled_pixels, segmentation_loss
from models.weights import build_network, pack
from src import gallery
from src.eval import Stage, evaluate, remove_earlier
from src.inference import known_keys, make_masks, mask_folder
from src.masks import MaskConfig, check_complete, mask_path, read_checked
from src.pipeline import DeepLabPipeline
from src.records import record_hash
from src.split_map import map_split, network_threads, through_network
from src.train import held_out, initialise, rounded_crop, split_holdout
from src.training.loop import MicroBatch, Task, check_finite, train
from utils import distributed
from utils.config import BackboneConfig, Machine, TrainConfig
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.files import contents_hash, save_scores
from utils.grids import resize_labels
from utils.labels import IGNORE
from utils.loader import TrainingSamples, Views, WholeImages
from utils.metrics import confusion, scores
from utils.store import Folder
from utils.transforms import Augmentation

SAMPLE = 64  # training masks looked at before the work
SCALE = {"seamv1": (0.5, 1.5), "mctformer": (0.7, 1.3)}  # random scale of a training image, by DeepLab's head


# --- step 5 ----------------------------------------------------------------------------------------------------------

def mask_reader(dataset: Dataset, mask_dir: str) -> Callable[[Dataset, int], np.ndarray]:
    """How training masks are read: from a folder, or ground truth if mask_dir is "gt".

    Every mask of the split is looked for at once, so that a missing one does not stop a run at its end.
    """
    if mask_dir == "gt":
        dataset.check_truth()
        return read_truth
    check_complete(mask_dir, dataset.ids)
    read = partial(read_pseudo_mask, folder=Path(mask_dir))
    sample = dataset.spread(SAMPLE)
    if not any((read(dataset, index) % IGNORE).any() for index in sample):
        raise UserError(f"none of the {len(sample)} masks looked at in {mask_dir} shows an object: DeepLab would learn "
                        "that all is background; look at the maps they were made from, or name another --mask_dir")
    return read


def mask_hash(dataset: Dataset, mask_dir: str) -> str:
    """Tells the training masks of a folder from others; "gt" for ground truth."""
    return "gt" if mask_dir == "gt" else contents_hash(mask_path(Path(mask_dir), image_id) for image_id in dataset.ids)


def read_truth(dataset: Dataset, index: int) -> np.ndarray:
    """The ground truth of an image, uint8 (H, W)."""
    return dataset.mask(index)


def read_pseudo_mask(dataset: Dataset, index: int, folder: Path) -> np.ndarray:
    """The pseudo-mask of an image, uint8 (H, W)."""
    return read_checked(mask_path(folder, dataset.ids[index]), dataset.size(index), len(dataset.classes), ignore=True)


@dataclass(frozen=True)
class DeepLabPlan:
    """How DeepLab is trained: the backbone and its initial weights, the head, and how masks are read.

    masks: from `mask_hash`.
    """
    backbone: BackboneConfig
    pretrained: str
    training: TrainConfig
    head: str
    read: Callable[[Dataset, int], np.ndarray]
    masks: str


def run_training(dataset: Dataset, plan: DeepLabPlan, machine: Machine, out: Path, options: Mapping[str, object]
                 ) -> Path:
    """Step 5: train DeepLabV1 in `out`; returns the path of its best checkpoint."""
    config = plan.training
    torch.manual_seed(config.seed)
    how = {"kind": "deeplab", **asdict(plan.backbone), "classes": len(dataset.classes), "head": plan.head}
    network = build_network(**how)
    initialise(network, plan.backbone.backbone, plan.pretrained, config.freeze, config.bn)
    learn, held = split_holdout(dataset, config.val_fraction, config.seed)
    augmentation = Augmentation(rounded_crop(config.crop_size), scale=SCALE[plan.head], max_size=config.max_size,
                                normalise=network.backbone.normalise)
    task = Task(
        "deeplab", network, _loss, TrainingSamples(learn, augmentation, config.seed, plan.read, machine.skip_bad),
        partial(_miou, held=held, read=plan.read, max_size=config.max_size, machine=machine) if len(held) else None,
        lambda: {"classes": list(dataset.classes), "networks": {"deeplab": pack(network, **how)}},
        lambda batch: labelled_pixels(batch["target"]), targets=plan.masks)
    return train(task, config, machine, out, options)


def _loss(network: Network, batch: Mapping[str, torch.Tensor], micro: MicroBatch
          ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return segmentation_loss(network(batch["image"]), batch["target"], pixels=micro.totals), {}


def _miou(network: Network, held: Dataset, read: Callable[[Dataset, int], np.ndarray], max_size: int, machine: Machine
          ) -> dict[str, float]:
    """Validation: mIoU with the held-out images' training masks, one scale: pseudo-masks choose, not ground truth."""
    def images(own: Dataset) -> WholeImages:
        return WholeImages(own, Views((1.0,), max_size, network.backbone.stride, network.backbone.normalise),
                           skip_bad=machine.skip_bad)
    classes, position = len(held.classes) + 1, {image_id: i for i, image_id in enumerate(held.ids)}
    total = np.zeros((classes, classes), np.int64)
    for image_id, view, _ in held_out(held, images, machine):
        prediction = check_finite(network(view)).float()[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        total += confusion(prediction, resize_labels(read(held, position[image_id]), prediction.shape), classes)
    return {"score": scores(sum(distributed.gather(total)))["miou"]}


# --- step 6 ----------------------------------------------------------------------------------------------------------

def deeplab_folders(pipeline: DeepLabPipeline, out: Path, how: MaskConfig, overwrite: bool) -> tuple[Folder, Folder]:
    """The `Folder` of score maps, and that of masks, of step 6."""
    identity = {"deeplab": record_hash(pipeline.records["deeplab"]), "merge": pipeline.merge, **asdict(pipeline.maps),
                "precision": pipeline.machine.precision}
    maps = Folder(out / "scores", "deeplab", ".npz", identity, pipeline.maps.labels == "gt", overwrite)
    return maps, mask_folder(out / "masks", maps, how, overwrite)


def run_test(pipeline: DeepLabPipeline, dataset: Dataset, folders: tuple[Folder, Folder], how: MaskConfig,
             record: dict[str, object], overlays: bool, report: bool = False) -> None:
    """Step 6: masks and scores of a split from a DeepLab checkpoint.  folders: from `deeplab_folders`.

    Writes masks, and scores.json, plots and panels where the split has ground truth.  report: write report.html too.
    """
    (maps, folder), machine, out = folders, pipeline.machine, folders[1].path.parent
    keys_of = known_keys(dataset, maps.labels)

    def make(items: list[dict], ids: list[str]) -> None:
        for item, image_id in zip(items, ids):
            found = pipeline.probabilities(item["views"], item["size"], keys_of(image_id))
            save_scores(maps.path, image_id, *found, item["size"])
    dataset = map_split(dataset, maps, lambda pending: through_network(
        pending, pipeline.views(), make, machine, "DeepLab",
        network_threads(pipeline.deeplab.backbone, machine.device)), record)
    dataset = make_masks(dataset, maps, folder, how, record, machine, overlays)
    print(f"Wrote {len(dataset)} masks to {folder.path}")
    if dataset.truth is None:
        print(f"{dataset.root} has no ground truth for split {dataset.split}: masks only, no scores")
        if distributed.is_main():
            remove_earlier(out)
        if report:
            gallery.write_unscored(out, dataset, maps.path, folder.path, machine.workers, record)
        elif distributed.is_main():
            gallery.tell_of_earlier(out)
        return
    stages = [Stage("deeplab", "scores", maps.path)]
    stages += [Stage("+ CRF", "scores", maps.path, crf=True)] * (how.crf is not None)
    evaluate(dataset, stages, how, machine.workers, out, record["options"], record if report else None)
