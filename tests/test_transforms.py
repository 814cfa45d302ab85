"""Augmentation: image and label stay aligned, padding is no class and no background, one seed gives one result."""
import numpy as np
import pytest
import torch

from utils.transforms import MEAN, STD, Augmentation, cutmix, normalise, resize_labels

CROP = 33


def coded(height, width):
    """An image whose red is the row and green the column, and its label: row and column mixed, below 255."""
    y, x = np.mgrid[:height, :width]
    return np.dstack([y, x, np.full_like(y, 9)]).astype(np.uint8), code(y, x).astype(np.uint8)


def code(y, x):
    return (y * 7 + x * 3) % 251


def decoded(image):
    """Rows, columns and the blue value read off a normalised image."""
    values = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
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
        changed += abs(x[:, y != 255].numpy() - normalise(image).flatten(1).numpy()).max() > 0.05
    assert changed == 5, f"{changed} of 5 images changed their colours"


def test_normalising_is_zero_at_the_mean_and_one_a_deviation_further():
    image = np.array([[[255, 0, 128]]], np.uint8)
    found = normalise(image)[:, 0, 0].tolist()
    expected = [(value / 255 - mean) / std for value, mean, std in zip((255, 0, 128), MEAN, STD)]
    assert np.allclose(found, expected, atol=1e-6), f"{found}, not {expected}"


def test_labels_are_resized_without_new_values():
    label = np.random.default_rng(0).choice(np.array([0, 3, 200, 255], np.uint8), (13, 17))
    for size in ((40, 9), (13, 17), (5, 50)):
        found = resize_labels(label, size)
        assert found.shape == size and set(np.unique(found)) <= {0, 3, 200, 255}, np.unique(found)
    assert (resize_labels(label, (39, 51))[1::3, 1::3] == label).all(), "thrice as large, the middles moved"


def numbered_batch(height=20, width=30):
    """Three images, each of its own number everywhere, and one class each."""
    return torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, height, width), torch.eye(3)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_puts_one_rectangle_of_the_image_before_and_its_share_of_the_labels(seed):
    torch.manual_seed(seed)
    images, labels = numbered_batch()
    mixed, shares = cutmix(images, labels)
    foreign = mixed[:, 0] != images[:, 0]
    for index in range(3):
        seen = set(mixed[index][:, foreign[index]].unique().tolist())
        assert seen <= {(index - 1) % 3}, f"image {index} holds parts of {seen}"
        rows, columns = foreign[index].any(1).sum(), foreign[index].any(0).sum()
        assert foreign[index].sum() == rows * columns, f"{foreign[index].sum()} pixels, not {rows} x {columns}"
        share = foreign[index].float().mean()
        expected = torch.zeros(3).index_add(0, torch.tensor([index, (index - 1) % 3]), torch.stack([1 - share, share]))
        assert torch.allclose(shares[index], expected, atol=1e-6), f"labels {shares[index]}, pixels {expected}"
    assert torch.equal(images, numbered_batch()[0]), "cutmix changed its input"


def test_cutmix_draws_shares_evenly_from_torchs_generator():
    images, labels = numbered_batch(64, 64)
    torch.manual_seed(0)
    shares = torch.stack([cutmix(images, labels)[1][0, 2] for _ in range(400)])
    assert abs(shares.mean() - 0.5) < 0.06 and shares.min() < 0.05 and shares.max() > 0.95, f"{shares.mean():.3f}"
    torch.manual_seed(7)
    first = cutmix(images, labels)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, cutmix(images, labels))), "one seed gave two results"


def test_cutmix_leaves_a_single_image_as_it_is():
    images, labels = torch.rand(1, 3, 9, 9), torch.tensor([[0.0, 1.0]])
    mixed, shares = cutmix(images, labels)
    assert torch.equal(mixed, images) and torch.allclose(shares, labels), f"labels became {shares}"
