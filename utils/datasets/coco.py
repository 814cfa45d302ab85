"""MS COCO 2014 (Lin et al., ECCV 2014) in its official layout; labels and masks come straight from its JSON.

    coco/                                     --data_root
        train2014/COCO_train2014_<12 digits>.jpg
        val2014/COCO_val2014_<12 digits>.jpg
        annotations/instances_train2014.json  instances_val2014.json
        masks/train2014/  masks/val2014/      optional: python -m data.prepare_coco

The JSON is parsed once; what is needed of it is kept in output/cache as arrays that are mapped, not loaded: per object
its class and its run-length encoding, 3 to 10 times smaller than the polygons.
"""
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import store  # the module, not its names: it imports utils.datasets.base and may still be loading
from utils.datasets.base import Dataset, Layout, Pictures, check_tree, image_files
from utils.errors import UserError
from utils.files import cached_arrays, file_stamp
from utils.labels import IGNORE
from utils.log import progress
from utils.recipes import PUBLISHED, by_step

Table = dict[str, np.ndarray]
# name: (folder and JSON, whether images without any object are left out)
SPLITS = {"train": ("train2014", True), "val": ("val2014", False), "val_labelled": ("val2014", True)}


def open_coco(root: Path, split: str | None, difficult: bool = True) -> Dataset:
    """Open a split.

    split: train (or None): the 82,081 images with at least one annotated object, a crowd included; val: all images;
    val_labelled: its 40,137 images with an object.  difficult: ignored.
    """
    split = split or "train"
    if split not in SPLITS:
        raise UserError(f"COCO 2014 has no split {split!r}; pass --split {', '.join(SPLITS)}")
    folder, labelled = SPLITS[split]
    check_tree(root, ("annotations", folder), "a folder of MS COCO 2014", ("coco", "coco2014", "COCO", "mscoco"))
    source = annotations_path(root, folder)
    table = open_annotations(source)
    chosen = np.flatnonzero(np.diff(table["first"])) if labelled else np.arange(len(table["stems"]))
    ids = [stem.decode() for stem in table["stems"][chosen]]
    files = image_files(root / folder, ids)
    _check_split(source, root / folder, ids, files)
    pictures = Pictures((root / "masks" / folder,), len(table["classes"]))
    truth = pictures if prepared(root, folder).complete() else Rendered(source)
    return Dataset("coco", root, split, ("train",), [str(name) for name in table["classes"]], ids,
                   _labels(table)[chosen], root / folder, files, truth)


def annotations_path(root: Path, folder: str) -> Path:
    """The instances JSON of the images in `folder`."""
    return root / "annotations" / f"instances_{folder}.json"


def _check_split(source: Path, folder: Path, ids: Sequence[str], files: Sequence[str | None]) -> None:
    """UserError if the JSON is that of another split: none of its images is in the split's folder."""
    if ids and not any(files):
        raise UserError(f"{source} names images such as {ids[0]}, but none of its {len(ids)} images is in {folder}; "
                        "is it the JSON of the other split, or are the images not unpacked?")


def _labels(table: Table) -> np.ndarray:
    """(N, K) uint8: the classes of each image's objects."""
    labels = np.zeros((len(table["stems"]), len(table["classes"])), np.uint8)
    image = np.repeat(np.arange(len(labels)), np.diff(table["first"]))
    labels[image, table["category"]] = 1
    return labels


# --- ground truth ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rendered:
    """Ground truth rendered from the JSON `source` on demand: see `render`."""
    source: Path

    def __call__(self, image_id: str, _: np.ndarray | None) -> tuple[str, np.ndarray]:
        table = open_annotations(self.source)
        return f"{self.source} ({image_id})", render(table, int(np.searchsorted(table["stems"], image_id.encode())))


def render(table: Table, row: int) -> np.ndarray:
    """The mask of an image, uint8 (H, W): crowds (255) at the bottom, then objects, a smaller one over a larger one.

    table: from `open_annotations`.  row: the image's place in it.
    """
    from pycocotools import mask as rle
    size = [int(side) for side in table["sizes"][row]]
    mask = np.zeros(size, np.uint8)
    objects = np.arange(*table["first"][row:row + 2])
    if not len(objects):
        return mask
    starts = table["counts_first"]
    encoded = [{"size": size, "counts": table["counts"][starts[i]:starts[i + 1]].tobytes()} for i in objects]
    shapes = rle.decode(encoded).astype(bool)  # (H, W, objects)
    crowd, area = table["crowd"][objects], table["area"][objects].astype(np.int64)
    for place in np.lexsort((-area, ~crowd)):
        mask[shapes[..., place]] = IGNORE if crowd[place] else table["category"][objects[place]] + 1
    return mask


