"""PASCAL VOC 2012 (Everingham et al., IJCV 2015) in its official layout, with SBD's extra masks where they are.

    VOCdevkit/VOC2012/                       --data_root
        JPEGImages/<id>.jpg
        Annotations/<id>.xml                 image labels
        ImageSets/Segmentation/{train,val,trainval,test,trainaug}.txt
        SegmentationClass/<id>.png           ground truth: 2,913 images
        SegmentationClassAug/<id>.png        optional: SBD's masks as pictures
    SBD/ or benchmark_RELEASE/               optional, in one of the two folders above: Hariharan et al., ICCV 2011
        dataset/{train,val}.txt, cls/<id>.mat
"""
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from utils.datasets.base import Dataset, Layout, Pictures, class_indices
from utils.datasets.lists import check_ids, check_tree, image_files, plain, read_lines
from utils.errors import UserError
from utils.files import cached_arrays
from utils.images import is_image_name
from utils.log import progress, say
from utils.recipes import PUBLISHED, by_step

CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
           "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
LISTS = Path("ImageSets") / "Segmentation"
TRAINING = ("trainaug", "train", "trainval")
SBD_FOLDERS = ("SBD", "sbd", "benchmark_RELEASE")


def open_voc(root: Path, split: str | None, difficult: bool = True) -> Dataset:
    """Open a split: train, val, trainval, test, trainaug or any other list in ImageSets/Segmentation.

    None is trainaug if its list or SBD is there, else train.  trainaug without its list is built from SBD's lists.
    difficult: whether objects that the XML marks difficult count as image labels, as they do in published code.
    """
    check_tree(root, ("JPEGImages", str(LISTS)), "a folder of PASCAL VOC 2012",
               ("VOC2012", "VOCdevkit/VOC2012", "VOCtrainval_11-May-2012/VOCdevkit/VOC2012"))
    sbd = _find_sbd(root)
    training = tuple(name for name in TRAINING
                     if (root / LISTS / f"{name}.txt").is_file() or name == "trainaug" and sbd)
    split = split or (training or ("train",))[0]
    ids = _ids(root, split, sbd)
    truth, lacking = _truth(root, sbd, ids)
    labels = None if split == "test" else _labels(root, ids, truth, difficult)
    return Dataset("voc", root, split, training, list(CLASSES), ids, labels, root / "JPEGImages",
                   image_files(root / "JPEGImages", ids), None if lacking else truth, lacking)


def _find_sbd(root: Path) -> Path | None:
    """The folder of SBD's lists and cls/, in or up to two folders above the dataset; None if there is none."""
    for place in (root, root.parent, root.parent.parent):
        for name in SBD_FOLDERS:
            for folder in (place / name, place / name / "dataset"):
                if (folder / "train.txt").is_file() and (folder / "val.txt").is_file():
                    return folder
    return None


def _ids(root: Path, split: str, sbd: Path | None) -> list[str]:
    path = root / LISTS / f"{split}.txt"
    if split == "trainaug" and not path.is_file():
        return _built_trainaug(root, sbd)
    ids = [_id_of(line) for line in read_lines(path, "# ")]
    check_ids(ids, path)
    return ids


def _id_of(line: str) -> str:
    """The image id in a line of a list.

    Some copies have lines of two paths, "/JPEGImages/2007_000032.jpg /SegmentationClassAug/...png", or of an id and
    whether a class is there (1, 0, -1).
    """
    words = line.replace("\\", "/").split()
    if len(words) == 2 and ("/" in words[1] or words[1] in ("1", "0", "-1")):
        line = words[0]
    name = plain(line.replace("\\", "/").rsplit("/", 1)[-1])
    return os.path.splitext(name)[0] if is_image_name(name) else name


def _built_trainaug(root: Path, sbd: Path | None) -> list[str]:
    if sbd is None:
        raise UserError(f"no {root / LISTS / 'trainaug.txt'}, and no SBD ({', '.join(SBD_FOLDERS)}) in {root} or the "
                        "two folders above it to build it from; put one of them there, or pass --split train")
    train, val = (_ids(root, name, None) for name in ("train", "val"))
    sbd_train, sbd_val = (read_lines(sbd / f"{name}.txt") for name in ("train", "val"))
    ids = sorted({*train, *sbd_train, *sbd_val} - set(val))
    say(f"Split trainaug: {len(ids)} images, built from the train ({len(sbd_train)}) and val ({len(sbd_val)}) lists "
        f"of {sbd} and VOC's train ({len(train)}), without VOC's val ({len(val)})")
    return ids


