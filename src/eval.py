"""Step 4: masks against ground truth: tables, threshold sweeps, plots, pictures of a fixed sample and of the worst."""
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from src import gallery
from src.inference import SplitScores
from src.masks import MaskConfig, decide, full_size, mask_path
from src.scoring import BOX, Stage, Tally, score_split
from utils import distributed
from utils.datasets.base import Dataset
from utils.errors import ImageError
from utils.files import write_json
from utils.labels import IGNORE, read_mask
from utils.maps import foreground_probability
from utils.report import worst_first
from utils.store import made_of
from utils.visualize import heatmap, overlay, overlay_mask, panel, plot_bars, plot_curves

Table = dict[str, dict[str, dict]]  # stage -> "fixed" or "oracle" -> scores
WRITTEN = ("scores.json", "thresholds.png", "classes.png", "panel.png", "panel_worst.png")


def evaluate(dataset: Dataset, stages: Sequence[Stage], how: MaskConfig, workers: int, out: Path,
             options: Mapping[str, object], record: Mapping[str, object] | None = None) -> Table | None:
    """Score, report and picture a split; everything lands in `out`.  The table, in rank 0.

    options: for the record.  record: the options and the environment, for report.html; None writes none.
    """
    for stage in stages:
        dataset = made_of(dataset, stage.folder)
    with gallery.cards_in(out, dataset) if record else contextlib.nullcontext() as cards:
        tallies = score_split(dataset, stages, how, workers, cards)
        if record:
            gallery.gather(cards, dataset)
        table = None
        if distributed.is_main():
            remove_earlier(out)
            table = report(dataset, tallies, options, out)
            save_panels(dataset, stages, tallies, how, out)
            print(f"Wrote scores.json, plots and panels to {out}")
            if record:
                rows = gallery.rows_of(stages, how, tallies, table)
                gallery.write(out, dataset, cards, record, stages, rows, tallies)
            else:
                gallery.tell_of_earlier(out)
        distributed.barrier()  # rank 0 reads the cards of the others, which go with this block
    return table


def remove_earlier(out: Path) -> None:
    """Delete the scores and pictures of an earlier run, some of which the present one may not write."""
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)


def stages_of(scores: SplitScores, crf: bool) -> list[Stage]:
    """Seed, walk and mask; without AffinityNet no walk."""
    stages = [Stage("seed", "cam", scores.cams.path, bg_alpha=scores.pipeline.walk_config.bg_alpha)]
    if scores.walks is not None:
        stages += [Stage("walk", "scores", scores.walks.path)]
    return stages + [replace(stages[-1], name="mask", crf=True)] * crf


# --- the report ------------------------------------------------------------------------------------------------------

def report(dataset: Dataset, tallies: Mapping[str, Tally], options: Mapping[str, object], folder: Path) -> Table:
    """Print the table; write scores.json, the threshold curves and the per-class bars to `folder`."""
    table = {name: {"fixed": tally.fixed_scores()} for name, tally in tallies.items()}
    for name, tally in tallies.items():
        if tally.sweep.counts.any():
            threshold, best = tally.sweep.oracle()
            table[name]["oracle"] = {"threshold": threshold, **best}
    images = {image_id: {name: _rounded(tally.images[image_id]) for name, tally in tallies.items()}
              for image_id in dataset.ids}
    write_json(folder / "scores.json", {
        "dataset": dataset.name, "data_root": str(dataset.root), "split": dataset.split, "images": len(dataset),
        "labels": options["labels"], "classes": list(dataset.classes), "options": dict(options),
        "scores": _plain(table), "image_fg_iou": images})
    _print_table(table, dataset, options)
    _plots(dataset, tallies, table, folder)
    return table


def _print_table(table: Table, dataset: Dataset, options: Mapping[str, object]) -> None:
    print(f"{dataset.name} {dataset.split}, {len(dataset)} images, {len(dataset.classes)} classes + background, "
          f"labels: {options['labels']}")
    print(f"{'':<14}{'':<10}{'threshold':>9}{'mIoU':>9}{'fg IoU':>9}{'per image':>11}")
    for name, row in table.items():
        for kind, entry in row.items():
            fixed = name == BOX or options.get("mask_dir")
            threshold = "" if fixed else entry.get("threshold", options["bg_threshold"])
            print(f"{name:<14}{kind if len(row) > 1 else '':<10}{threshold:>9}{entry['miou']:>9.3f}"
                  f"{entry['fg_iou']:>9.3f}{entry['image_fg_iou']:>11.3f}")
    last = list(table)[-1]
    per_class = zip(["background", *dataset.classes], table[last]["fixed"]["iou"])
    print(f"{last}, IoU by class: " + "  ".join(f"{name} {'-' if iou is None else f'{iou:.3f}'}"
                                                for name, iou in per_class))


def _plots(dataset: Dataset, tallies: Mapping[str, Tally], table: Table, folder: Path) -> None:
    swept = {name: tally for name, tally in tallies.items() if "oracle" in table[name]}
    if swept:
        thresholds = next(iter(swept.values())).sweep.thresholds().tolist()
        curves = {name: tally.curve() for name, tally in swept.items()}
        plot_curves(folder / "thresholds.png", thresholds, curves, "foreground threshold", "mIoU")
    names = ["background", *dataset.classes]
    plot_bars(folder / "classes.png", names, {name: row["fixed"]["iou"] for name, row in table.items()}, "IoU")


def save_panels(dataset: Dataset, stages: Sequence[Stage], tallies: Mapping[str, Tally], how: MaskConfig, folder: Path,
                count: int = 6) -> None:
    """Panels of a fixed sample of images and of the worst ones by the last stage: image | stages | ground truth."""
    last = tallies[stages[-1].name].images
    fixed = dataset.spread(count)
    worst = [dataset.ids.index(image_id) for image_id in worst_first(dataset.ids, last)[:count]]
    titles = ["image", *(stage.name for stage in stages), "ground truth"]
    for name, chosen in (("panel.png", fixed), ("panel_worst.png", worst)):
        rows = {}
        for i in chosen:
            with contextlib.suppress(ImageError):  # masks can be scored without their photo
                rows[f"{dataset.ids[i]}  {last[dataset.ids[i]]:.2f}"] = _panel_row(dataset, i, stages, how)
        if rows:
            panel(list(rows.values()), titles, list(rows)).save(folder / name)


def _panel_row(dataset: Dataset, index: int, stages: Sequence[Stage], how: MaskConfig) -> list[np.ndarray]:
    image, image_id = dataset.image(index), dataset.ids[index]
    pictures = [image]
    for stage in stages:
        if stage.kind == "mask":
            pictures.append(overlay_mask(image, read_mask(mask_path(stage.folder, image_id))))
            continue
        keys, probabilities = stage.probabilities(image_id)
        if stage.crf:
            mask = decide(image, keys, probabilities, how.crf, how.max_size, how.bg_threshold)
            pictures.append(overlay_mask(image, mask))
        else:
            probability, _ = foreground_probability(full_size(probabilities, image.shape[:2]), keys)
            pictures.append(overlay(image, heatmap(probability), 0.6))
    truth = dataset.mask(index)
    return [*pictures, overlay_mask(image, np.where(truth == IGNORE, 0, truth))]


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _plain(value: object) -> object:
    """NaN, which JSON lacks, becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
