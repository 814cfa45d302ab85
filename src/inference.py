"""Step 3: CAMs, walked scores and masks of a split, every expensive result kept; or masks of any image files."""
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from src.features import Kept
from src.masks import MaskConfig, decide, full_size, overlay_path, write_mask, write_overlay
from src.pipeline import DeepLabPipeline, Pipeline
from src.records import record_hash
from src.split_map import map_split, network_threads, through_network, through_workers
from utils import distributed
from utils.config import Machine
from utils.crf import CRF
from utils.datasets.base import Dataset
from utils.errors import ImageError, UserError
from utils.files import load_cam, read_record, save_cam, save_scores, write_json
from utils.grids import capped_size, largest_view, resize_image, resize_labels
from utils.images import SUFFIXES, is_image_name, read_reduced
from utils.labels import save_mask
from utils.log import progress, warn
from utils.maps import foreground_probability
from utils.random_walk import walk_frames
from utils.store import MANIFEST, Folder
from utils.visualize import heatmap, named_overlay, overlay, save_gif, save_picture

LEDGER = "wsss_images.json"  # in a folder of --images: which files there are results
OVERLAY = 2048  # pixels of the long side that an overlay of a larger photo keeps at least
SHOWN = 8  # images of a split that are animated


@dataclass(frozen=True)
class Places:
    """Where maps of a split are kept.  cam_dir: of step 1.  home: beside the checkpoint they are made from."""
    cam_dir: str | None
    home: Path
    overwrite: bool = False


# --- a split ---------------------------------------------------------------------------------------------------------

def cam_folder(path: str | Path, pipeline: Pipeline, overwrite: bool) -> Folder:
    """The `Folder` of a pipeline's CAMs: what decides its files."""
    identity = {**asdict(pipeline.maps), "precision": pipeline.machine.precision, "classes": list(pipeline.classes),
                "classifier": record_hash(pipeline.records["classifier"])}
    return Folder(path, "cam", ".npz", identity, pipeline.maps.labels == "gt", overwrite)


def make_cams(pipeline: Pipeline, dataset: Dataset, folder: Folder, record: dict[str, object], keep: bool = False,
              kept: Kept | None = None) -> Dataset:
    """Write the CAM of every image of a split that is not there yet.

    record, keep: see `map_split`.  kept: feature maps by the same backbone, of the images at scale 1; they are used up.
    """
    keys_of, kept = known_keys(dataset, folder.labels), kept or Kept()

    def make(items: list[dict], ids: list[str]) -> None:
        cams = pipeline.cams([item["views"] for item in items], [item["size"] for item in items],
                             [keys_of(image_id) for image_id in ids], kept.take(ids, pipeline.machine.device))
        for image_id, cam in zip(ids, cams):
            save_cam(folder.path, image_id, cam.keys, cam.maps, cam.size)
    threads = network_threads(pipeline.classifier.backbone, pipeline.machine.device)
    return map_split(dataset, folder, lambda pending: through_network(
        pending, pipeline.cam_views(), make, pipeline.machine, "CAM", threads), record, keep=keep)


def known_keys(dataset: Dataset, known: bool) -> Callable[[str], np.ndarray | None]:
    """Function: image id -> its zero-based classes by the dataset's labels, or None if they are to be predicted."""
    if not known:
        return lambda image_id: None
    rows = dict(zip(dataset.ids, dataset.labels))
    return lambda image_id: np.flatnonzero(rows[image_id])


class SplitScores:
    """CAMs and walked scores of a split, kept beside the checkpoint that makes them and used again.

    cams: the `Folder` of CAMs: --cam_dir if it holds them all.  walks: that of walked scores; None without AffinityNet.
    last: the later of both.
    """

    def __init__(self, pipeline: Pipeline, dataset: Dataset, places: Places):
        self.pipeline, self.dataset = pipeline, dataset
        suffix, overwrite = f"{dataset.split}_{pipeline.maps.labels}", places.overwrite
        self.cams = cam_folder(places.home / f"cam_{suffix}", pipeline, overwrite)
        self.held = False
        if places.cam_dir is not None:
            # Step 1's folder is never completed from here: its manifest is the record that step 2 reads.
            of_step_1 = self.cams.at(places.cam_dir)
            self.held = of_step_1.holds(dataset)
            self.cams = of_step_1 if self.held else self.cams
        self.walks = None
        if "affinity" in pipeline.records:
            identity = {**asdict(pipeline.walk_config), "max_size": pipeline.maps.max_size,
                        "precision": pipeline.machine.precision, "cam": self.cams.identity,
                        "affinity": record_hash(pipeline.records["affinity"])}
            self.walks = Folder(places.home / f"walk_{suffix}", "walk", ".npz", identity, self.cams.labels, overwrite)
        self.last = self.walks or self.cams

    def check(self) -> None:
        """UserError, before any work, if these maps would meet finished ones that may not be made again."""
        if not self.held:
            self.cams.check(self.dataset)
        if self.walks is not None:
            self.walks.check(self.dataset)

    def make(self, record: dict[str, object]) -> None:
        """Make what is not there yet.  record: see `map_split`."""
        if self.held:
            print(f"Using the CAMs in {self.cams.path}: same classifier, options and data")
        else:
            make_cams(self.pipeline, self.dataset, self.cams, record, keep=True)
        if self.walks is not None:
            pipeline = self.pipeline
            map_split(self.dataset, self.walks, lambda pending: through_network(
                pending, pipeline.walk_views(), self._walk, pipeline.machine, "random walk",
                network_threads(pipeline.affinity_net.backbone, pipeline.machine.device)),
                record, self.cams.path, keep=True)

    def _walk(self, items: list[dict], ids: list[str]) -> None:
        keys, maps = zip(*(load_cam(self.cams.path, image_id) for image_id in ids))
        walked = self.pipeline.walks([item["views"][0] for item in items], maps)
        for item, image_id, own, scores in zip(items, ids, keys, walked):
            save_scores(self.walks.path, image_id, own, scores, item["size"])


