"""An HTML report of a split in one file: scores, threshold curves, classes, confusions, and a gallery of every image.

The file needs no network and no library: utils/report_page/ has its page, style and script. The gallery's pictures are
made while images are worked on (`Cards`), wait in a temporary file until the figures are known, and are copied from it
card by card: memory holds only where each card lies.
"""
from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import html
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from utils.files import atomic_path
from utils.thumbnails import LEVELS

PAGE = Path(__file__).parent / "report_page"
TOGETHER = 8  # cards in one block of data, which the page parses when it shows the first of them
# Told apart by readers with any kind of colour vision: Okabe & Ito (2008), then Tol's muted scheme (2021).
SAFE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
        "#332288", "#88ccee", "#44aa99", "#999933", "#ddcc77", "#882255", "#aa4499")
Scores = Mapping[str, object]  # as of `utils.metrics.scores`, with `image_fg_iou`; an oracle's with its `threshold`


class Place(NamedTuple):
    """Where a card lies, and what its image shows: values of the truth (None: unknown) and of the mask."""
    path: str | None
    start: int
    bytes: int
    truth: list[int] | None
    found: list[int]


class Cards:
    """Cards of a gallery in a temporary file, which goes with the block.

    wanted: ids of the images that get a card.  shared: let other processes read it, so that it needs a name; without
    one nothing is left even if this process is killed.  places: {image id: `Place`} of the cards added.
    """

    def __init__(self, folder: str | Path, wanted: Collection[str], shared: bool = False):
        self.folder, self.wanted, self.shared = Path(folder), frozenset(wanted), shared
        self.places, self.path, self.file = {}, None, None

    def __enter__(self) -> Cards:
        return self

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.shared:
            self.file = tempfile.TemporaryFile(dir=self.folder)
            return
        handle, self.path = tempfile.mkstemp(dir=self.folder, prefix=".report.html.", suffix=".tmp")
        self.file = os.fdopen(handle, "w+b")

    def add(self, image_id: str, card: Mapping[str, object]) -> None:
        """Write a card.

        card: "photo", text of a JPEG, or None if there is none; "layers", as of `utils.thumbnails`, one for each layer
        of the page but errors; "size", (H, W) of the image; "iou", {mask value: IoU}; "truth", "found": see `Place`.
        """
        if self.file is None:  # not before: a run that fails at its first image leaves nothing, not even the folder
            self._open()
        text = _json({key: card[key] for key in ("photo", "layers", "size", "iou")}).encode("ascii")
        self.places[image_id] = Place(self.path, self.file.tell(), len(text), card["truth"], card["found"])
        self.file.write(text)

    def flush(self) -> None:
        """Let others read what has been added; after the last card."""
        if self.file is not None:
            self.file.flush()

    def read(self, places: Iterable[Place]) -> Iterator[str]:
        """The texts of cards, one at a time, from this file and those of other processes."""
        with contextlib.ExitStack() as stack:
            files = {self.path: self.file}
            for place in places:
                if place.path not in files:
                    files[place.path] = stack.enter_context(open(place.path, "rb"))
                files[place.path].seek(place.start)
                yield files[place.path].read(place.bytes).decode("ascii")

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self.file.close()
        if self.path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


@dataclass(frozen=True)
class Row:
    """A line of the score table.

    threshold: of `fixed`, None where there is none.  oracle: the best of a sweep, or None.  confusion: (C, C) at the
    fixed threshold, rows truth.  images: {image id: foreground IoU, NaN where there is none}.
    """
    name: str
    threshold: float | None
    fixed: Scores
    oracle: Scores | None
    confusion: np.ndarray
    images: Mapping[str, float]


@dataclass(frozen=True)
class Layer:
    """What a gallery's picture can show over the photo.  kind: "heat", "mask" or "truth"."""
    name: str
    kind: str
    note: str


@dataclass(frozen=True)
class Page:
    """What a report says beside its pictures.

    facts: {name: text} of its head.  options: of the run.  classes: names of the K foreground classes.
    rows: the score table, empty without ground truth; the last row's IoU orders the gallery.
    thresholds, curves: {row's name: mIoU at each threshold}.  ids: of the gallery's images, in the order of the cards.
    places: {image id: `Place`}.  images: of the split.  heat: colours of LEVELS levels as #rrggbb.
    """
    title: str
    facts: Mapping[str, str]
    options: Mapping[str, object]
    classes: Sequence[str]
    layers: Sequence[Layer]
    ids: Sequence[str]
    places: Mapping[str, Place]
    images: int
    heat: Sequence[str]
    rows: Sequence[Row] = ()
    thresholds: Sequence[float] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