# --- ground truth ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VocMasks:
    """VOC's own masks where they are, else SBD's: as pictures (SegmentationClassAug), or in the .mat files of `sbd`."""
    pictures: Pictures
    sbd: Path | None

    def find(self, image_id: str) -> Path | None:
        """The path of an image's mask, or None if there is none."""
        path = self.pictures.find(image_id)
        if path or self.sbd is None:
            return path
        path = self.sbd / "cls" / f"{image_id}.mat"
        return path if path.is_file() else None

    def size(self, image_id: str) -> tuple[int, int] | None:
        """(H, W) of a mask that is a picture, from its header; None of others."""
        return self.pictures.size(image_id)

    def files(self, ids: Sequence[str]) -> list[Path]:
        """The masks that there are of some images."""
        return [path for path in map(self.find, ids) if path is not None]

    def __call__(self, image_id: str, labels: np.ndarray | None) -> tuple[Path, np.ndarray]:
        path = self.find(image_id)
        if path is None or path.suffix != ".mat":
            return self.pictures(image_id, labels)
        return path, class_indices(path, _read_mat(path), len(CLASSES))


def _truth(root: Path, sbd: Path | None, ids: Sequence[str]) -> tuple[VocMasks, str]:
    """(ground truth, in words what is missing of it: empty if every id has a mask)."""
    folders = (root / "SegmentationClass", root / "SegmentationClassAug")
    there = {Path(name).stem for folder in (*folders, *([sbd / "cls"] if sbd else [])) if folder.is_dir()
             for name in os.listdir(folder)}
    missing = [image_id for image_id in ids if image_id not in there]
    lacking = (f"{len(missing)} of its {len(ids)} images have no mask, such as {missing[0]}; SegmentationClass/, "
               "SegmentationClassAug/ or SBD may hold them") if missing else ""
    return VocMasks(Pictures(folders, len(CLASSES)), sbd), lacking


def _read_mat(path: Path) -> np.ndarray:
    """The class map of one of SBD's .mat files, uint8 (H, W)."""
    from scipy.io import loadmat
    try:
        values = loadmat(path)["GTcls"]["Segmentation"][0, 0]
        if values.ndim != 2 or values.dtype != np.uint8:
            raise ValueError(f"{values.dtype} {values.shape} instead of uint8 (H, W)")
        return values
    except Exception as error:  # on damaged bytes scipy raises nearly anything
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); fetch SBD's file again") from None


# --- image labels ----------------------------------------------------------------------------------------------------

def _labels(root: Path, ids: Sequence[str], truth: VocMasks, difficult: bool) -> np.ndarray:
    """(N, K) uint8 from Annotations/*.xml; of images without one, from their masks."""
    folder = root / "Annotations"
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    labels, unlabelled = np.zeros((len(ids), len(CLASSES)), np.uint8), []
    for index, image_id in enumerate(ids):
        if f"{image_id}.xml" in there:
            labels[index, _xml_classes(folder / f"{image_id}.xml", difficult)] = 1
        else:
            unlabelled.append(index)
    if unlabelled:
        labels[unlabelled] = _mask_labels(root, [ids[index] for index in unlabelled], truth)
    return labels


def _xml_classes(path: Path, difficult: bool) -> list[int]:
    """Indices of the classes that one annotation names.  Namespaces and the case of tags do not count."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}); replace the file") from None
    if _bare(root.tag) != "annotation":
        raise UserError(f"{path} is no annotation of VOC: its root is <{root.tag}>, not <annotation>; replace the file")
    objects = [{_bare(part.tag): (part.text or "").strip() for part in item}
               for item in root if _bare(item.tag) == "object"]
    names = {item.get("name", "") for item in objects if difficult or item.get("difficult", "0") != "1"}
    unknown = sorted(names - set(CLASSES))
    if unknown:
        raise UserError(f"{path} names the class {unknown[0]!r}, which VOC does not have; correct the file, or lay "
                        "your own classes out for --dataset folder")
    return [CLASSES.index(name) for name in names]


@functools.lru_cache(maxsize=1000)  # a dozen tags, a hundred thousand times
def _bare(tag: str) -> str:
    return str(tag).rsplit("}", 1)[-1].lower()


def _mask_labels(root: Path, ids: Sequence[str], truth: VocMasks) -> np.ndarray:
    """(N, K) uint8: which classes the masks show.  Kept in output/cache: reading thousands of masks takes a minute."""
    def build() -> dict[str, np.ndarray]:
        labels = np.zeros((len(ids), len(CLASSES)), np.uint8)
        for index, image_id in enumerate(progress(ids, "image labels from masks")):
            try:
                values = np.unique(truth(image_id, None)[1])
            except UserError as error:
                raise UserError(f"{image_id} has no annotation in {root / 'Annotations'} to take its labels from, "
                                f"and of its mask: {error}") from None
            labels[index, [value - 1 for value in values if 0 < value <= len(CLASSES)]] = 1
        return {"labels": labels}
    masks = [(image_id, _stamp(truth.find(image_id))) for image_id in ids]
    return cached_arrays("voc_labels", {"root": str(root.resolve()), "masks": masks}, build)["labels"]


def _stamp(path: Path | None) -> tuple[str, str, int, int] | None:
    """(folder, name, bytes, time of change) of a mask: tells whether it is still the one that was read."""
    if path is None:
        return None
    status = path.stat()
    return path.parent.name, path.name, status.st_size, status.st_mtime_ns


VOC = Layout(open_voc, "data/VOCdevkit/VOC2012", "val", by_step(1024, PUBLISHED), scored_split="train")
