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
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import store  # the module, not its names: it imports utils.datasets.base and may still be loading
from utils.datasets.base import Dataset, Layout, Pictures
from utils.datasets.lists import check_ids, check_names, check_tree, image_files, plain
from utils.errors import UserError
from utils.files import cached_arrays, file_stamp
from utils.labels import IGNORE
from utils.log import progress, say, warn
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

    def size(self, image_id: str) -> tuple[int, int]:
        """(H, W) of an image by the JSON."""
        table, row = self._row(image_id)
        return tuple(table["sizes"][row].tolist())

    def files(self, ids: Sequence[str]) -> list[Path]:
        """The JSON, which has the masks of all images."""
        return [self.source]

    def __call__(self, image_id: str, _: np.ndarray | None) -> tuple[str, np.ndarray]:
        return f"{self.source} ({image_id})", render(*self._row(image_id))

    def _row(self, image_id: str) -> tuple[Table, int]:
        """(table of the JSON, the image's place in it)."""
        table = open_annotations(self.source)
        return table, int(np.searchsorted(table["stems"], image_id.encode()))


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
    say(f"Parsing {source}: once, it is then read from output/cache")
    content = _read_json(source)
    index, names = _categories(content["categories"], source)
    row, stems, sizes = _images(content["images"], source)
    objects = [[] for _ in stems]
    for annotation in content["annotations"]:
        image, category = _key(annotation["image_id"]), _key(annotation["category_id"])
        if image not in row or category not in index:
            raise UserError(f"{source}: annotation {annotation.get('id')} is of image {annotation['image_id']}, class "
                            f"{annotation['category_id']}, of which the file does not have one; fetch it again")
        objects[row[image]].append((index[category], annotation))
    found = []  # (image, class, crowd, encoding)
    for place, own in enumerate(progress(objects, "masks from JSON")):
        for category, annotation in own:
            code = _encoded(annotation, sizes[place], stems[place], source)
            if code is not None:
                found.append((place, category, annotation.get("iscrowd") in (1, True), code))
    empty = len(content["annotations"]) - len(found)
    if empty:
        warn(f"WARNING: {source}: {empty} objects without any area (polygons of fewer than three points) are left out")
    encoded = [code for *_, code in found]
    counts = np.bincount([place for place, *_ in found], minlength=len(stems)) if found else np.zeros(len(stems), int)
    return {"classes": np.array(names),
            "stems": np.array([stem.encode() for stem in stems]),
            "sizes": np.array(sizes, np.int32).reshape(-1, 2),
            "first": np.cumsum([0, *counts], dtype=np.int64),
            "category": np.array([category for _, category, _, _ in found], np.uint8),
            "crowd": np.array([crowd for _, _, crowd, _ in found], bool),
            "area": _areas(encoded),
            "counts": np.frombuffer(b"".join(code["counts"] for code in encoded), np.uint8),
            "counts_first": np.cumsum([0, *(len(code["counts"]) for code in encoded)], dtype=np.int64)}


def _key(value: object) -> str | None:
    """An id as text, so that 7 and "7" are one; None for what is no id."""
    return str(value) if type(value) in (int, str) else None  # of JSON: a bool is neither


def _keys(rows: Sequence[dict], what: str, source: Path) -> list[str]:
    """The ids of images or categories; UserError unless they are whole numbers or texts, each once."""
    keys = [_key(row["id"]) for row in rows]
    wrong = next((row["id"] for row, key in zip(rows, keys) if key is None), None)
    if None in keys:
        raise UserError(f"{source}: {wrong!r} is no id of {what}; ids are whole numbers")
    if len(set(keys)) < len(keys):
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise UserError(f"{source} has two {what} of id {twice}; correct the file")
    return keys


def _categories(rows: Sequence[dict], source: Path) -> tuple[dict[str, int], list[str]]:
    """({id: zero-based class}, names) in the order of the ids."""
    keys = _keys(rows, "categories", source)
    wrong = next((row for row in rows if not isinstance(row["name"], str)), None)
    if wrong is not None:
        raise UserError(f"{source}: category {wrong['id']} has the name {wrong['name']!r}; name it")
    if len(rows) > 254:
        raise UserError(f"{source} has {len(rows)} categories; masks of 8 bits hold at most 254, so take out those "
                        "that no object has, or join some")
    order = sorted(range(len(rows)), key=lambda i: (0, int(keys[i]), "") if keys[i].isdecimal() else (1, 0, keys[i]))
    names = [plain(rows[i]["name"].strip()) for i in order]
    check_names(names, source)
    return {keys[i]: place for place, i in enumerate(order)}, names


