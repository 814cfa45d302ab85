"""Metrics: hand-counted matrices, the sweep against a loop over thresholds, and every refusal."""
import math
import pickle

import numpy as np
import pytest

from utils.metrics import SweepHistogram, average_precision, central_box, confusion, foreground_iou, scores

TRUTH = np.array([[0, 0, 1, 1], [0, 2, 2, 255], [0, 0, 2, 255]], dtype=np.uint8)
PREDICTION = np.array([[0, 1, 1, 1], [0, 2, 0, 1], [0, 0, 1, 0]], dtype=np.uint8)
COUNTED = [[4, 1, 0], [0, 2, 0], [1, 1, 1]]  # by hand, rows truth


def random_image(rng, classes, shape=(13, 17), thresholds=(0.0, 0.5, 1.0), dtype=np.float32):
    """Probabilities: a third lie exactly on a threshold, a third one float beside it, and a third anywhere."""
    on = rng.choice(np.asarray(thresholds, np.float32), shape)
    beside = np.clip(np.nextafter(on, rng.choice([-1, 2], shape).astype(np.float32)), 0, 1)
    kind = rng.integers(0, 3, shape)
    probability = np.select([kind == 0, kind == 1], [on, beside], rng.random(shape)).astype(dtype)
    best = rng.integers(1, classes, shape, dtype=np.uint8)
    truth = rng.integers(0, classes, shape, dtype=np.uint8)
    truth[rng.random(shape) < 0.1] = 255
    return probability, best, truth


def looped(images, thresholds, classes):
    """The definition: for each threshold, one confusion matrix per image.  Returns (T, images, C, C)."""
    return np.array(
        [[confusion(np.where(probability >= t, best, 0).astype(np.uint8), truth, classes)
          for probability, best, truth in images] for t in thresholds]
    )


def test_confusion_equals_a_count_by_hand():
    found = confusion(PREDICTION, TRUTH, 3)
    assert found.dtype == np.int64 and found.tolist() == COUNTED, f"{found.dtype} {found.tolist()}"


@pytest.mark.parametrize("classes", [1, 2, 21, 81, 255])
def test_confusion_equals_a_loop_over_pixels(classes):
    rng = np.random.default_rng(classes)
    prediction, truth = rng.integers(0, classes, (2, 13, 17), dtype=np.uint8)
    truth[rng.random(truth.shape) < 0.2] = 255
    expected = np.zeros((classes, classes), np.int64)
    for t, p in zip(truth.flat, prediction.flat):
        if t != 255:
            expected[t, p] += 1
    found = confusion(prediction, truth, classes)
    assert (found == expected).all(), f"{abs(found - expected).sum()} pixels counted wrongly"


def test_an_image_of_ignored_pixels_counts_nothing():
    found = confusion(PREDICTION, np.full_like(TRUTH, 255), 3)
    assert found.sum() == 0 and found.shape == (3, 3), f"{found.tolist()}"


def test_another_ignore_value_is_respected():
    found = confusion(PREDICTION, np.where(TRUTH == 255, 7, TRUTH).astype(np.uint8), 3, ignore=7)
    assert found.tolist() == COUNTED, f"{found.tolist()}"


def test_scores_equal_the_figures_by_hand():
    found = scores(np.array(COUNTED))
    expected = {"miou": (4 / 6 + 2 / 4 + 1 / 3) / 3, "fg_iou": 4 / 6, "pixel_accuracy": 7 / 10}
    for key, value in expected.items():
        assert math.isclose(found[key], value) and type(found[key]) is float, f"{key}: {found[key]}, expected {value}"
    assert np.allclose(found["iou"], [4 / 6, 2 / 4, 1 / 3]), f"{found['iou']}"


def test_an_absent_class_is_none_and_left_out_of_the_mean():
    found = scores(np.array([[6, 0, 0], [2, 2, 0], [0, 0, 0]]))
    assert found["iou"] == [0.75, 0.5, None] and found["miou"] == 0.625, f"{found}"


