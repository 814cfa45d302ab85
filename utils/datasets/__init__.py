"""Datasets behind one interface.  A new one is a file here, with a `Layout`, and a line in DATASETS."""
from pathlib import Path

from utils import distributed
from utils.config import DataConfig
from utils.datasets.base import Dataset, Layout
from utils.datasets.coco import COCO
from utils.datasets.contradictions import check_against_labels
from utils.datasets.folder import FOLDER
from utils.datasets.lists import plain, read_lines, without_suffix
from utils.datasets.pet import PET
from utils.datasets.voc import VOC
from utils.errors import UserError
from utils.log import say, warn

__all__ = ["DATASETS", "Dataset", "Layout", "open_dataset", "open_split"]

DATASETS: dict[str, Layout] = {"pet": PET, "voc": VOC, "coco": COCO, "folder": FOLDER}


def open_dataset(config: DataConfig) -> Dataset:
    """Open a split.

    config: `dataset` is a key of DATASETS, `split` None the training split.  `ids` names a text file: only images whose
    id is one of its lines are kept; `limit` keeps the first so many of them.  `difficult` (VOC): whether objects marked
    difficult count as image labels.  `download` fetches the data first if it is not there.
    Raises UserError, with the remedy, if anything that a later step needs is missing.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"no dataset {config.dataset!r}; pass --dataset {', '.join(DATASETS)}")
    layout, root = DATASETS[config.dataset], Path(config.data_root)
    if config.download:
        _download(config.dataset, root)
    if not root.is_dir():
        raise UserError(f"no data folder {root}; pass --data_root, or {layout.remedy}")
    dataset = layout.open(root, config.split, difficult=config.difficult)
    keep = range(len(dataset))
    if config.ids is not None:
        names = {plain(name) for name in dataset.files if name is not None}
        wanted = {without_suffix(plain(line), names) for line in read_lines(Path(config.ids), "# ")}
        keep = [i for i in keep if dataset.ids[i] in wanted]
        others = len(wanted) - len(keep)
        if keep and others:
            warn(f"WARNING: {others} of the {len(wanted)} ids in {config.ids} are not in split {dataset.split} of "
                 f"{root}")
    dataset = dataset.subset(keep[:config.limit])
    if not dataset.ids:
        chosen = f" among the ids of {config.ids}" if config.ids is not None else ""
        raise UserError(f"split {dataset.split} of {root} holds no image{chosen}; name another with --split")
    missing = [image_id for image_id, file in zip(dataset.ids, dataset.files) if file is None]
    if missing:
        raise UserError(f"split {dataset.split} names {missing[0]} (and {len(missing) - 1} more) but "
                        f"{dataset.image_dir} has no such image; complete the images or correct the split file")
    return dataset


def open_split(config: DataConfig) -> Dataset:
    """`open_dataset` for a script: in rank 0 first, and said; UserError if ground truth and labels cannot belong
    together.  No torch is imported, so that a wrong folder is known at once."""
    with distributed.main_first():  # what it downloads or parses is there for the others
        dataset = open_dataset(config)
    say(f"Split {dataset.split} of {dataset.root}: {len(dataset)} images, {len(dataset.classes)} classes")
    check_against_labels(dataset)
    return dataset


def _download(name: str, root: Path) -> None:
    download = DATASETS[name].download
    if download is None:
        there = ", ".join(key for key, layout in DATASETS.items() if layout.download)
        raise UserError(f"--download fetches --dataset {there}, not {name} into {root}")
    download(root)
