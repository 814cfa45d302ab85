"""Pictures of results: heat maps, overlays, panels, plots, animations."""
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path
from utils.labels import voc_palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHITE = (255, 255, 255)
GAP = 4           # pixels between the pictures of a panel
TITLE_SIZE = 14   # height of a panel's titles in pixels


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Write an RGB picture, uint8 (H, W, 3), as PNG; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


@functools.cache
def _heat_colours() -> np.ndarray:
    from matplotlib import colormaps
    return (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heatmap(values: np.ndarray) -> np.ndarray:
    """Colour a score map with viridis, whose lightness is proportional to the value.

    values: (H, W) in [0, 1]; values outside are clipped, NaN counts as 0.  Returns (H, W, 3) uint8.
    """
    values = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0)
    return _heat_colours()[(values.clip(0, 1) * 255).round().astype(np.uint8)]


def overlay(image: np.ndarray, colour: np.ndarray | Sequence[int], alpha: float | np.ndarray = 0.5) -> np.ndarray:
    """Blend colours over a picture.

    image: (H, W, 3) uint8.  colour: (H, W, 3) or (3,), 0..255.  alpha: weight of the colour in [0, 1], a number or
    (H, W).  Returns (H, W, 3) uint8.
    """
    alpha = np.asarray(alpha, dtype=np.float32)[..., None]  # (H, W, 1) or (1,)
    blend = (1 - alpha) * np.asarray(image, np.float32) + alpha * np.asarray(colour, np.float32)
    return blend.round().clip(0, 255).astype(np.uint8)


def _outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels above 0 with another value at most `thickness` pixels away in their row or column.  (H, W) bool."""
    edge = np.zeros(mask.shape, bool)
    for step in range(1, thickness + 1):
        for ahead, behind in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            differs = mask[ahead] != mask[behind]
            edge[ahead] |= differs
            edge[behind] |= differs
    return edge & (mask > 0)


def overlay_mask(image: np.ndarray, mask: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Blend the VOC colours of a mask over a picture where it is above 0, with a white outline.

    image: (H, W, 3) uint8.  mask: (H, W) uint8.  alpha: weight of the colours in [0, 1].  Returns (H, W, 3) uint8.
    Raises ValueError if the sizes differ.
    """
    image, mask = np.asarray(image), np.asarray(mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"the picture measures {image.shape[:2]}, its mask {mask.shape}")
    blend = overlay(image, voc_palette()[mask], alpha * (mask > 0))
    # A line one pixel wide would disappear when a large photo is shrunk into a panel.
    blend[_outline(mask, max(1, round(min(mask.shape) / 200)))] = WHITE
    return blend


# --- an overlay with the names of its classes ------------------------------------------------------------------------