def test_a_class_only_predicted_counts_as_zero():
    found = scores(np.array([[6, 0, 2], [0, 0, 0], [0, 0, 0]]))
    assert found["iou"] == [0.75, None, 0.0] and found["miou"] == 0.375, f"{found}"


def test_scores_without_pixels_are_nan():
    found = scores(np.zeros((3, 3), np.int64))
    assert all(math.isnan(found[key]) for key in ("miou", "fg_iou", "pixel_accuracy")), f"{found}"
    assert found["iou"] == [None, None, None], f"{found['iou']}"


def test_totals_beyond_32_bits_are_exact():
    large = np.full((20000, 1), 1, dtype=np.uint8)
    total = sum((confusion(large, large, 2) * 2**20 for _ in range(3)), np.zeros((2, 2), np.int64))
    found = scores(total + [[1, 0], [0, 0]])
    assert total[1, 1] == 3 * 20000 * 2**20 > 2**31, f"{total[1, 1]}"
    assert found["miou"] == found["fg_iou"] == found["pixel_accuracy"] == 1.0, f"{found}"


def test_foreground_iou_does_not_ask_for_the_class():
    wrong_class = confusion(np.array([[1, 1, 0]], np.uint8), np.array([[2, 2, 2]], np.uint8), 3)
    assert foreground_iou(wrong_class) == 2 / 3, f"{foreground_iou(wrong_class)}"


def test_foreground_iou_of_background_alone_is_nan():
    assert math.isnan(foreground_iou(np.array([[9, 0], [0, 0]]))), "no foreground, yet a score"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes, bins", [(2, 2), (4, 101), (21, 7), (81, 12)])
def test_the_sweep_equals_a_loop_over_thresholds(classes, bins, dtype):
    sweep, rng = SweepHistogram(classes, bins), np.random.default_rng(bins)
    images = [random_image(rng, classes, thresholds=sweep.thresholds(), dtype=dtype) for _ in range(4)]
    for image in images:
        sweep.update(*image)
    expected = looped(images, sweep.thresholds(), classes)
    found = sweep.confusions()
    assert found.dtype == np.int64 and found.shape == (bins, classes, classes), f"{found.dtype} {found.shape}"
    assert (found == expected.sum(axis=1)).all(), f"{abs(found - expected.sum(axis=1)).sum()} pixels differ"
    image_iou = np.array([[foreground_iou(one) for one in row] for row in expected]).mean(axis=1)
    error = abs(sweep.mean_image_fg_iou() - image_iou).max()
    assert error < 1e-12, f"mean image IoU differs by {error:.2e}"


def test_a_decimal_threshold_means_the_same_pixels_as_in_the_sweep():
    sweep = SweepHistogram(2)
    probability = np.tile(sweep.thresholds(), (2, 1))
    ones = np.ones(probability.shape, np.uint8)
    sweep.update(probability, ones, ones)
    found = sweep.confusions()[:, 1, 1]
    expected = [(probability >= np.float32(t / 100)).sum() for t in range(101)]
    assert found.tolist() == expected, f"{(found != expected).sum()} thresholds differ"


def test_images_without_foreground_are_left_out_of_the_image_mean():
    sweep = SweepHistogram(2, 3)
    ones, half = np.ones((2, 2), np.uint8), np.full((2, 2), 0.5)
    sweep.update(half, ones, ones)
    sweep.update(half, ones, 0 * ones)  # without foreground at threshold 1, all wrong below
    found = sweep.mean_image_fg_iou()
    assert found.tolist() == [0.5, 0.5, 0.0], f"{found}"


def test_the_image_mean_is_nan_before_any_image():
    assert np.isnan(SweepHistogram(3, 4).mean_image_fg_iou()).all()


