"""Augmentation: image and label stay aligned, padding is no class and no background, one seed gives one result."""
import numpy as np
import pytest
import torch

from utils.transforms import IMAGENET, Augmentation, Normalise

CROP = 33


def coded(height, width):
    """An image whose red is the row and green the column, and its label: row and column mixed, below 255."""
    y, x = np.mgrid[:height, :width]
    return np.dstack([y, x, np.full_like(y, 9)]).astype(np.uint8), code(y, x).astype(np.uint8)


def code(y, x):
    return (y * 7 + x * 3) % 251


def decoded(image, normalise=IMAGENET):
    """Rows, columns and the blue value of a normalised image."""
    values = (image * torch.tensor(normalise.std)[:, None, None] + torch.tensor(normalise.mean)[:, None, None]) * 255
    return values.round().long().numpy()


def plain(crop=CROP, **keywords):
    return Augmentation(crop, **{"jitter": False, "max_size": 10_000, **keywords})


def inside(image):
    """Pixels that are not padding: the coded images have no pixel of the mean colour."""
    return (image != 0).any(dim=0).numpy()


@pytest.mark.parametrize("size", [(20, 25), (33, 33), (70, 90), (20, 90), (90, 20), (33, 34), (1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_pad_and_flip_keep_image_and_label_aligned(size, flip):
    image, label = coded(*size)
    flipped = 0
    for seed in range(12):
        x, y = plain(flip=flip)(image, label, np.random.default_rng(seed))
        rows, columns, blue = decoded(x)
        kept = inside(x)
        expected = np.where(kept, code(rows, columns), 255)
        wrong = (y.numpy() != expected).sum()
        assert wrong == 0, f"{wrong} of {CROP ** 2} labels do not belong to their pixel (seed {seed})"
        assert kept.sum() == min(size[0], CROP) * min(size[1], CROP), f"{kept.sum()} pixels of the image are there"
        assert (blue[kept] == 9).all()
        steps = np.diff(np.where(kept, columns, 0), axis=1)[kept[:, 1:] & kept[:, :-1]]
        assert steps.size == 0 or (steps == steps[0]).all() and abs(steps[0]) == 1, f"columns are not in order: {steps}"
        flipped += steps.size > 0 and steps[0] == -1
    expected = "some" if flip and size[1] > 1 else "none"
    assert (0 < flipped < 12) == (expected == "some"), f"{flipped} of 12 flipped, expected {expected}"


@pytest.mark.parametrize("jitter", [False, True])
def test_padding_never_counts_as_background(jitter):
    image, label = np.full((20, 25, 3), 200, np.uint8), np.zeros((20, 25), np.uint8)
    x, y = plain(jitter=jitter)(image, label, np.random.default_rng(0))
    assert x.shape == (3, CROP, CROP) and x.dtype == torch.float32, (x.shape, x.dtype)
    assert y.shape == (CROP, CROP) and y.dtype == torch.int64, (y.shape, y.dtype)
    padding = y == 255
    assert padding.sum() == CROP ** 2 - 20 * 25, f"{padding.sum()} pixels are padding"
    assert (x[:, padding] == 0).all(), f"padding of the image holds {x[:, padding].unique()[:5]}"
    assert (y[~padding] == 0).all() and (x[:, ~padding] != 0).all()


def test_small_images_are_put_in_every_place_and_large_ones_cut_everywhere():
    for size in ((20, 33), (60, 33)):
        image, label = coded(*size)
        places = set()
        for seed in range(200):
            x, _ = plain(flip=False)(image, label, np.random.default_rng(seed))
            rows, _, _ = decoded(x)
            first = int(inside(x)[:, 0].argmax())
            places.add((first, int(rows[first, 0])))
        reach = abs(CROP - size[0]) + 1
        assert len(places) > 0.9 * reach, f"{len(places)} of {reach} places of a {size} image in 200 draws"


@pytest.mark.parametrize("size", [(20, 25), (70, 90)])
def test_one_seed_gives_one_result_and_another_gives_another(size):
    image = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    label = np.random.default_rng(6).integers(0, 4, size, dtype=np.uint8)
    augment = Augmentation(CROP, long_side=(20, 60))
    (a, la), (b, lb), (c, lc) = (augment(image, label, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and torch.equal(la, lb), "the same generator gave another sample"
    assert not torch.equal(a, c) and not torch.equal(la, lc), "another generator gave the same sample"


def test_nothing_is_drawn_from_the_global_generators():
    image, label = coded(40, 50)
    torch.manual_seed(0), np.random.seed(0)
    before = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    Augmentation(CROP, long_side=(20, 60))(image, label, np.random.default_rng(0))
    after = torch.rand(1).item(), np.random.rand()
    assert before == after, f"{before} became {after}"


def test_the_image_is_the_same_with_and_without_a_label():
    image, label = coded(40, 50)
    augment = Augmentation(CROP)
    alone, nothing = augment(image, None, np.random.default_rng(3))
    together, _ = augment(image, label, np.random.default_rng(3))
    assert nothing is None and torch.equal(alone, together)


def test_the_arrays_handed_in_are_left_alone():
    image, label = coded(40, 50)
    image.setflags(write=False), label.setflags(write=False)
    kept = image.copy(), label.copy()
    for seed in range(4):
        Augmentation(CROP)(image, label, np.random.default_rng(seed))
    assert (image == kept[0]).all() and (label == kept[1]).all()


@pytest.mark.parametrize("size", [(30, 60), (200, 100), (45, 45)])
def test_the_long_side_is_drawn_from_its_range(size):
    low, high, crop = 40, 80, 101
    image = np.full((*size, 3), 200, np.uint8)
    sides = []
    for seed in range(60):
        x, y = plain(crop, long_side=(low, high))(image, np.zeros(size, np.uint8), np.random.default_rng(seed))
        rows, columns = (y == 0).any(dim=1).sum().item(), (y == 0).any(dim=0).sum().item()
        assert abs(rows / columns - size[0] / size[1]) < 0.06 * size[0] / size[1], f"{rows}x{columns} from {size}"
        sides.append(max(rows, columns))
    assert low <= min(sides) and max(sides) <= high, f"long sides {min(sides)}..{max(sides)}, not {low}..{high}"
    assert max(sides) - min(sides) > 0.7 * (high - low), f"long sides only {min(sides)}..{max(sides)}"


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 1.5)])
def test_the_scale_is_relative_to_the_capped_image(scale):
    image, label = np.full((60, 120, 3), 200, np.uint8), np.zeros((60, 120), np.uint8)
    augment = Augmentation(101, scale=scale, max_size=40, jitter=False)
    sides = [(augment(image, label, np.random.default_rng(seed))[1] == 0).any(dim=0).sum().item() for seed in range(40)]
    low, high = (round(40 * factor) for factor in scale)
    assert low <= min(sides) and max(sides) <= high, f"long sides {min(sides)}..{max(sides)}, not {low}..{high}"
    assert max(sides) - min(sides) >= 0.7 * (high - low)


def test_small_images_are_not_enlarged_by_the_cap():
    _, y = Augmentation(101, max_size=512, jitter=False)(
        np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8), np.random.default_rng(0))
    assert (y == 0).sum() == 30 * 40, f"{(y == 0).sum()} pixels"


def test_jitter_changes_colours_but_not_labels():
    image, label = coded(40, 50)
    changed = 0
    for seed in range(5):
        x, y = Augmentation(61, jitter=True, flip=False)(image, label, np.random.default_rng(seed))
        assert sorted(y[y != 255].tolist()) == sorted(label.ravel().tolist()), f"labels changed with seed {seed}"
        changed += abs(x[:, y != 255].numpy() - IMAGENET(image).flatten(1).numpy()).max() > 0.05
    assert changed == 5, f"{changed} of 5 images changed their colours"


@pytest.mark.parametrize("normalise", [IMAGENET, Normalise((0.5, 0.4, 0.3), (0.5, 0.25, 1.0))])
def test_normalising_equals_a_loop_over_the_values(normalise):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image[0, 0] = 255, 0, 128
    found = normalise(image)
    assert found.shape == (3, 5, 7) and found.dtype == torch.float32, (found.shape, found.dtype)
    for (y, x, channel), value in np.ndenumerate(image):
        expected = (value / 255 - normalise.mean[channel]) / normalise.std[channel]
        error = abs(found[channel, y, x].item() - expected)
        assert error < 1e-6 * max(1, abs(expected)), f"{found[channel, y, x]}, not {expected}, at {y, x, channel}"


def test_the_default_statistics_are_imagenets():
    assert IMAGENET == Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) == Normalise(), IMAGENET


def test_a_backbones_own_statistics_are_used_and_padding_stays_zero():
    image, label = coded(20, 25)
    own = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    x, y = plain(flip=False, normalise=own)(image, label, np.random.default_rng(0))
    kept = (y != 255).numpy()
    assert (x[:, ~kept] == 0).all(), f"padding of the image holds {x[:, ~kept].unique()[:5]}"
    rows, columns, blue = decoded(x, own)
    assert (code(rows, columns)[kept] == y.numpy()[kept]).all() and (blue[kept] == 9).all(), "the colours are others"