def worst_first(ids: Iterable[str], iou: Mapping[str, float]) -> list[str]:
    """Image ids by rising IoU, those without one last."""
    return sorted(ids, key=lambda image_id: np.nan_to_num(iou[image_id], nan=2.0))


def write_report(path: str | Path, page: Page, cards: Iterable[str]) -> None:
    """Write a report; the file appears whole or not at all.

    cards: texts from `Cards.read`, in the order of `page.ids`; they are taken one by one.
    Raises ValueError unless there are as many as ids.
    """
    top, bottom = _frame(page).split("<!-- cards -->")
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n",
                                                errors="xmlcharrefreplace") as file:
        file.write(top)
        count = 0
        for count, card in enumerate(cards, start=1):
            block, place = divmod(count - 1, TOGETHER)
            if place == 0:
                file.write(("]</script>\n" if block else "")
                           + f'<script type="application/json" id="cards{block}">[')
            file.write(("," if place else "") + card)
        file.write(("]</script>" if count else "") + bottom)
        if count != len(page.ids):
            raise ValueError(f"{path}: {count} cards for {len(page.ids)} images")


# --- the page --------------------------------------------------------------------------------------------------------

def _frame(page: Page) -> str:
    """The page around the cards."""
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    text = html.escape
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script), title=text(page.title),
        date=text(datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
        facts="".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in page.facts.items()),
        options="".join(f"<tr><th scope=row>{text(name)}</th><td>{text(_told(value))}</td></tr>"
                        for name, value in sorted(page.options.items()) if value is not None),
        table=_table(page.rows), curves=_curves(page), scored="" if page.rows else "hidden",
        swept="" if page.curves else "hidden", data=_json(_data(page)))


def _hash(code: str) -> str:
    """What a content security policy names a script or a style by."""
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def _json(value: object) -> str:
    """JSON in ASCII that may stand in a script element: no text can end it, or begin a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(rows: Sequence[Row]) -> str:
    """The body of the score table: for each row its scores at the fixed threshold and, told apart, the oracle's."""
    def cells(threshold: float | None, entry: Scores | None, kind: str) -> str:
        values = [None if entry is None else entry[key] for key in ("miou", "fg_iou", "image_fg_iou")]
        shown = ["" if threshold is None else f"{threshold:.2f}", *("" if value is None else f"{value:.3f}"
                                                                    for value in values)]
        return "".join(f"<td role=cell class={kind}>{value}</td>" for value in shown)
    return "".join(
        f"<tr role=row><th role=rowheader scope=row>{html.escape(row.name)}</th>"
        + cells(row.threshold, row.fixed, "fixed")
        + f"<td role=cell class=gap>{'oracle' if row.oracle else ''}</td>"
        + cells(row.oracle and row.oracle["threshold"], row.oracle, "oracle") + "</tr>\n" for row in rows)


