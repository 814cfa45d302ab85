"""Resampling against loops over pixels: maps corners on corners, up and down; an image and its labels together."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from utils.grids import capped_size, grid_size, resize_image, resize_labels, resize_maps, resize_tensor, snapped_size

UP = [((3, 5), (65, 97)), ((9, 13), (65, 97)), ((2, 2), (7, 31)), ((5, 5), (5, 21)), ((17, 9), (258, 131)),
      ((6, 7), (7, 8)), ((1, 4), (9, 25)), ((4, 1), (25, 9)), ((1, 1), (8, 3))]
DOWN = [((40, 30), (9, 7)), ((65, 97), (17, 25)), ((64, 50), (13, 49)), ((33, 33), (2, 2)), ((300, 200), (61, 50)),
        ((64, 64), (63, 63)), ((1, 60), (1, 8)), ((35, 1), (5, 1))]
MIXED = [((5, 9), (40, 3)), ((100, 3), (7, 8)), ((1, 7), (5, 3)), ((7, 1), (3, 5))]


def random_maps(count, size, seed=0):
    return np.random.default_rng(seed).random((count, *size), dtype=np.float32)


def random_image(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def places(old, new):
    """Where the new pixels lie on the old ones: corners on corners; what has one pixel, lies in the middle."""
    if new == 1:
        return [Fraction(old - 1, 2)]
    return [Fraction(i * (old - 1), new - 1) for i in range(new)]


def triangle_weights(old, new):
    """(new, old) float64: a triangle around each new pixel, as wide as their spacing, edge pixels repeated."""
    weights, reach = np.zeros((new, old)), max(1.0, (old - 1) / max(1, new - 1))
    for row, centre in zip(weights, places(old, new)):
        for pixel in range(math.floor(centre - reach), math.ceil(centre + reach) + 1):
            row[min(max(pixel, 0), old - 1)] += max(0.0, 1 - abs(pixel - float(centre)) / reach)
        row /= row.sum()
    return weights


def resampled(picture, size):
    """The definition, in float64: (H, W, C) -> (*size, C)."""
    down, across = (triangle_weights(old, new) for old, new in zip(picture.shape, size))
    return np.einsum("yh,hwc,xw->yxc", down, picture.astype(np.float64), across)


@pytest.mark.parametrize("old, new, step", [((5, 7), (64, 33), 10), ((33, 20), (9, 30), 2), ((1, 4), (17, 9), 5),
                                            ((40, 40), (7, 5), 3), ((12, 9), (12, 9), 5)])
def test_rows_of_a_map_equal_those_of_the_whole_map(old, new, step):
    maps = np.random.default_rng(0).random((3, *old), np.float32)
    whole = resize_maps(maps, new)
    bands = [resize_maps(maps, new, (first, min(new[0], first + step))) for first in range(0, new[0], step)]
    gap = abs(np.concatenate(bands, axis=1) - whole).max()
    assert gap < 1e-5, f"{gap:.1e}"


@pytest.mark.parametrize("old, new", UP + DOWN + MIXED)
def test_maps_equal_the_triangle_filter(old, new):
    maps = random_maps(3, old)
    expected = resampled(maps.transpose(1, 2, 0), new).transpose(2, 0, 1)
    found = resize_maps(maps, new)
    worst = abs(found - expected).max() / expected.max()
    assert found.dtype == np.float32 and found.shape == (3, *new), f"{found.dtype} {found.shape}"
    assert worst < 1e-5, f"{old} -> {new}: relative error {worst:.1e}"


@pytest.mark.parametrize("old, new", UP + DOWN + MIXED)
def test_labels_equal_a_loop_over_the_pixels_under_the_middle_of_each_new_one(old, new):
    labels = np.random.default_rng(0).integers(0, 256, old, dtype=np.uint8)
    middles = [[Fraction(2 * i + 1, 2) * a / b for i in range(b)] for a, b in zip(old, new)]
    found = resize_labels(labels, new)
    assert found.dtype == np.uint8 and found.shape == new, f"{found.dtype} {found.shape}"
    for i, row in enumerate(middles[0]):
        for j, column in enumerate(middles[1]):
            if row.denominator > 1 and column.denominator > 1:  # else between two pixels: either will do
                assert found[i, j] == labels[int(row), int(column)], f"{old} -> {new}: {i}, {j}"


@pytest.mark.parametrize("new", [(61, 50), (150, 97), (400, 331)])
def test_an_image_and_its_labels_stay_together(new):
    """The centre of mass of a square, as the image shows it and as the labels have it."""
    labels = np.zeros((200, 160), np.uint8)
    labels[60:121, 30:91] = 1
    small = resize_labels(labels, new)
    image = resize_image(np.repeat(labels[..., None] * 255, 3, axis=2), new)[..., 0].astype(float)
    axes = np.mgrid[:new[0], :new[1]]
    centres = [[(values * axis).sum() / values.sum() for axis in axes] for values in (small, image)]
    assert np.abs(np.subtract(*centres)).max() < 0.5, f"labels at {centres[0]}, image at {centres[1]}"


@pytest.mark.parametrize("old, new", UP)
def test_tensors_equal_the_triangle_filter_when_they_grow(old, new):
    maps = random_maps(6, old).reshape(2, 3, *old)
    expected = resampled(maps.reshape(6, *old).transpose(1, 2, 0), new).transpose(2, 0, 1).reshape(2, 3, *new)
    found = resize_tensor(torch.from_numpy(maps), new).numpy()
    worst = abs(found - expected).max() / expected.max()
    assert found.shape == expected.shape and worst < 1e-5, f"{old} -> {new}: {found.shape}, relative error {worst:.1e}"


def test_a_shrunk_tensor_is_read_at_its_new_pixels():
    maps = torch.from_numpy(random_maps(1, (33, 17)))[None]
    found = resize_tensor(maps, (9, 5))
    worst = (found - maps[..., ::4, ::4]).abs().max().item()
    assert worst < 1e-5, f"off by up to {worst:.1e}"


@pytest.mark.parametrize("old, new", UP)
def test_corner_values_stay_at_the_corners_of_what_grows(old, new):
    maps, corners = random_maps(1, old), np.ix_((0, -1), (0, -1))
    worst = abs(resize_maps(maps, new)[0][corners] - maps[0][corners]).max()
    assert worst < 1e-6, f"corners of the map moved by {worst:.1e}"


def test_a_ramp_stays_a_ramp():
    y, x = np.mgrid[:5, :9].astype(np.float32)
    grown = resize_maps(np.stack([y, x]), (33, 65))
    worst = abs(grown - np.mgrid[:33, :65] / 8).max()
    assert worst < 1e-5, f"cell i is not at pixel 8 i: off by up to {worst:.1e} cells"
    y, x = np.mgrid[:65, :129].astype(np.float32)
    inner = np.s_[:, 1:-1, 1:-1]  # beyond the border, repeated pixels bend the ramp
    worst = abs(resize_maps(np.stack([y, x]), (9, 17)) - np.mgrid[:9, :17] * 8)[inner].max()
    assert worst < 1e-3, f"pixel 8 i is not at cell i: off by up to {worst:.1e} pixels"


@pytest.mark.parametrize("large, small", [((65, 97), (17, 25)), ((129, 129), (9, 9)), ((200, 150), (33, 40)),
                                          ((375, 500), (24, 32))])
def test_a_round_trip_does_not_move_a_blob(large, small):
    """The centre of mass, in pixels of the large grid, of blobs that the border does not cut."""
    y, x = np.mgrid[:small[0], :small[1]]
    spacing = [(a - 1) / (b - 1) for a, b in zip(large, small)]
    drifts = []
    for top in np.linspace(2, small[0] - 3, 7):
        for left in np.linspace(2, small[1] - 3, 7):
            blob = np.maximum(0, 1 - abs(y - top) / 1.5) * np.maximum(0, 1 - abs(x - left) / 1.5)
            back = resize_maps(resize_maps(blob[None], large), small)[0].astype(np.float64)
            drifts.append(math.hypot(*(width * ((back * axis).sum() / back.sum() - (blob * axis).sum() / blob.sum())
                                       for width, axis in zip(spacing, (y, x)))))
    assert max(drifts) < 0.05, f"up to {max(drifts):.3f} pixels of {large}"


@pytest.mark.parametrize("new", [(31, 5), (5, 40), (60, 60), (1, 1), (1, 9), (2, 1)])
@pytest.mark.parametrize("old", [(13, 17), (1, 1), (1, 6), (8, 1)])
def test_a_constant_stays_constant(old, new):
    assert (resize_image(np.full((*old, 3), 77, np.uint8), new) == 77).all()
    assert (resize_labels(np.full(old, 255, np.uint8), new) == 255).all()
    found = resize_maps(np.full((2, *old), 0.7), new)
    assert found.shape == (2, *new) and abs(found - 0.7).max() < 1e-6, f"{found.shape}, {found.min()}..{found.max()}"


def test_a_single_pixel_is_the_middle_one_or_a_mean_around_it():
    assert resize_labels(np.arange(15, dtype=np.uint8).reshape(3, 5), (1, 1)).item() == 7
    ramp = np.arange(15, dtype=np.float32).reshape(1, 3, 5)
    assert abs(resize_maps(ramp, (1, 1)).item() - 7) < 1e-5, resize_maps(ramp, (1, 1))


def test_shrinking_smooths():
    maps = random_maps(1, (65, 65))
    found = resize_maps(maps, (17, 17))
    assert found.std() < 0.5 * maps.std(), f"not antialiased: deviation {found.std():.3f} of {maps.std():.3f}"


def test_what_has_the_size_already_comes_back_as_it_is():
    image, labels, maps = random_image((5, 7)), random_image((5, 7))[..., 0], random_maps(2, (5, 7))
    assert resize_image(image, (5, 7)) is image and resize_labels(labels, (5, 7)) is labels, "a copy was made"
    assert (resize_maps(maps, (5, 7)) == maps).all()
    assert resize_maps(maps.astype(np.float16), [5, 7]).dtype == np.float32
    tensor = torch.from_numpy(maps)[None]
    assert resize_tensor(tensor, (5, 7)) is tensor


def test_views_are_resized_as_their_copies():
    image = random_image((20, 30))[:, ::-1]
    for new in ((9, 40), (41, 12)):
        assert (resize_image(image, new) == resize_image(image.copy(), new)).all(), new
        labels, maps = image[..., 1], image.transpose(2, 0, 1).astype(np.float32)
        assert (resize_labels(labels, new) == resize_labels(labels.copy(), new)).all(), new
        assert (resize_maps(maps, new) == resize_maps(maps.copy(), new)).all(), new


def test_no_maps_are_resized_to_no_maps():
    found = resize_maps(np.zeros((0, 5, 7), np.float32), (9, 13))
    assert found.shape == (0, 9, 13) and found.dtype == np.float32, f"{found.dtype} {found.shape}"


# --- sizes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride", [4, 8, 16])
def test_snapped_sides_are_the_nearest_multiple_of_the_stride_plus_one(stride):
    for side in range(1, 300):
        snapped, other = snapped_size((side, 100), stride)
        assert (snapped - 1) % stride == 0 and (other - 1) % stride == 0, f"{side} -> {snapped}"
        assert grid_size((side, 100), stride)[0] == (snapped - 1) // stride + 1 >= 2, f"{side} -> {snapped}"
        assert abs(snapped - side) <= stride / 2 or snapped == stride + 1, f"{side} -> {snapped} at stride {stride}"


def test_snapped_sizes_stay_where_they_are():
    assert snapped_size((65, 97), 16) == (65, 97) and snapped_size((65, 97), 8) == (65, 97)


@pytest.mark.parametrize("size, expected", [((300, 200), (300, 200)), ((1024, 768), (512, 384)), ((10, 4000), (1, 512)),
                                            ((512, 513), (511, 512)), ((1, 9000), (1, 512))])
def test_capped_sizes_keep_their_shape_and_at_least_a_pixel(size, expected):
    assert capped_size(size, 512) == expected, capped_size(size, 512)
    assert capped_size(size[::-1], 512) == expected[::-1], capped_size(size[::-1], 512)
