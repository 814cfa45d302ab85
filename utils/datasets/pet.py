"""Oxford-IIIT Pet (Parkhi et al., CVPR 2012) in its official layout: 37 breeds, trimaps with a border."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.datasets.base import Dataset, Layout, mask_size, read_truth, translated
from utils.datasets.lists import check_ids, check_names, image_files, mask_file, plain, read_lines, without_mask
from utils.errors import UserError
from utils.labels import IGNORE
from utils.recipes import by_step


@dataclass(frozen=True)
class Trimaps:
    """Ground truth from trimaps: 1 pet, of the image's breed, 2 background, 3 border, which is ignored."""
    folder: Path

    def missing(self, ids: Sequence[str]) -> list[str]:
        """The ids without a trimap."""
        return without_mask([self.folder], ids)

    def size(self, image_id: str) -> tuple[int, int] | None:
        """(H, W) of a trimap, or None if there is none that can be read."""
        return mask_size(mask_file([self.folder], image_id))

    def files(self, ids: Sequence[str]) -> list[Path]:
        """The trimaps that there are of some images."""
        return [path for image_id in ids if (path := mask_file([self.folder], image_id)) is not None]

    def __call__(self, image_id: str, labels: np.ndarray) -> tuple[Path, np.ndarray]:
        path = mask_file([self.folder], image_id) or self.folder / f"{image_id}.png"
        mapping = {1: int(labels.argmax()) + 1, 2: 0, 3: IGNORE}
        return path, translated(path, read_truth(path), mapping, "1 (pet), 2 (background), 3 (border)")


def open_pet(root: Path, split: str | None, difficult: bool = True) -> Dataset:
    """images/, annotations/{list,trainval,test}.txt, annotations/trimaps/.  difficult: ignored."""
    split = split or "trainval"
    folder = root / "annotations"
    rows = _rows(folder / f"{split}.txt")
    # Class indices must not depend on the split, so they come from all the lists there are.
    known = dict(row for name in ("list", "trainval", "test") if (folder / f"{name}.txt").is_file()
                 for row in _rows(folder / f"{name}.txt"))
    known.update(rows)
    names = {class_id: image_id.rsplit("_", 1)[0] for image_id, class_id in known.items()}
    order = {class_id: index for index, class_id in enumerate(sorted(names))}
    labels = np.zeros((len(rows), len(order)), np.uint8)
    for index, (_, class_id) in enumerate(rows):
        labels[index, order[class_id]] = 1
    ids = [image_id for image_id, _ in rows]
    check_ids(ids, folder / f"{split}.txt")
    check_names([names[class_id] for class_id in order], folder)
    truth = Trimaps(folder / "trimaps") if (folder / "trimaps").is_dir() else None
    return Dataset("pet", root, split, ("trainval",), [names[class_id] for class_id in order], ids, labels,
                   root / "images", image_files(root / "images", ids), truth, "no folder annotations/trimaps")


def _rows(path: Path) -> list[tuple[str, int]]:
    rows = []
    for line in read_lines(path):
        words = line.rsplit(maxsplit=3)
        if len(words) < 4 or not all(word.isdecimal() for word in words[1:]):
            words = line.split()
        if len(words) < 2 or not words[1].isdecimal():
            raise UserError(f"{path} has the line {line[:60]!r}; expected: image CLASS-ID SPECIES BREED-ID")
        rows.append((plain(words[0]), int(words[1])))
    return rows


def download_pet(root: Path) -> None:
    """Fetch Pet through torchvision's dataset class, which unpacks into <parent>/oxford-iiit-pet.

    Raises UserError if `root` has another name, or if the download fails.
    """
    if root.name != "oxford-iiit-pet":
        raise UserError(f"--download fetches --dataset pet into a folder called oxford-iiit-pet, not into {root}")
    if (root / "annotations" / "trainval.txt").is_file():
        return
    from torchvision.datasets import OxfordIIITPet
    try:
        OxfordIIITPet(str(root.parent), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not download Oxford-IIIT Pet into {root} ({error}); fetch images.tar.gz and "
                        f"annotations.tar.gz by hand and unpack them there") from None


# Settings were chosen on the training third of Pet's sample (docs/results.md), where images are scaled to 512.
PET = Layout(open_pet, "data/oxford-iiit-pet", "test", by_step(512), download_pet,
             "download it with --download, or make toy data with: python -m data.make_toy")
