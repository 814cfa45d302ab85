"""Datasets behind one small interface: Oxford-IIIT Pet, PASCAL VOC 2012, MS COCO 2014, a plain folder."""
from pathlib import Path

from utils.errors import UserError
from utils.layouts.base import Dataset, read_lines
from utils.layouts.coco import open_coco
from utils.layouts.folder import open_folder
from utils.layouts.pet import download_pet, open_pet
from utils.layouts.voc import open_voc

__all__ = ["Dataset", "LAYOUTS", "open_dataset"]

LAYOUTS = {"pet": open_pet, "voc": open_voc, "coco": open_coco, "folder": open_folder}


def open_dataset(name, root, split=None, limit=None, ids_file=None, download=False, difficult=True):
    """Open a split.

    name: a key of LAYOUTS.  root: folder of the data.  split: None for the training split.
    limit: only the first so many images.  ids_file: a text file; only the ids that stand in it, one a line.
    difficult: (voc) whether objects marked difficult count as image labels.
    Raises UserError, with the remedy, if anything that a later step needs is not there.
    """
    root = Path(root)
    if download:
        if name != "pet" or root.name != "oxford-iiit-pet":
            raise UserError("--download fetches --dataset pet into a folder called oxford-iiit-pet, "
                            f"not {name} into {root}")
        download_pet(root)
    if not root.is_dir():
        made = "download it with --download, or make toy data with: python -m data.make_toy"
        raise UserError(f"no data folder {root}; pass --data_root, or {made if name == 'pet' else 'create it'}")
    dataset = LAYOUTS[name](root, split, difficult=difficult)
    keep = range(len(dataset))
    if ids_file is not None:
        wanted = set(read_lines(Path(ids_file)))
        keep = [i for i in keep if dataset.ids[i] in wanted]
    dataset = dataset.subset(list(keep)[:limit])
    if not dataset.ids:
        chosen = f" among the ids of {ids_file}" if ids_file is not None else ""
        raise UserError(f"split {dataset.split} of {root} holds no image{chosen}; name another with --split")
    missing = [image_id for image_id, file in zip(dataset.ids, dataset.files) if file is None]
    if missing:
        raise UserError(f"split {dataset.split} names {missing[0]} (and {len(missing) - 1} more) but "
                        f"{dataset.image_dir} has no such image; complete the images or correct the split file")
    return dataset