def _images(rows: Sequence[dict], source: Path) -> tuple[dict[str, int], list[str], list[tuple[int, int]]]:
    """({id: place}, stems of the files, sizes (H, W)), sorted by stem."""
    keys, stems = _keys(rows, "images", source), []
    for image in rows:
        if not isinstance(image["file_name"], str) or not image["file_name"].strip():
            raise UserError(f"{source}: image {image['id']} has the file_name {image['file_name']!r}; name its file")
        sides = image["height"], image["width"]
        if not all(type(side) is int and 0 < side < 2**16 for side in sides):
            raise UserError(f"{source}: image {image['id']} has the height and width {sides[0]!r}, {sides[1]!r}; they "
                            "are whole numbers of pixels, 1 to 65535")
        # Some exports write folders, of Windows too, or addresses.
        name = plain(image["file_name"].strip()).split("?")[0].replace("\\", "/").rsplit("/", 1)[-1]
        stems.append(os.path.splitext(name)[0])
    check_ids(stems, source)
    order = sorted(range(len(rows)), key=lambda i: stems[i].encode())
    return ({keys[i]: place for place, i in enumerate(order)}, [stems[i] for i in order],
            [(rows[i]["height"], rows[i]["width"]) for i in order])


def _read_json(source: Path) -> dict:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")
    try:
        with open(source, encoding="utf-8-sig") as file:
            content = json.load(file, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is truncated or no JSON ({error}); fetch it again") from None
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"),
              "annotations": ("image_id", "category_id", "segmentation")}
    for part, fields in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(one, dict) and one.keys() >= set(fields) for one in rows):
            raise UserError(f"{source} is no instances JSON of COCO: its {part!r} must be a list of objects with "
                            f"{', '.join(fields)}; fetch instances_train2014.json and instances_val2014.json")
    return content


def _encoded(annotation: dict, size: tuple[int, int], stem: str, source: Path) -> dict | None:
    """Compressed run-length encoding of one object, from any of COCO's three forms; None for polygons without an area.

    Everything is checked first: on numbers that it does not expect, pycocotools reads and writes beyond its memory.
    """
    from pycocotools import mask as rle
    shape, size = annotation["segmentation"], list(size)
    try:
        if isinstance(shape, list):
            polygons = [polygon for polygon in shape if _shows(polygon, max(size))]
            return rle.merge(rle.frPyObjects(polygons, *size)) if polygons else None
        if list(shape["size"]) != size:
            raise ValueError(f"it is {shape['size']}, the image {size}")
        counts = shape["counts"]
        runs = [run if type(run) is int else -1 for run in counts] if isinstance(counts, list) else _runs(counts)
        if any(run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
            raise ValueError(f"its runs cover {sum(runs)} pixels of {size[0] * size[1]}")
        return rle.frPyObjects(shape, *size) if isinstance(counts, list) else {"size": size, "counts": counts.encode()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{source}: cannot render annotation {annotation.get('id')} of {stem} ({error}); fetch the "
                        "file again") from None


def _shows(polygon: list[float], side: int) -> bool:
    """Whether a polygon x, y, x, y, ... has three points.  ValueError or TypeError if it is none, or far outside its
    image, of which `side` is the longer side."""
    if len(polygon) % 2:
        raise ValueError("a polygon is not a list of x, y, x, y, ...")
    if not polygon or -side <= min(polygon) and max(polygon) <= 2 * side:  # JSON has no NaN: `_read_json` refuses it
        return len(polygon) >= 6
    raise ValueError("a polygon leaves its image by more than the image's size")


def _runs(counts: str) -> list[int]:
    """The runs in COCO's compressed text: numbers of 5 bits a character, from the third on less the last but one."""
    runs, value, shift = [], 0, 0
    for character in counts.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError("its counts are no run-length encoding")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError("its counts end within a number")
    return runs


def _areas(encoded: Sequence[dict]) -> np.ndarray:
    from pycocotools import mask as rle
    # One at a time: pycocotools counts the entries of a list in 8 bits.
    return np.array([int(rle.area(code)) for code in encoded], np.uint32)


COCO = Layout(open_coco, "data/coco", "val", by_step(1024, PUBLISHED))