def make_masks(dataset: Dataset, scores: Folder, folder: Folder, how: MaskConfig, record: dict[str, object],
               machine: Machine, overlays: bool) -> Dataset:
    """Write the masks of a split from its score maps, overlays/ beside them if asked."""
    work = partial(write_mask, score_dir=scores.path, folder=folder.path, how=how, overlays=overlays)
    threads = how.crf is not None and how.crf.backend == "torch"
    made = map_split(dataset, folder, lambda pending: through_workers(pending, work, machine, "masks", threads),
                     {**record, "classes": list(dataset.classes)}, scores.path)
    # Of masks that were kept.  Rank 0's list, as other ranks may already write some.
    lacking = distributed.broadcast([i for i, image_id in enumerate(made.ids) if overlays
                                     and not overlay_path(folder.path, image_id).is_file()])
    if lacking:
        through_workers(made.subset(lacking).shard(), partial(write_overlay, folder=folder.path), machine, "overlays")
    return made


def mask_folder(path: str | Path, scores: Folder, how: MaskConfig, overwrite: bool) -> Folder:
    """The `Folder` of masks made from a folder of score maps."""
    identity = {"scores": scores.identity, "bg_threshold": how.bg_threshold,
                **({} if how.bg_alpha is None else {"bg_alpha": how.bg_alpha}), **crf_identity(how.crf, how.max_size)}
    return Folder(path, "mask", ".png", identity, scores.labels, overwrite)


def crf_identity(crf: CRF | None, max_size: int) -> dict[str, object]:
    """What decides a CRF's results."""
    if crf is None:
        return {"crf": None}
    return {"crf": asdict(crf.params), "crf_backend": crf.backend, "max_size": max_size}


def run(scores: SplitScores, folder: Folder, how: MaskConfig, record: dict[str, object], extras: Sequence[str] = ()
        ) -> None:
    """Step 3: pseudo-masks of a split in `folder`.  extras: "overlays", "walks" (animations of the first images)."""
    scores.make(record)
    pipeline = scores.pipeline
    made = make_masks(scores.dataset, scores.last, folder, how, record, pipeline.machine, "overlays" in extras)
    if "walks" in extras and distributed.is_main():
        for index, image_id in enumerate(made.ids[:SHOWN]):
            path = folder.path / "walks" / f"{image_id}.gif"
            save_walk(path, pipeline, made.image(index), *load_cam(scores.cams.path, image_id))
    print(f"Wrote {len(made)} masks to {folder.path}")


def save_walk(path: Path, pipeline: Pipeline, image: np.ndarray, keys: np.ndarray, cam: np.ndarray) -> None:
    """Animate the propagation of one image: foreground probability after 0, 1, 2, 4, ... steps."""
    (stencil,), config = pipeline.stencils([pipeline.walk_views()(image)[0]]), pipeline.walk_config
    shown = {0} | {2 ** k for k in range(config.walk_steps.bit_length())} | {config.walk_steps}
    small = resize_image(image, capped_size(image.shape[:2], 320))
    frames = []
    for step, walked in walk_frames(pipeline.start(cam, stencil), stencil, pipeline.offsets, config.beta,
                                    config.walk_steps, every=1):
        if step in shown:
            probability, _ = foreground_probability(full_size(walked.cpu().numpy(), small.shape[:2]), keys)
            frames.append(overlay(small, heatmap(probability), 0.6))
    save_gif(path, frames, seconds_per_frame=0.4)


# --- any image files -------------------------------------------------------------------------------------------------

