"""An archive of masks in the layout that the PASCAL VOC evaluation server takes."""
import tarfile
from pathlib import Path

from src.masks import check_whole, read_checked
from utils import distributed
from utils.config import DataConfig
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.files import atomic_path
from utils.log import progress

SUFFIXES = (".tgz", ".tar.gz")
SPLITS = ("test", "val")


def check_submission(path: str, data: DataConfig) -> None:
    """UserError, before any work, unless a submission can be made of the split and be written to `path`."""
    if data.dataset != "voc" or data.split not in SPLITS:
        raise UserError(f"--submission is for the VOC server's splits: pass --dataset voc --split {' or '.join(SPLITS)}"
                        f", not --dataset {data.dataset} --split {data.split}")
    if data.limit is not None or data.ids is not None:
        raise UserError("--submission needs every image of the split; leave --limit and --ids out")
    if not path.endswith(SUFFIXES):
        raise UserError(f"--submission {path}: the server takes a compressed tar; name it .tgz or .tar.gz")
    if Path(path).exists():
        raise UserError(f"--submission {path} is there already; delete it or name another")


def write_submission(path: str, mask_dir: Path, dataset: Dataset) -> None:
    """Pack the masks of a split as results/VOC2012/Segmentation/comp6_<split>_cls/<id>.png; the file appears whole.

    UserError if an image has no mask, or one of another size or with values that are no class (255 included).
    """
    if not distributed.is_main():
        return
    check_whole(mask_dir, dataset, "write the submission")
    place = f"results/VOC2012/Segmentation/comp6_{dataset.split}_cls"
    with atomic_path(path) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for index, image_id in enumerate(progress(dataset.ids, "submission")):
            source = Path(mask_dir) / f"{image_id}.png"
            read_checked(source, dataset.size(index), len(dataset.classes))
            archive.add(source, f"{place}/{image_id}.png", filter=_plain)
    print(f"Wrote {path}: {len(dataset)} masks in {place}/")


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The member without what tells about this machine."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