def prepared(root: Path, folder: str, overwrite: bool = False) -> "store.Folder":
    """The masks that data/prepare_coco.py writes.  overwrite: whether those of another JSON may be made again."""
    identity = {"annotations": file_stamp(annotations_path(root, folder))[1:]}
    return store.Folder(root / "masks" / folder, "coco_masks", ".png", identity, overwrite=overwrite)


# --- the JSON --------------------------------------------------------------------------------------------------------

def open_annotations(source: Path) -> Table:
    """What is needed of an instances JSON, as arrays; parsed once, then mapped from output/cache.

    Returns a dict: "classes" (K,) str, in the order of their ids, gaps closed; "stems" (N,) bytes, the image ids,
    sorted; "sizes" (N, 2) int32, (H, W); "first" (N + 1,) int64, the objects of image i being first[i] to first[i + 1];
    of the M objects: "category" uint8, zero-based, "crowd" bool, "area" uint32 in rendered pixels, "counts" uint8, the
    compressed run-length encodings one after the other, and "counts_first" (M + 1,) int64.
    Raises UserError if the file is missing, truncated, or no instances JSON.
    """
    return _open_annotations(str(source), file_stamp(source))


@functools.lru_cache(maxsize=4)
def _open_annotations(source: str, stamp: tuple[str, int, int]) -> Table:
    return cached_arrays("coco", {"stamp": stamp}, lambda: _parse(Path(source)))


def _parse(source: Path) -> Table:
    print(f"Parsing {source}: once, it is then read from output/cache", file=sys.stderr)
    content = _read_json(source)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    images = sorted(content["images"], key=lambda image: Path(image["file_name"]).stem)
    row = {image["id"]: i for i, image in enumerate(images)}
    index = {category["id"]: i for i, category in enumerate(categories)}
    objects = [[] for _ in images]
    for annotation in content["annotations"]:
        if annotation["image_id"] not in row or annotation["category_id"] not in index:
            raise UserError(f"{source}: annotation {annotation.get('id')} is of image {annotation['image_id']}, class "
                            f"{annotation['category_id']}, of which the file does not have one; fetch it again")
        objects[row[annotation["image_id"]]].append(annotation)
    encoded = [_encoded(annotation, image, source) for image, own in zip(progress(images, "masks from JSON"), objects)
               for annotation in own]
    flat = [annotation for own in objects for annotation in own]
    return {"classes": np.array([category["name"] for category in categories]),
            "stems": np.array([Path(image["file_name"]).stem.encode() for image in images]),
            "sizes": np.array([(image["height"], image["width"]) for image in images], np.int32).reshape(-1, 2),
            "first": np.cumsum([0, *map(len, objects)], dtype=np.int64),
            "category": np.array([index[annotation["category_id"]] for annotation in flat], np.uint8),
            "crowd": np.array([annotation.get("iscrowd", 0) for annotation in flat], bool),
            "area": _areas(encoded),
            "counts": np.frombuffer(b"".join(code["counts"] for code in encoded), np.uint8),
            "counts_first": np.cumsum([0, *(len(code["counts"]) for code in encoded)], dtype=np.int64)}


def _read_json(source: Path) -> dict:
    try:
        with open(source, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise UserError(f"{source} is truncated or no JSON ({error}); fetch it again") from None
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"),
              "annotations": ("image_id", "category_id", "segmentation")}
    for part, fields in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(one, dict) and one.keys() >= set(fields) for one in rows):
            raise UserError(f"{source} is no instances JSON of COCO: its {part!r} must be a list of objects with "
                            f"{', '.join(fields)}; fetch instances_train2014.json and instances_val2014.json")
    return content


def _encoded(annotation: dict, image: dict, source: Path) -> dict:
    """Compressed run-length encoding of one object, from any of COCO's three forms."""
    from pycocotools import mask as rle
    shape, size = annotation["segmentation"], [image["height"], image["width"]]
    try:
        if isinstance(shape, list):
            return rle.merge(rle.frPyObjects(shape, *size))
        if shape["size"] != size:
            raise ValueError(f"it is {shape['size']}, the image {size}")
        if isinstance(shape["counts"], list):
            return rle.frPyObjects(shape, *size)
        return {"size": size, "counts": shape["counts"].encode()}
    except Exception as error:  # pycocotools raises whatever its C code meets
        raise UserError(f"{source}: cannot render annotation {annotation.get('id')} of {image['file_name']} ({error}); "
                        "fetch the file again") from None


def _areas(encoded: Sequence[dict]) -> np.ndarray:
    from pycocotools import mask as rle
    # One at a time: pycocotools counts the entries of a list in 8 bits.
    return np.array([int(rle.area(code)) for code in encoded], np.uint32)


COCO = Layout(open_coco, "data/coco", "val", by_step(1024, PUBLISHED))
