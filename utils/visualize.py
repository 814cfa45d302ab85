"""Pictures of results: palette PNG masks, heat maps, overlays, panels, plots, animations."""
import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.artifacts import atomic_path
from utils.labels import read_labels

WHITE = (255, 255, 255)
GAP = 4           # pixels between the pictures of a panel
TITLE_SIZE = 14   # height of a panel's titles in pixels


@functools.lru_cache(maxsize=None)
def voc_palette():
    """The colour map of PASCAL VOC.  Returns (256, 3) uint8, read-only; row k is the colour of mask value k.

    Bits 0, 1, 2 of the index are the top bits of red, green, blue, bits 3, 4, 5 the next ones, and so on.
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * level + channel) & 1) << (7 - level)).astype(np.uint8)
    palette.flags.writeable = False
    return palette


def save_mask(path, mask):
    """Write a mask as an 8-bit palette PNG in VOC colours; the file appears whole or not at all.

    mask: (H, W) integers in 0..255: 0 background, class k = k + 1, 255 ignore.
    Raises ValueError for another shape, dtype or range: a float mask is a score map, and would be cut off silently.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or mask.size == 0:
        raise ValueError(f"{path}: a mask is (H, W) integers, not {mask.shape} {mask.dtype}")
    if mask.min() < 0 or mask.max() > 255:
        raise ValueError(f"{path}: mask values must lie in 0..255, not {mask.min()}..{mask.max()}")
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def read_mask(path):
    """Read a mask of class indices.  Returns (H, W) uint8.

    Raises UserError if it is missing or damaged, or if the file holds colours instead of indices.
    """
    missing = f"no mask {path}; run the step that writes it, or name another folder"
    return read_labels(path, missing, "delete it and make it again")


def save_picture(path, picture):
    """Write an RGB picture, uint8 (H, W, 3), as PNG; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


@functools.lru_cache(maxsize=None)
def _heat_colours():
    from matplotlib import colormaps
    return (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heatmap(values):
    """Colours of a score map, in viridis: its lightness rises evenly, so that equal steps look equal.

    values: (H, W) in [0, 1]; what lies outside is clipped, NaN counts as 0.  Returns (H, W, 3) uint8.
    """
    values = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0)
    return _heat_colours()[(values.clip(0, 1) * 255).round().astype(np.uint8)]


def overlay(image, colour, alpha=0.5):
    """Blend colours over a picture.

    image: (H, W, 3) uint8.  colour: (H, W, 3) or (3,), 0..255.  alpha: weight of the colour in [0, 1], a number or
    (H, W).  Returns (H, W, 3) uint8.
    """
    alpha = np.asarray(alpha, dtype=np.float32)[..., None]  # (H, W, 1) or (1,)
    blend = (1 - alpha) * np.asarray(image, np.float32) + alpha * np.asarray(colour, np.float32)
    return blend.round().clip(0, 255).astype(np.uint8)


def _outline(mask, thickness):
    """Pixels above 0 that have another value at most `thickness` away along a row or a column.  (H, W) bool."""
    edge = np.zeros(mask.shape, bool)
    for step in range(1, thickness + 1):
        for ahead, behind in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            differs = mask[ahead] != mask[behind]
            edge[ahead] |= differs
            edge[behind] |= differs
    return edge & (mask > 0)


def overlay_mask(image, mask, alpha=0.5):
    """Blend the VOC colours of a mask over a picture where it is above 0, with a white outline.

    image: (H, W, 3) uint8.  mask: (H, W) uint8.  alpha: weight of the colours in [0, 1].  Returns (H, W, 3) uint8.
    Raises ValueError if the sizes differ.
    """
    image, mask = np.asarray(image), np.asarray(mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"the picture measures {image.shape[:2]}, its mask {mask.shape}")
    blend = overlay(image, voc_palette()[mask], alpha * (mask > 0))
    # A line of one pixel is lost when a large photo is shrunk into a panel.
    blend[_outline(mask, max(1, round(min(mask.shape) / 200)))] = WHITE
    return blend


def _fit(picture, height):
    """An (H, W, 3) uint8 picture, or None, as a PIL image of the given height, its proportions kept."""
    if picture is None:
        return Image.new("RGB", (1, height), WHITE)
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a panel takes (H, W, 3) uint8 pictures, not {picture.shape} {picture.dtype}; "
                         "colour a score map with heatmap, a mask with voc_palette()[mask]")
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)


def panel(rows, column_titles, row_titles=None, height=160):
    """A titled grid of pictures.

    rows: list of rows, each a list of (H, W, 3) uint8 pictures, or None for an empty place.  column_titles: one string
    a column.  row_titles: one string a row, drawn to the left.  height: of every picture, in pixels.
    Returns a PIL image.  Raises ValueError if the counts do not agree or a picture has another form.
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
    _draw_titles(canvas, font, column_titles, row_titles, lefts, widths, top, height)
    for index, row in enumerate(cells):
        for cell, start, width in zip(row, lefts, widths):
            canvas.paste(cell, (start + (width - cell.width) // 2, top + index * (height + GAP)))
    return canvas


def _draw_titles(canvas, font, column_titles, row_titles, lefts, widths, top, height):
    draw = ImageDraw.Draw(canvas)
    for title, start, width in zip(column_titles, lefts, widths):
        draw.text((start + width / 2, top / 2), title, fill="black", font=font, anchor="mm")
    for index, title in enumerate(row_titles):
        draw.text((GAP, top + index * (height + GAP) + height / 2), title, fill="black", font=font, anchor="lm")


def _figure(width, height):
    """A matplotlib figure (in inches) on the Agg canvas, and its axes. Without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save_figure(figure, path):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower() or "png", dpi=120)


def _numbers(values):
    """Floats with NaN for None: matplotlib leaves a gap there."""
    return [math.nan if value is None else float(value) for value in values]


def _check_lengths(path, length, series):
    wrong = {name: len(values) for name, values in series.items() if len(values) != length}
    if wrong:
        raise ValueError(f"{path}: every series needs {length} values, but these differ: {wrong}")


def plot_curves(path, x, curves, xlabel, ylabel, marks=None):
    """Draw curves over a common axis, for threshold sweeps and training logs.

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


def plot_bars(path, names, groups, ylabel):
    """Draw horizontal bars, a class a line, so that names stay readable; the figure grows with the classes.

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


def save_gif(path, frames, seconds_per_frame):
    """Write an animation that repeats for ever.

    frames: list of (H, W, 3) uint8 pictures or PIL images of one size.  seconds_per_frame: > 0, kept to 1/100 s.
    Raises ValueError if there is no frame or the sizes differ.
    """
    import imageio.v3
    frames = [np.asarray(frame) for frame in frames]
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"{path}: an animation needs frames of one size, not {[frame.shape for frame in frames]}")
    with atomic_path(path) as temporary:
        imageio.v3.imwrite(temporary, np.stack(frames), extension=".gif", plugin="pillow",
                           duration=1000 * seconds_per_frame, loop=0)
