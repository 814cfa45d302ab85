"""report.html of steps 4 and 6: what stands around the cards of its gallery."""
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from src.cards import unscored_card
from src.masks import MaskConfig
from src.scoring import BOX, Stage, Tally
from utils import distributed
from utils.datasets.base import Dataset
from utils.log import commit_told, warn
from utils.parallel import map_parallel
from utils.report import Cards, Layer, Page, Row, hex_colours, worst_first, write_report
from utils.thumbnails import LEVELS
from utils.visualize import heatmap

NAME = "report.html"
LARGEST = 12_000  # images of a gallery: about 150 MB


def pictured(dataset: Dataset) -> list[str]:
    """Ids of the images that the gallery shows: all, or of a larger split LARGEST, evenly spread."""
    return [dataset.ids[i] for i in dataset.spread(LARGEST)]


def cards_in(out: Path, dataset: Dataset) -> Cards:
    """The empty `Cards` of the images that `pictured` names; rank 0 reads those of all ranks."""
    return Cards(out, pictured(dataset), shared=distributed.world() > 1)


def gather(cards: Cards, dataset: Dataset) -> None:
    """Have `cards.places` tell of the cards of all ranks, in the order of the split.  A collective."""
    cards.flush()
    cards.places = distributed.gather_dict(cards.places, dataset.ids)


def rows_of(stages: Sequence[Stage], how: MaskConfig, tallies: Mapping[str, Tally], table: Mapping[str, Mapping]
            ) -> list[Row]:
    """The lines of the score table.  table: of `src.eval.report`."""
    masks = {BOX, *(stage.name for stage in stages if stage.kind == "mask")}
    return [Row(name, None if name in masks else how.bg_threshold, table[name]["fixed"], table[name].get("oracle"),
                tally.fixed, tally.images) for name, tally in tallies.items()]


def write(out: Path, dataset: Dataset, cards: Cards, record: Mapping[str, object], stages: Sequence[Stage],
          rows: Sequence[Row], tallies: Mapping[str, Tally]) -> None:
    """Write the report of a scored split.  record: the options and the environment.  rows: from `rows_of`."""
    swept = {row.name: tallies[row.name] for row in rows if row.oracle}
    layers = [Layer(f"{stage.name} (CAM)" if stage.kind == "cam" else stage.name, "heat",
                    "foreground probability before the threshold") for stage in stages if stage.soft]
    layers += [Layer("mask", "mask", f"mask of the last stage, {stages[-1].name}"),
               Layer("ground truth", "truth", "ground truth; hatched grey is ignored")]
    ids = worst_first(cards.places, rows[-1].images)
    _write(out, dataset, cards, record, ids, layers, rows=rows,
           curves={name: tally.curve() for name, tally in swept.items()},
           thresholds=next(iter(swept.values())).sweep.thresholds().tolist() if swept else ())


def write_unscored(out: Path, dataset: Dataset, score_dir: Path, mask_dir: Path, workers: int,
                   record: Mapping[str, object]) -> None:
    """Write the report of a split without ground truth, from its score maps and masks; all ranks call it alike."""
    with cards_in(out, dataset) as cards:
        chosen = dataset.subset(dataset.spread(LARGEST))
        work = partial(unscored_card, score_dir=score_dir, mask_dir=mask_dir)
        for image_id, card in map_parallel(work, chosen.shard(), workers, "report"):
            cards.add(image_id, card)
        gather(cards, dataset)
        if distributed.is_main():
            layers = [Layer("scores", "heat", "foreground probability before CRF and threshold"),
                      Layer("mask", "mask", "mask")]
            _write(out, dataset, cards, record, list(cards.places), layers)
        distributed.barrier()


def tell_of_earlier(out: Path) -> None:
    """Say so if a report of an earlier run stays beside the new results."""
    if (out / NAME).is_file():
        warn(f"Note: {out / NAME} is of an earlier run, as --no-report was passed")


def _write(out: Path, dataset: Dataset, cards: Cards, record: Mapping[str, object], ids: Sequence[str],
           layers: Sequence[Layer], **scored: object) -> None:
    options = record["options"]
    source = "mask_dir" if options.get("mask_dir") else "model_path"
    labels = {"gt": "known", "predicted": "predicted"}.get(options["labels"], "unknown")
    facts = {"dataset": f"{dataset.name} in {dataset.root}", "split": dataset.split, "images": f"{len(dataset):,}",
             "classes": str(len(dataset.classes)), "image labels": labels,
             "masks" if source == "mask_dir" else "checkpoint": str(options[source]),
             "commit": commit_told(record),
             "machine": f"{record['device_name']}, torch {record['torch']}"}
    heat = hex_colours(heatmap(np.linspace(0, 1, LEVELS)[None])[0])
    page = Page(f"{dataset.name}, {dataset.split}", facts, options, dataset.classes, layers, ids, cards.places,
                len(dataset), heat, **scored)
    write_report(out / NAME, page, cards.read(cards.places[image_id] for image_id in ids))
    print(f"Wrote {out / NAME}")
