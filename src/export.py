"""Masks of a step, exported beside them to <output_dir>/export/<format>; see `utils.export`."""
from collections.abc import Sequence
from pathlib import Path

from src.inference import result_names
from src.masks import check_whole, mask_path, read_checked
from utils import distributed
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.export import MaskSet, check_export, write_export
from utils.images import image_size
from utils.store import made_of


def check_exports(names: Sequence[str] | None, out: Path, classes: Sequence[str], images: Sequence[Path] = ()) -> None:
    """UserError, before any work, unless masks can be exported to these formats beside an output folder.

    images: those of --images, if it is them that get masks.
    """
    for name in names or ():
        check_export(name, out / "export" / name, classes)
    results = result_names(images) if names and images else ()
    alike = [path for path, result in zip(images, results) if result != path.stem]
    if alike:
        raise UserError(f"--export: annotation tools know images by their names without the ending, and "
                        f"{alike[0].name} is not the only {alike[0].stem}; rename it")


def export_split(names: Sequence[str] | None, out: Path, mask_dir: Path, dataset: Dataset) -> None:
    """Export the masks of a split, without the images that could not be made.

    Rank 0 does it, once the masks of all ranks are there.
    UserError if an image has no mask, or one of another size or with values that are no class.
    """
    if names:
        distributed.barrier()
    if names and distributed.is_main():
        _write(names, out, of_split(made_of(dataset, mask_dir), mask_dir))


def of_split(dataset: Dataset, mask_dir: Path) -> MaskSet:
    """The masks that a folder holds of a split; 255 is allowed.  UserError if one is missing."""
    check_whole(mask_dir, dataset, "export them")
    photos = [dataset.image_path(index) for index in range(len(dataset))]
    return MaskSet(dataset.classes, dataset.split, dataset.split in dataset.training_splits, dataset.ids, photos,
                   [mask_path(mask_dir, image_id) for image_id in dataset.ids],
                   lambda path, index: read_checked(path, dataset.size(index), len(dataset.classes), ignore=True))


def export_images(names: Sequence[str] | None, out: Path, classes: Sequence[str], images: Sequence[Path]) -> None:
    """Export the masks that --images wrote to `out`, as the split "images".  images: those that have one."""
    if names:
        distributed.barrier()
    if names and distributed.is_main():
        stems = [path.stem for path in images]
        _write(names, out, MaskSet(
            classes, "images", True, stems, images, [out / f"{stem}.png" for stem in stems],
            lambda path, index: read_checked(path, image_size(images[index], displayed=True), len(classes))))


def _write(names: Sequence[str], out: Path, masks: MaskSet) -> None:
    for name in dict.fromkeys(names):
        home = out / "export" / name
        if write_export(name, home, masks):
            print(f"Wrote {home}: {len(masks)} masks for annotation tools")
        else:
            print(f"Using {home}: exported from the same masks")
