"""Score maps: corners on corners as in torch, background scores, the foreground's share and its threshold."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.maps import (capped_size, foreground_share, grid_size, move_threshold, resize_image, resize_maps,
                        snapped_size, to_mask, with_background)


def random_maps(count, size, seed=0):
    return np.random.default_rng(seed).random((count, *size), dtype=np.float32)


def random_probabilities(count, size=(19, 23), seed=0):
    """(count + 1, H, W) float32 summing to 1, without near ties of background and best class."""
    maps = random_maps(count + 1, size, seed)
    if count:
        tied = abs(maps[1:].max(axis=0) - maps[0]) < 1e-4
        maps[0][tied] += 1e-3
    return maps / maps.sum(axis=0)


@pytest.mark.parametrize("grid, size", [
    ((3, 5), (65, 97)), ((9, 13), (65, 97)), ((2, 2), (7, 31)), ((5, 5), (5, 21)), ((17, 9), (258, 131)),
    ((1, 4), (9, 25)), ((4, 1), (25, 9)), ((1, 1), (8, 3)), ((6, 7), (7, 8))])
def test_enlarging_equals_torch_with_aligned_corners(grid, size):
    maps = random_maps(3, grid)
    expected = F.interpolate(torch.from_numpy(maps)[None], size=size, mode="bilinear", align_corners=True)[0].numpy()
    found = resize_maps(maps, size)
    worst = abs(found - expected).max()
    assert found.dtype == np.float32 and worst < 1e-5, f"{found.dtype}, off by up to {worst:.2e}"


def test_corners_keep_their_values_and_lines_stay_straight():
    y, x = np.mgrid[:5, :9].astype(np.float32)
    found = resize_maps(np.stack([x, y]), (33, 65))
    rows, columns = np.mgrid[:33, :65] / 8
    worst = abs(found - np.stack([columns, rows])).max()
    assert worst < 1e-5, f"cell i is not at pixel 8 i: off by up to {worst:.2e} cells"


def test_maps_of_the_same_size_come_back_as_they_are():
    maps = random_maps(2, (7, 9))
    assert (resize_maps(maps, (7, 9)) == maps).all()
    assert resize_maps(maps.astype(np.float16), [7, 9]).dtype == np.float32


def test_no_maps_are_resized_to_no_maps():
    found = resize_maps(np.zeros((0, 5, 7), np.float32), (9, 13))
    assert found.shape == (0, 9, 13) and found.dtype == np.float32, f"{found.dtype} {found.shape}"


def test_shrinking_keeps_the_mean_and_the_range():
    maps = random_maps(1, (64, 64))
    found = resize_maps(maps, (16, 16))
    difference = abs(found.mean() - maps.mean())
    assert difference < 0.01, f"the mean moved by {difference:.4f}"
    assert found.std() < 0.5 * maps.std(), f"not antialiased: deviation {found.std():.3f} of {maps.std():.3f}"


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


def test_resized_images_have_the_size_asked_for_and_an_even_image_stays_even():
    found = resize_image(np.full((13, 17, 3), 77, np.uint8), (31, 5))
    assert found.shape == (31, 5, 3) and (found == 77).all(), f"{found.shape}, {np.unique(found)}"
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert resize_image(image, (5, 7)) is image, "an image of the right size was copied"


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("alpha", [1.0, 6.0, 24.0])
def test_with_background_sums_to_one_and_follows_its_formula(count, alpha):
    cam = random_maps(count, (7, 9))
    found = with_background(cam.astype(np.float16), alpha)
    worst = abs(found.sum(axis=0) - 1).max()
    assert found.shape == (count + 1, 7, 9) and worst < 1e-6, f"{found.shape}, sums off by {worst:.2e}"
    cam = cam.astype(np.float16).astype(float)
    for y in range(7):
        for x in range(9):
            background = (1 - max(cam[:, y, x], default=0)) ** alpha
            expected = background / (background + cam[:, y, x].sum())
            assert abs(found[0, y, x] - expected) < 1e-5, f"{found[0, y, x]:.6f}, not {expected:.6f}, at {y, x}"


def test_with_background_takes_values_just_outside_the_range():
    found = with_background(np.array([[[-0.1, 1.1]]], np.float32), 4.0)
    assert np.isfinite(found).all() and found[:, 0, 0].tolist() == [1, 0] and found[:, 0, 1].tolist() == [0, 1], found


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_share_of_one_half_is_the_argmax(count):
    keys = np.array([1, 4, 7])[:count]
    probabilities = random_probabilities(count)
    share, label = foreground_share(probabilities, keys)
    expected = np.concatenate([[0], keys + 1])[probabilities.argmax(axis=0)]
    found = np.where(share >= 0.5, label, 0)
    wrong = (found != expected).sum()
    assert wrong == 0, f"{wrong} of {found.size} pixels differ from the argmax"
    assert share.dtype == np.float32 and label.dtype == np.uint8, (share.dtype, label.dtype)
    assert count == 0 or 0.05 < (expected == 0).mean() < 0.95, "the example has hardly any background or foreground"
    assert (to_mask(probabilities, keys, 0.5) == expected).all()


def test_labels_are_never_zero_and_reach_the_last_class():
    probabilities = np.zeros((2, 2, 2), np.float32)
    probabilities[1] = 1
    for key in (0, 253):
        assert (foreground_share(probabilities, [key])[1] == key + 1).all(), key
    assert (foreground_share(probabilities[:1], [])[1] > 0).all()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("threshold", [0.1, 0.37, 0.5, 0.9])
def test_moving_the_threshold_puts_it_at_one_half(count, threshold):
    probabilities = random_probabilities(count).astype(np.float64)
    keys = np.arange(count)
    moved = move_threshold(probabilities, threshold)
    before, label = foreground_share(probabilities, keys)
    after, same = foreground_share(moved, keys)
    clear = abs(before - threshold) > 1e-5
    wrong = ((before >= threshold) != (after >= 0.5))[clear].sum()
    assert wrong == 0 and (label == same).all(), f"{wrong} of {clear.sum()} pixels change sides at {threshold}"
    worst = abs(moved.sum(axis=0) - 1).max()
    assert worst < 1e-6, f"sums off by {worst:.2e}"


def test_a_pixel_exactly_on_the_threshold_moves_to_exactly_one_half():
    moved = move_threshold(np.array([[[0.7]], [[0.3]]]), 0.3)
    assert abs(moved.ravel() - 0.5).max() < 1e-6, moved.ravel()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_extreme_thresholds_stay_finite(threshold):
    moved = move_threshold(random_probabilities(2), threshold)
    assert np.isfinite(moved).all() and abs(moved.sum(axis=0) - 1).max() < 1e-5
    assert ((moved.argmax(axis=0) > 0) == (threshold == 0)).all(), "not all on one side"


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_masks_follow_their_definition(threshold):
    probabilities, keys = random_probabilities(3), [2, 5, 9]
    mask = to_mask(probabilities, keys, threshold)
    assert mask.dtype == np.uint8, mask.dtype
    for (y, x), found in np.ndenumerate(mask):
        background, *scores = probabilities[:, y, x].astype(float)
        share = max(scores) / (max(scores) + background)
        if abs(share - threshold) > 1e-6:
            expected = keys[int(np.argmax(scores))] + 1 if share > threshold else 0
            assert found == expected, f"{found}, not {expected}, at {y, x} with share {share:.4f}"


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_without_any_class_the_mask_is_background(threshold):
    mask = to_mask(np.ones((1, 4, 5), np.float32), np.array([], np.int64), threshold)
    assert mask.shape == (4, 5) and not mask.any(), mask
