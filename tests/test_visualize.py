"""Heat maps, overlays, panels, plots and animations."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import visualize
from utils.labels import voc_palette
from utils.visualize import (
    heatmap,
    legend_height,
    named_overlay,
    overlay,
    overlay_mask,
    panel,
    plot_bars,
    plot_curves,
    save_gif,
    save_picture,
)


def random_picture(height=30, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_picture_survives_its_file(tmp_path):
    picture = random_picture()
    save_picture(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB" and (np.asarray(image) == picture).all(), f"{image.mode}, other pixels"


def test_heatmap_rises_in_lightness_and_survives_bad_values():
    colours = heatmap(np.linspace(0, 1, 11)[None])
    assert colours.shape == (1, 11, 3) and colours.dtype == np.uint8, f"{colours.shape} {colours.dtype}"
    lightness = colours[0] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) > 0).all(), f"lightness {lightness.round()}"
    odd = heatmap(np.array([[-1.0, np.nan, 2.0]]))[0]
    expected = colours[0, [0, 0, -1]]
    assert (odd == expected).all(), f"{odd.tolist()}, not {expected.tolist()}"


def test_overlay_blends_by_alpha():
    image, colour = random_picture(seed=1), random_picture(seed=2)
    assert (overlay(image, colour, 0) == image).all() and (overlay(image, colour, 1) == colour).all()
    gap = np.abs(overlay(image, colour, 0.25) - (0.75 * image + 0.25 * colour)).max()
    assert gap <= 0.5, f"off by {gap} grey levels"
    assert (overlay(image, (10, 20, 30), 1.0) == (10, 20, 30)).all()


def test_overlay_mask_leaves_the_background_alone_and_outlines_the_rest():
    image, mask = random_picture(), np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20], mask[10:20, 20:25] = 3, 5
    blend = overlay_mask(image, mask, alpha=1.0)
    changed = (blend[mask == 0] != image[mask == 0]).sum()
    assert changed == 0, f"{changed} background values changed"
    assert (blend[12:18, 12:18] == voc_palette()[3]).all(), f"inside is {blend[15, 15]}"
    for place in ((10, 12), (15, 10), (15, 19), (15, 20), (19, 22)):
        assert (blend[place] == 255).all(), f"{place} should be outline, is {blend[place]}"


def test_overlay_mask_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"\(30, 40\).*\(30, 41\)"):
        overlay_mask(random_picture(), np.zeros((30, 41), np.uint8))


# --- overlays with the names of their classes ------------------------------------------------------------------------

CLASSES = ["cat", "dog", "bird"]


def strip(size, mask, classes=CLASSES):
    """(the overlay's pixels on the picture, those of the legend) of a grey picture."""
    found = named_overlay(np.full((*size, 3), 90, np.uint8), mask, classes)
    assert found.shape == (size[0] + legend_height(size, mask, classes), size[1], 3), found.shape
    return found[:size[0]], found[size[0]:]


def colours(picture):
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def test_an_overlay_has_the_colour_and_the_name_of_its_class_below_and_the_picture_above_as_it_is():
    mask = np.zeros((120, 200), np.uint8)
    mask[20:90, 30:150] = 2
    above, below = strip(mask.shape, mask)
    assert (above == overlay_mask(np.full((120, 200, 3), 90, np.uint8), mask)).all(), "of one class, there is no number"
    assert tuple(voc_palette()[2].tolist()) in colours(below), "no patch of the class's colour"
    assert tuple(voc_palette()[1].tolist()) not in colours(below), "a patch of a class that is not there"
    other = strip(mask.shape, mask, ["cat", "fox", "bird"])[1]
    assert below.shape == other.shape and (below != other).any(), "the name is not in the legend"
    assert below.shape[0] < 30, f"a legend of one name takes {below.shape[0]} rows of pixels"


def test_of_several_classes_each_has_a_number_on_its_object_and_in_the_legend():
    mask = np.zeros((120, 200), np.uint8)
    mask[10:110, 10:90], mask[10:110, 110:190] = 1, 3
    above, below = strip(mask.shape, mask)
    plain = overlay_mask(np.full((120, 200, 3), 90, np.uint8), mask)
    changed = np.argwhere((above != plain).any(axis=-1))
    for left, right in ((10, 90), (110, 190)):
        inside = changed[(changed[:, 1] >= left) & (changed[:, 1] < right)]
        assert len(inside) > 10, f"no number between columns {left} and {right}"
        assert abs(inside.mean(axis=0) - (60, (left + right) / 2)).max() < 25, f"its middle: {inside.mean(axis=0)}"
    assert {tuple(voc_palette()[value].tolist()) for value in (1, 3)} <= colours(below)


def test_the_number_lies_on_an_object_of_any_shape():
    for seed in range(5):
        mask = np.zeros((300, 700), np.uint8)
        mask[:, :200] = 1
        rng = np.random.default_rng(seed)
        row, column = int(rng.integers(0, 299)), int(rng.integers(300, 699))
        mask[row, column] = 2  # one pixel
        above, _ = strip(mask.shape, mask)
        plain = overlay_mask(np.full((300, 700, 3), 90, np.uint8), mask)
        changed = np.argwhere((above != plain).any(axis=-1))
        nearest = abs(changed - (row, column)).max(axis=1).min()
        assert nearest <= 12, f"the number of the pixel at {row}, {column} is {nearest} pixels away"


def test_many_and_long_names_take_more_rows_and_are_cut_to_the_width():
    mask = np.zeros((100, 160), np.uint8)
    heights = []
    for count in (0, 1, 12):
        mask[0, :] = 0
        mask[0, :count] = np.arange(1, count + 1)
        heights.append(strip(mask.shape, mask, [f"some_class_{i}" for i in range(12)])[1].shape[0])
    assert heights[0] == heights[1] < heights[2] == 12 * (heights[1] - 4) + 4, heights
    mask[0, :] = 1
    _, below = strip(mask.shape, mask, ["x" * 500])
    assert (below[:, -4:] == 255).all() and below.shape[0] == heights[1], "a name runs out of the picture"
    for size in ((8, 8), (1, 1), (9, 40)):
        strip(size, np.ones(size, np.uint8), ["a_long_name"])


# --- panels ----------------------------------------------------------------------------------------------------------

def test_a_panel_scales_its_pictures_to_one_height_and_keeps_their_colours():
    red = np.zeros((20, 40, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    image = panel([[red, red[:, :20]], [red[:10], None]], ["first", "2"], height=60)
    reds = (np.asarray(image) == (255, 0, 0)).all(axis=2)
    expected = 60 * 120 + 60 * 60 + 60 * 240
    assert reds.sum() == expected, f"{reds.sum()} red pixels, not {expected}"
    assert not reds.all(axis=0).any(), "no gap between the rows"


def test_panel_titles_are_drawn_and_widen_their_column():
    pictures = [[random_picture()], [random_picture()]]
    plain = panel(pictures, [""])
    titled = panel(pictures, ["a title much wider than the pictures of its column"], ["one", "two"])
    assert titled.width > plain.width + 50 and titled.height == plain.height, f"{plain.size} {titled.size}"
    strip = np.asarray(titled)[:20]
    assert (strip < 100).sum() > 100, "no title above the pictures"


@pytest.mark.parametrize("rows, titles, row_titles", [
    ([[random_picture()]], ["a", "b"], None), ([[random_picture()]], ["a"], ["x", "y"]), ([], [], None),
    ([[np.zeros((3, 4), np.uint8)]], ["a"], None), ([[np.zeros((3, 4, 3))]], ["a"], None)])
def test_a_panel_that_does_not_add_up_is_refused(rows, titles, row_titles):
    with pytest.raises(ValueError, match="do not match|a panel takes"):
        panel(rows, titles, row_titles)


def test_curves_are_drawn_with_gaps_and_marks(tmp_path):
    plot_curves(tmp_path / "a.png", [0, 1, 2], {"mIoU": [1, None, 3], "fg": [2.0, 1.0, np.nan]}, "threshold", "IoU",
                {"default": 1, "oracle": 1.5})
    plot_curves(tmp_path / "plain.png", [0, 1, 2], {"mIoU": [1, None, 3]}, "threshold", "IoU")
    marked, plain = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("a.png", "plain.png"))
    assert (plain < 128).any() and (marked < 128).sum() > (plain < 128).sum(), "no marks drawn"
    assert len(list(tmp_path.iterdir())) == 2, f"{list(tmp_path.iterdir())}"


def test_bar_plots_grow_with_the_classes(tmp_path):
    sizes = {}
    for count in (3, 38, 81):
        names, values = [f"class {k}" for k in range(count)], list(np.linspace(0, 1, count))
        plot_bars(tmp_path / f"{count}.png", names, {"CAM": values, "mask": values[:-1] + [None]}, "IoU")
        sizes[count] = Image.open(tmp_path / f"{count}.png").size
    pitch = (sizes[81][1] - sizes[38][1]) / (81 - 38)
    assert pitch >= 20, f"{pitch:.1f} pixels a class, too tight for a name; sizes {sizes}"
    assert sizes[3][0] == sizes[81][0], f"{sizes}"


def test_series_of_another_length_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png.*3 values.*short.*2"):
        plot_curves(tmp_path / "a.png", [0, 1, 2], {"good": [1, 2, 3], "short": [1, 2]}, "x", "y")
    with pytest.raises(ValueError, match=r"b\.png.*2 values.*long.*3"):
        plot_bars(tmp_path / "b.png", ["cat", "dog"], {"long": [1, 2, 3]}, "IoU")


def test_an_animation_keeps_its_frames_and_pace(tmp_path):
    frames = [np.full((30, 40, 3), grey, np.uint8) for grey in (0, 128, 255)]
    save_gif(tmp_path / "a.gif", frames, 0.4)
    with Image.open(tmp_path / "a.gif") as image:
        facts = (image.format, image.n_frames, image.size, image.info["duration"], image.info["loop"])
        greys = []
        for index in range(image.n_frames):
            image.seek(index)
            greys.append(int(np.asarray(image.convert("L")).mean()))
    assert facts == ("GIF", 3, (40, 30), 400, 0), f"{facts}"
    assert all(abs(grey - expected) <= 2 for grey, expected in zip(greys, (0, 128, 255))), f"frames {greys}"


@pytest.mark.parametrize("frames", [[], [np.zeros((3, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]])
def test_frames_of_several_sizes_or_none_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"a\.gif.*frames of one size"):
        save_gif(tmp_path / "a.gif", frames, 0.4)


def test_importing_the_room_does_not_import_matplotlib():
    root = Path(visualize.__file__).parents[1]
    code = "import sys, utils.visualize; print('matplotlib' in sys.modules, 'imageio' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False False", f"loaded at import: {out}"