def _curves(page: Page, width: int = 620, height: int = 300) -> str:
    """mIoU over thresholds as an SVG of its own: a line for each row, its oracle, and the fixed threshold."""
    values = [value for curve in page.curves.values() for value in curve if not np.isnan(value)]
    if not values:
        return ""
    left, right, top, bottom = 44, 12, 12, 40
    low, high = np.floor(min(values) * 5) / 5, max(np.ceil(max(values) * 5) / 5, np.floor(min(values) * 5) / 5 + 0.2)

    def x(threshold: float) -> float:
        return round(left + (width - left - right) * threshold, 1)

    def y(value: float) -> float:
        return round(height - bottom - (height - top - bottom) * (value - low) / (high - low), 1)
    parts = [f'<line class=rule x1={left} x2={width - right} y1={y(tick)} y2={y(tick)} /><text class=tick x={left - 8} '
             f'y={y(tick) + 4} text-anchor=end>{tick:.1f}</text>' for tick in np.arange(low, high + 0.01, 0.1)]
    parts += [f'<text class=tick x={x(tick)} y={height - bottom + 18} text-anchor=middle>{tick:.1f}</text>'
              for tick in np.arange(0, 1.01, 0.2)]
    parts.append(f'<text class=tick x={x(0.5)} y={height - 4} text-anchor=middle>foreground threshold</text>')
    swept = {row.name: (index, row) for index, row in enumerate(row for row in page.rows if row.name in page.curves)}
    for threshold in {row.threshold for _, row in swept.values()} - {None}:
        parts.append(f'<line class=fixed x1={x(threshold)} x2={x(threshold)} y1={top} y2={height - bottom} />')
    for name, (index, row) in swept.items():
        points = " ".join(f"{x(threshold)},{y(value)}" for threshold, value in zip(page.thresholds, page.curves[name])
                          if not np.isnan(value))
        parts.append(f'<polyline class="line s{index % 4}" points="{points}" />')
        if row.oracle:
            parts.append(f'<circle class="dot s{index % 4}" cx={x(row.oracle["threshold"])} '
                         f'cy={y(row.oracle["miou"])} r=4.5 />')
    legend = "".join(
        f'<li><svg class=key viewBox="0 0 28 8" aria-hidden=true><line class="line s{index % 4}" x1=0 x2=28 y1=4 y2=4 '
        f"/></svg>{html.escape(name)}" + (f" <small>oracle {row.oracle['miou']:.3f} at {row.oracle['threshold']:.2f}"
                                        "</small>" if row.oracle else "") + "</li>"
        for name, (index, row) in swept.items())
    named = html.escape(", ".join(page.curves), quote=True)
    return (f'<svg class=chart viewBox="0 0 {width} {height}" role=img aria-label="mIoU over the foreground threshold: '
            f'{named}">{"".join(parts)}</svg><ul class=legend>{legend}</ul>')


def _data(page: Page) -> dict[str, object]:
    """What the script needs at once; the cards come later."""
    places = [page.places[image_id] for image_id in page.ids]
    return {
        "classes": ["background", *page.classes], "colours": class_colours(_by_size(page)), "per": TOGETHER,
        "heat": list(page.heat), "layers": [vars(layer) for layer in page.layers], "split": page.images,
        "rows": [{"name": row.name, "iou": row.fixed["iou"],
                  "confusion": [[int(i), int(j), int(row.confusion[i, j])] for i, j in np.argwhere(row.confusion)],
                  "images": [_number(row.images[image_id]) for image_id in page.ids]} for row in page.rows],
        "images": {"id": list(page.ids), "truth": [place.truth for place in places],
                   "found": [place.found for place in places]}}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _by_size(page: Page) -> list[int]:
    """The mask values that occur, but for the background: by pixels or, without ground truth, by images."""
    sizes = np.zeros(len(page.classes) + 1, np.int64)
    for row in page.rows:
        sizes += row.confusion.sum(axis=0) + row.confusion.sum(axis=1)
    if not page.rows:
        for place in page.places.values():
            sizes[place.found] += 1
    order = np.argsort(-sizes, kind="stable")
    return [int(k) for k in order if k > 0 and sizes[k] > 0]


def class_colours(values: Sequence[int]) -> dict[int, str]:
    """A colour, #rrggbb, for each mask value: the first get those of SAFE.

    More than these cannot all be told apart by colour alone: the others have hues a golden angle apart at three
    lightnesses, and the page outlines and names every object.
    """
    colours = list(SAFE) + [_oklch((0.82, 0.62, 0.72)[index % 3], 0.13, 137.508 * index)
                            for index in range(len(values) - len(SAFE))]
    return dict(zip(values, colours))


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """A colour of Ottosson's OKLCH (2020) as #rrggbb, clipped to sRGB."""
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    cones = np.array([lightness + 0.3963377774 * a + 0.2158037573 * b, lightness - 0.1055613458 * a - 0.0638541728 * b,
                      lightness - 0.0894841775 * a - 1.2914855480 * b]) ** 3
    linear = np.array([[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
                       [-0.0041960863, -0.7034186147, 1.7076147010]]) @ cones
    linear = linear.clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * value):02x}" for value in coded)


def hex_colours(colours: np.ndarray) -> list[str]:
    """(LEVELS, 3) uint8 -> #rrggbb of each level of a heat map.  Raises ValueError for another shape."""
    if colours.shape != (LEVELS, 3):
        raise ValueError(f"a heat map has {LEVELS} colours, not {colours.shape}")
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours.tolist()]