def test_added_histograms_equal_one_over_all_images():
    whole, parts, rng = SweepHistogram(5), [SweepHistogram(5), SweepHistogram(5)], np.random.default_rng(0)
    for number in range(6):
        image = random_image(rng, 5)
        whole.update(*image)
        parts[number % 2].update(*image)
    parts[0].add(pickle.loads(pickle.dumps(parts[1])))  # as it comes from another process
    assert (parts[0].confusions() == whole.confusions()).all(), "counts differ"
    error = abs(parts[0].mean_image_fg_iou() - whole.mean_image_fg_iou()).max()
    assert error < 1e-12, f"mean image IoU differs by {error:.2e}"


@pytest.mark.parametrize("key", ["miou", "fg_iou", "pixel_accuracy", "image_fg_iou"])
def test_the_oracle_finds_the_threshold_the_truth_was_made_with(key):
    rng, sweep = np.random.default_rng(0), SweepHistogram(3)
    for _ in range(3):
        probability, best, _ = random_image(rng, 3, thresholds=sweep.thresholds())
        sweep.update(probability, best, np.where(probability >= np.float32(0.3), best, 0).astype(np.uint8))
    threshold, found = sweep.oracle(key)
    assert threshold == 0.3 and found[key] == 1.0, f"threshold {threshold}, {key} {found[key]}"


def test_the_oracle_takes_the_lowest_of_equal_thresholds():
    sweep = SweepHistogram(2, 11)
    sweep.update(np.array([[0.25, 0.85]]), np.ones((1, 2), np.uint8), np.array([[0, 1]], np.uint8))
    assert sweep.oracle()[0] == 0.3, f"{sweep.oracle()[0]}"


@pytest.mark.parametrize(
    "prediction, truth, classes, message",
    [
        (PREDICTION, TRUTH, 2, r"prediction has 1 pixels of value 2, allowed are 0..1; check"),
        (np.where(TRUTH == 255, 255, 0).astype(np.uint8), TRUTH, 3, "prediction has 2 pixels of value 255"),
        (0 * TRUTH, TRUTH, 2, r"truth has 3 pixels of value 2, allowed are 0..1 or 255 \(ignore\); check"),
        (PREDICTION[:2], TRUTH, 3, "resize the prediction"),
        (PREDICTION.astype(np.int64), TRUTH, 3, "prediction is int64"),
        (PREDICTION, TRUTH.astype(np.float32), 3, "truth is float32"),
        (PREDICTION, TRUTH[None], 3, r"give uint8 \(H, W\)"),
        (PREDICTION, TRUTH, 0, "classes is 0"),
        (PREDICTION, TRUTH, 256, "classes is 256"),
    ],
)
def test_confusion_refuses(prediction, truth, classes, message):
    with pytest.raises(ValueError, match=message):
        confusion(prediction, truth, classes)


@pytest.mark.parametrize("counts", [np.zeros((2, 3), int), np.zeros(4, int), np.zeros((2, 2))])
@pytest.mark.parametrize("function", [scores, foreground_iou])
def test_scores_refuse_what_is_not_a_confusion_matrix(function, counts):
    with pytest.raises(ValueError, match="square of integers"):
        function(counts)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(probability=np.full((3, 4), 1.01)), r"in \[0, 1\]"),
        (dict(probability=np.full((3, 4), -0.01)), r"in \[0, 1\]"),
        (dict(probability=np.full((3, 4), np.nan)), r"in \[0, 1\]"),
        (dict(probability=np.zeros((3, 4), np.float16)), "float16"),
        (dict(probability=np.zeros((4, 3))), "shapes differ"),
        (dict(truth=TRUTH[:2]), "shapes differ"),
        (dict(truth=TRUTH + 1), "truth has"),
        (dict(foreground_class=np.full((3, 4), 3, np.uint8)), "foreground_class has 12 pixels of value 3"),
        (dict(foreground_class=np.zeros((3, 4), np.uint8)), "foreground_class has 0"),
    ],
)
def test_the_sweep_refuses_and_counts_nothing(change, message):
    sweep = SweepHistogram(3)
    image = dict(probability=np.zeros((3, 4)), foreground_class=np.ones((3, 4), np.uint8), truth=TRUTH)
    with pytest.raises(ValueError, match=message):
        sweep.update(**{**image, **change})
    assert sweep.counts.sum() == 0, f"{sweep.counts.sum()} pixels were counted"