def named_overlay(image: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """`overlay_mask` of a picture with a legend below: the colour and name of each class in the mask.

    Of several classes each has a number, in the legend and on its object, as colours alone do not tell everybody which
    is which.  The picture keeps its width, and its pixels stay where they are; see `legend_height` for the rest.
    image: (H, W, 3) uint8.  mask: (H, W) uint8.  classes: names of the K foreground classes.
    Returns (H + legend_height, W, 3) uint8.  Raises ValueError if the sizes differ.
    """
    shown, size = _shown(mask), _text_size(mask.shape)
    rows, blend = _legend_rows(mask.shape, shown, classes), Image.fromarray(overlay_mask(image, mask))
    if len(shown) > 1:
        draw, font = ImageDraw.Draw(blend), ImageFont.load_default(size=size)
        for number, value in enumerate(shown, start=1):
            draw.text(_inmost(mask == value), str(number), fill="white", font=font, anchor="mm", stroke_width=2,
                      stroke_fill="black")
    canvas = Image.new("RGB", (blend.width, blend.height + _height(rows, size)), WHITE)
    canvas.paste(blend, (0, 0))
    _draw_legend(canvas, blend.height, rows, size)
    return np.asarray(canvas)


def legend_height(size: tuple[int, int], mask: np.ndarray, classes: Sequence[str]) -> int:
    """Pixels that `named_overlay` adds below a picture of a size (H, W): a whole number of rows of text, one at least.
    """
    return _height(_legend_rows(size, _shown(mask), classes), _text_size(size))


def _height(rows: Sequence[object], text_size: int) -> int:
    return len(rows) * (text_size + 2 * GAP) + GAP


def _shown(mask: np.ndarray) -> list[int]:
    """The values above 0 of a mask, uint8 (H, W), ascending."""
    return [value for value in np.flatnonzero(np.bincount(np.ravel(mask))).tolist() if value > 0]


def _text_size(size: tuple[int, int]) -> int:
    """Height of a legend's text in pixels: 1/32 of the longer side, and readable on small pictures."""
    return max(14, round(max(size) / 32))


def _legend_rows(size: tuple[int, int], shown: Sequence[int], classes: Sequence[str]
                 ) -> list[list[tuple[int | None, str]]]:
    """Entries (mask value, text) in rows that fit into the picture's width; a name that does not is cut."""
    text_size = _text_size(size)
    font = ImageFont.load_default(size=text_size)
    if not shown:
        return [[(None, _cut("no object", font, size[1] - 2 * GAP))]]
    rows, left = [[]], GAP
    for number, value in enumerate(shown, start=1):
        name = classes[value - 1] if value <= len(classes) else f"class {value}"
        text = _cut(f"{number} {name}" if len(shown) > 1 else name, font, size[1] - text_size - 3 * GAP)
        wide = text_size + GAP + math.ceil(font.getlength(text)) + 3 * GAP
        if rows[-1] and left + wide - 2 * GAP > size[1]:
            rows.append([])
            left = GAP
        rows[-1].append((value, text))
        left += wide
    return rows


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..." if text else ""


def _draw_legend(canvas: Image.Image, top: int, rows: Sequence[Sequence[tuple[int | None, str]]], size: int) -> None:
    """Draw a legend's rows into a picture, from `top` on; None for a patch of no colour."""
    draw, font, palette = ImageDraw.Draw(canvas), ImageFont.load_default(size=size), voc_palette()
    for index, row in enumerate(rows):
        left, upper = GAP, top + GAP + index * (size + 2 * GAP)
        for value, text in row:
            if value is not None:
                colour = tuple(palette[value].tolist())
                draw.rectangle((left, upper, left + size - 1, upper + size - 1), colour, "black")
                left += size + GAP
            draw.text((left, upper + size / 2), text, fill="black", font=font, anchor="lm")
            left += math.ceil(font.getlength(text)) + 3 * GAP


def _inmost(region: np.ndarray) -> tuple[float, float]:
    """(x, y) of a pixel of a region (H, W) bool that is far from the region's border."""
    from scipy.ndimage import distance_transform_edt
    step = max(1, max(region.shape) // 256)
    distance = distance_transform_edt(np.pad(region[::step, ::step], 1))  # outside the picture is a border too
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    found = max(0, int(x) - 1) * step, max(0, int(y) - 1) * step
    return found if region[found[1], found[0]] else tuple(np.argwhere(region)[0][::-1].tolist())


# --- panels, plots, animations ---------------------------------------------------------------------------------------

def _fit(picture: np.ndarray | None, height: int) -> Image.Image:
    """An (H, W, 3) uint8 picture, or None, as a PIL image of the given height with the same aspect ratio."""
    if picture is None:
        return Image.new("RGB", (1, height), WHITE)
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a panel takes (H, W, 3) uint8 pictures, not {picture.shape} {picture.dtype}; "
                         "colour a score map with heatmap, a mask with voc_palette()[mask]")
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)


