"""Score maps: background score, foreground probability and its threshold."""
import numpy as np
import pytest

from utils.maps import foreground_probability, move_threshold, to_mask, with_background


def random_maps(count, size, seed=0):
    return np.random.default_rng(seed).random((count, *size), dtype=np.float32)


def random_probabilities(count, size=(19, 23), seed=0):
    """(count + 1, H, W) float32 summing to 1, without near ties of background and best class."""
    maps = random_maps(count + 1, size, seed)
    if count:
        tied = abs(maps[1:].max(axis=0) - maps[0]) < 1e-4
        maps[0][tied] += 1e-3
    return maps / maps.sum(axis=0)


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
def test_a_foreground_probability_of_one_half_is_the_argmax(count):
    keys = np.array([1, 4, 7])[:count]
    probabilities = random_probabilities(count)
    probability, label = foreground_probability(probabilities, keys)
    expected = np.concatenate([[0], keys + 1])[probabilities.argmax(axis=0)]
    found = np.where(probability >= 0.5, label, 0)
    wrong = (found != expected).sum()
    assert wrong == 0, f"{wrong} of {found.size} pixels differ from the argmax"
    assert probability.dtype == np.float32 and label.dtype == np.uint8, (probability.dtype, label.dtype)
    assert count == 0 or 0.05 < (expected == 0).mean() < 0.95, "the example has hardly any background or foreground"
    assert (to_mask(probabilities, keys, 0.5) == expected).all()


def test_labels_are_never_zero_and_reach_the_last_class():
    probabilities = np.zeros((2, 2, 2), np.float32)
    probabilities[1] = 1
    for key in (0, 253):
        assert (foreground_probability(probabilities, [key])[1] == key + 1).all(), key
    assert (foreground_probability(probabilities[:1], [])[1] > 0).all()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("threshold", [0.1, 0.37, 0.5, 0.9])
def test_moving_the_threshold_puts_it_at_one_half(count, threshold):
    probabilities = random_probabilities(count).astype(np.float64)
    keys = np.arange(count)
    moved = move_threshold(probabilities, threshold)
    before, label = foreground_probability(probabilities, keys)
    after, same = foreground_probability(moved, keys)
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
        probability = max(scores) / (max(scores) + background)
        if abs(probability - threshold) > 1e-6:
            expected = keys[int(np.argmax(scores))] + 1 if probability > threshold else 0
            assert found == expected, f"{found}, not {expected}, at {y, x} with probability {probability:.4f}"


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_without_any_class_the_mask_is_background(threshold):
    mask = to_mask(np.ones((1, 4, 5), np.float32), np.array([], np.int64), threshold)
    assert mask.shape == (4, 5) and not mask.any(), mask