@pytest.mark.parametrize("classes, bins", [(1, 101), (256, 101), (3, 1)])
def test_a_sweep_of_nothing_is_refused(classes, bins):
    with pytest.raises(ValueError, match="or more"):
        SweepHistogram(classes, bins)


def test_the_oracle_and_add_refuse():
    with pytest.raises(ValueError, match="count images"):
        SweepHistogram(3).oracle()
    with pytest.raises(ValueError, match="no score 'iou'"):
        SweepHistogram(3).oracle("iou")
    with pytest.raises(ValueError, match="same classes and bins"):
        SweepHistogram(3).add(SweepHistogram(3, 11))


@pytest.mark.parametrize(
    "height, width, rows, columns", [(10, 20, 6, 12), (65, 97, 39, 58), (1, 1, 1, 1), (5, 1, 3, 1)]
)
def test_the_central_box_has_its_ratio_of_each_side(height, width, rows, columns):
    box = central_box(height, width)
    assert (box.shape, box.dtype) == ((height, width), bool), f"{box.shape} {box.dtype}"
    assert (box.any(axis=1).sum(), box.any(axis=0).sum(), box.sum()) == (rows, columns, rows * columns), f"{box.sum()}"
    off = [abs(int(line.argmax()) - int(line[::-1].argmax())) for line in (box.any(axis=1), box.any(axis=0))]
    assert max(off) <= 1, f"the margins differ by {off}"


@pytest.mark.parametrize("height, width, ratio", [(0, 5, 0.6), (5, 0, 0.6), (5, 5, 0), (5, 5, 1.1)])
def test_no_central_box_is_refused(height, width, ratio):
    with pytest.raises(ValueError, match="no central box"):
        central_box(height, width, ratio)


# --- average precision -----------------------------------------------------------------------------------------------

def looped_average_precision(scores, labels):
    """The definition: for each positive of a class, the ratio of positives among all that score at least as high."""
    areas = []
    for column, marks in zip(np.transpose(scores), np.transpose(labels)):
        positives = [score for score, mark in zip(column, marks) if mark]
        precision = [sum(p >= score for p in positives) / sum(column >= score) for score in positives]
        areas += [sum(precision) / len(precision)] if positives else []
    return sum(areas) / len(areas)


def test_average_precision_equals_a_count_by_hand():
    scores = np.array([[0.9], [0.8], [0.7], [0.1]])
    for labels, expected in (([1, 0, 1, 0], (1 + 2 / 3) / 2), ([0, 0, 0, 1], 1 / 4), ([1, 1, 0, 0], 1.0)):
        found = average_precision(scores, np.array(labels)[:, None])
        assert abs(found - expected) < 1e-12, f"{labels}: {found}, not {expected}"


@pytest.mark.parametrize("count, classes", [(1, 1), (7, 3), (60, 5)])
def test_average_precision_equals_a_loop_over_positives(count, classes):
    rng = np.random.default_rng(count)
    scores, labels = rng.standard_normal((count, classes)), rng.integers(0, 2, (count, classes), dtype=np.uint8)
    labels[0, 0] = 1
    found, expected = average_precision(scores, labels), looped_average_precision(scores, labels)
    assert abs(found - expected) < 1e-12, f"{found}, not {expected}"


def test_average_precision_leaves_out_classes_without_a_positive():
    scores, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[1, 0], [0, 0]])
    assert average_precision(scores, labels) == 1.0, average_precision(scores, labels)


@pytest.mark.filterwarnings("error")
def test_average_precision_without_any_positive_is_nan():
    assert math.isnan(average_precision(np.ones((3, 2)), np.zeros((3, 2), np.uint8)))


def test_average_precision_does_not_change_with_the_scale_of_the_scores():
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((30, 4)), rng.integers(0, 2, (30, 4))
    first, second = average_precision(scores, labels), average_precision(np.exp(3 * scores) - 5, labels)
    assert first == second and 0 < first < 1, (first, second)