def panel(rows: Sequence[Sequence[np.ndarray | None]], column_titles: Sequence[str],
          row_titles: Sequence[str] | None = None, height: int = 160) -> Image.Image:
    """Draw a grid of pictures with titles.

    rows: rows of (H, W, 3) uint8 pictures, None for an empty cell.  column_titles: one string per column.
    row_titles: one string per row, drawn to its left.  height: of every picture, in pixels.
    Returns a PIL image.  Raises ValueError if the counts differ or a picture has another shape or dtype.
    """
    row_titles = [""] * len(rows) if row_titles is None else row_titles
    if any(len(row) != len(column_titles) for row in rows) or len(row_titles) != len(rows) or not rows:
        raise ValueError(f"{len(rows)} rows of {[len(row) for row in rows]} pictures do not match "
                         f"{len(column_titles)} column titles and {len(row_titles)} row titles")
    font = ImageFont.load_default(size=TITLE_SIZE)
    cells = [[_fit(picture, height) for picture in row] for row in rows]
    widths = [max(math.ceil(font.getlength(title)), *(cell.width for cell in column))
              for title, column in zip(column_titles, zip(*cells))]
    left = max(math.ceil(font.getlength(title)) for title in row_titles)
    lefts = np.cumsum([left + 2 * GAP if left else GAP] + [width + GAP for width in widths]).tolist()
    top = TITLE_SIZE + 2 * GAP
    canvas = Image.new("RGB", (lefts[-1], top + len(rows) * (height + GAP)), WHITE)
    draw = ImageDraw.Draw(canvas)
    for title, start, width in zip(column_titles, lefts, widths):
        draw.text((start + width / 2, top / 2), title, fill="black", font=font, anchor="mm")
    for index, (title, row) in enumerate(zip(row_titles, cells)):
        upper = top + index * (height + GAP)
        draw.text((GAP, upper + height / 2), title, fill="black", font=font, anchor="lm")
        for cell, start, width in zip(row, lefts, widths):
            canvas.paste(cell, (start + (width - cell.width) // 2, upper))
    return canvas


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A matplotlib figure (in inches) on the Agg canvas, and its axes.  Without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save_figure(figure: Figure, path: str | Path) -> None:
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # of a class called "$", matplotlib would make a formula
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower() or "png", dpi=120)


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Replace None by NaN, where matplotlib leaves a gap."""
    return [math.nan if value is None else float(value) for value in values]


def _check_lengths(path: str | Path, length: int, series: Mapping[str, Sequence]) -> None:
    wrong = {name: len(values) for name, values in series.items() if len(values) != length}
    if wrong:
        raise ValueError(f"{path}: every series needs {length} values, but these differ: {wrong}")


def plot_curves(path: str | Path, x: Sequence[float], curves: Mapping[str, Sequence[float | None]], xlabel: str,
                ylabel: str, marks: Mapping[str, float] | None = None) -> None:
    """Plot curves over a common axis, for threshold sweeps and training logs.

    path: .png, .pdf or .svg.  x: n numbers.  curves: {name: n numbers; None or NaN leaves a gap}.
    marks: {name: x position}, drawn as dashed vertical lines.  Raises ValueError if the lengths differ.
    """
    _check_lengths(path, len(x), curves)
    figure, axes = _figure(7, 4.5)
    for name, values in curves.items():
        axes.plot(x, _numbers(values), marker="o", markersize=3, label=name)
    for index, (name, position) in enumerate((marks or {}).items()):
        axes.axvline(position, color=("black", "grey", "brown")[index % 3], linestyle="--", label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if curves or marks:
        axes.legend(frameon=False)
    _save_figure(figure, path)


def plot_bars(path: str | Path, names: Sequence[str], groups: Mapping[str, Sequence[float | None]],
              ylabel: str) -> None:
    """Plot horizontal bars, one line per class, so that names stay readable; the figure's height grows with n.

    path: .png, .pdf or .svg.  names: n strings, the first on top.  groups: {name: n numbers; None or NaN has no bar},
    drawn beside each other.  ylabel: what is measured.  Raises ValueError if the lengths differ.
    """
    _check_lengths(path, len(names), groups)
    thickness = 0.8 / max(1, len(groups))
    figure, axes = _figure(8, 1.2 + len(names) * max(0.22, 0.12 * len(groups)))
    for index, (name, values) in enumerate(groups.items()):
        centres = np.arange(len(names)) + (index - (len(groups) - 1) / 2) * thickness
        axes.barh(centres, _numbers(values), thickness, label=name)
    axes.grid(False, axis="y")
    axes.set_yticks(np.arange(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(ylabel)
    if groups:
        figure.legend(loc="outside upper right", ncols=4, frameon=False)
    _save_figure(figure, path)


def save_gif(path: str | Path, frames: Sequence[np.ndarray | Image.Image], seconds_per_frame: float) -> None:
    """Write an animation that loops for ever.

    frames: (H, W, 3) uint8 pictures or PIL images of one size.  seconds_per_frame: above 0, rounded to 1/100 s.
    Raises ValueError if there is no frame or the sizes differ.
    """
    import imageio.v3
    frames = [np.asarray(frame) for frame in frames]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"{path}: an animation needs frames of one size, not {[frame.shape for frame in frames]}")
    with atomic_path(path) as temporary:
        imageio.v3.imwrite(temporary, np.stack(frames), extension=".gif", plugin="pillow",
                           duration=1000 * seconds_per_frame, loop=0)