def list_images(path: Path) -> list[Path]:
    """The image files at a path: itself, or those of a folder, sorted, without results of --images; UserError if none.

    Hidden files do not count; what else is left out of a folder (other files, broken links, sub-folders) is named.
    """
    if path.is_dir():
        own = {*_ledger(path), LEDGER}
        files = sorted(file for file in path.iterdir() if file.name not in own and not file.name.startswith("."))
        is_image = [is_image_name(file.name) and file.is_file() for file in files]
        found = [file for file, is_one in zip(files, is_image) if is_one]
        if not found:
            raise UserError(f"{path} holds no image ({', '.join(SUFFIXES[:6])}, ...); pass another --images")
        others = [file.name + "/" * file.is_dir() for file, is_one in zip(files, is_image) if not is_one]
        if others and distributed.is_main():
            warn(f"Left out in {path}, as they are no image files: {', '.join(others[:5])}"
                 + (f" and {len(others) - 5} more" if len(others) > 5 else ""))
        return found
    if not path.is_file():
        raise UserError(f"no image {path}; pass an image or a folder with --images")
    return [path]


def _ledger(folder: Path) -> list[str]:
    """Names of the files in a folder that --images has written."""
    path = folder / LEDGER
    if not path.is_file():
        return []
    found = read_record(path, "delete it, and name another --output_dir", {"results": list})["results"]
    return [name for name in found if isinstance(name, str)]


def result_names(paths: Sequence[Path]) -> list[str]:
    """What each image's results are called: its stem, or its whole name where two images' results would meet."""
    names = [path.stem for path in paths]
    files = Counter(file for name in names for file in _results(name))
    names = [path.stem if all(files[file] == 1 for file in _results(path.stem)) else path.name for path in paths]
    files = Counter(file for name in names for file in _results(name))
    return names if max(files.values()) == 1 else [path.name for path in paths]


def _results(name: str) -> tuple[str, ...]:
    return (f"{name}.png", f"{name}_overlay.png", f"walks/{name}.gif", f"affinity/{name}_cam.png",
            f"affinity/{name}_affinitynet.png")


def check_results(paths: Sequence[Path], out: Path) -> None:
    """UserError, before any work, if results would be written into a folder of masks or over files of the user's."""
    if (out / MANIFEST).is_file():
        raise UserError(f"{out} holds the masks of a split ({MANIFEST}), which results of --images would mix with; "
                        "name another --output_dir")
    own = set(_ledger(out))
    foreign = [file for name in result_names(paths) for file in _results(name)
               if file not in own and (out / file).exists()]
    if foreign:
        raise UserError(f"{out / foreign[0]} is there already and was not made by --images; name another --output_dir, "
                        "or move it away")


def run_images(pipeline: Pipeline | DeepLabPipeline, paths: Sequence[Path], out: Path, how: MaskConfig,
               walks: bool = False) -> list[Path]:
    """Masks and overlays of image files, as a viewer displays them, in `out`; labels are predicted.

    walks: animate the propagation too, of a `Pipeline` with AffinityNet.
    Returns the images that were not skipped.
    """
    names = result_names(paths)
    listed = sorted({*_ledger(out), *(file for name in names for file in _results(name))})
    if distributed.is_main():
        write_json(out / LEDGER, {"results": listed})  # before the results: a killed run's count as made by --images
    distributed.barrier()
    try:
        made = []
        for file, name in progress(distributed.shard(list(zip(paths, names))), "masks"):
            if _write_results(pipeline, file, out, name, how, walks):
                made.append(file)
        done = {file for part in distributed.gather(made) for file in part}
    finally:  # under the name of a result that was not made, a photo of the user's may lie tomorrow
        if distributed.is_main():
            write_json(out / LEDGER, {"results": [file for file in listed if (out / file).is_file()]})
    return [file for file in paths if file in done]


def _write_results(pipeline: Pipeline | DeepLabPipeline, file: Path, out: Path, name: str, how: MaskConfig, walks: bool
                   ) -> bool:
    """Write the mask and the overlay of one image file; returns False for a damaged one that is to be skipped."""
    try:
        used = max(OVERLAY / 2, largest_view(pipeline.maps.max_size, pipeline.maps.scales))
        image, size = read_reduced(file, used, displayed=True)
    except ImageError as error:
        if not pipeline.machine.skip_bad:
            raise
        warn(f"Skipping {file}: {error}")
        return False
    if walks:
        cam = pipeline.cam(image)
        keys, scores = cam.keys, pipeline.scored(image, cam)
        save_walk(out / "walks" / f"{name}.gif", pipeline, image, cam.keys, cam.maps)
    else:
        keys, scores = pipeline.scores(image)
    mask = decide(image, keys, scores, how.crf, how.max_size, how.bg_threshold, size)
    save_mask(out / f"{name}.png", mask)
    small = resize_labels(mask, image.shape[:2])
    save_picture(out / f"{name}_overlay.png", named_overlay(image, small, pipeline.classes))
    named = ", ".join(pipeline.classes[key] for key in keys)
    print(f"{file}: {named}; foreground {np.mean(mask > 0):.0%} -> {out / f'{name}.png'}")
    return True
