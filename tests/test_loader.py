"""Samples depend on (seed, epoch, index) alone; every epoch is a permutation that can be taken up in the middle."""
import pickle

import numpy as np
import pytest
import torch

from utils.config import Machine
from utils.loader import (
    EpochBatches,
    TrainingSamples,
    Views,
    WholeImages,
    equal_batches,
    training_loader,
    whole_image_loader,
)
from utils.transforms import Augmentation, Normalise

CPU = torch.device("cpu")


class Pictures:
    """A dataset in memory: noise of varied sizes."""

    def __init__(self, count=7):
        rng = np.random.default_rng(0)
        self.images = [rng.integers(0, 256, (20 + 5 * i, 60 - 4 * i, 3), dtype=np.uint8) for i in range(count)]
        self.labels = np.eye(count, 3, dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def photo(self, index, used):
        image = self.image(index)
        return image, image.shape[:2]

    def image(self, index):
        return self.images[index]


def read(dataset, index):
    """A label map of three classes."""
    return dataset.image(index)[..., 0] % 3


def samples(seed=0, read=read):
    return TrainingSamples(Pictures(), Augmentation(33), seed, read)


def loaded(workers, epoch=1, start=0, seed=0):
    batches = EpochBatches(7, 3, seed, epoch, start)
    return list(training_loader(samples(seed), batches, workers, CPU))


def assert_same(first, second):
    assert len(first) == len(second), f"{len(first)} and {len(second)} batches"
    for number, (a, b) in enumerate(zip(first, second)):
        different = [name for name in a if not torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name]))]
        assert a.keys() == b.keys() and not different, f"batch {number}: {different} differ"


# --- samples -------------------------------------------------------------------------------------------------------

def test_samples_do_not_depend_on_the_workers():
    assert_same(loaded(workers=0), loaded(workers=2))


def test_samples_do_not_depend_on_where_the_epoch_is_taken_up():
    assert_same(loaded(workers=0)[1:], loaded(workers=0, start=1))


def test_samples_do_not_depend_on_global_random_numbers():
    torch.manual_seed(1), np.random.seed(1)
    first = loaded(workers=0)
    torch.manual_seed(2), np.random.seed(2)
    state = torch.get_rng_state()
    assert_same(first, loaded(workers=0))
    assert torch.equal(state, torch.get_rng_state()), "loading drew from torch's global generator"


def test_a_sample_changes_with_seed_epoch_and_index():
    base = samples(seed=0)[0, 2]["image"]
    assert torch.equal(base, samples(seed=0)[0, 2]["image"]), "the same key gave another sample"
    others = {"seed": samples(seed=1)[0, 2], "epoch": samples(seed=0)[1, 2], "index": samples(seed=0)[0, 3]}
    same = [name for name, sample in others.items() if torch.equal(base, sample["image"])]
    assert not same, f"the sample is the same with another {same}"


def test_a_sample_carries_its_labels_and_its_target_if_there_is_one():
    sample = samples()[0, 1]
    assert sample["index"] == 1 and sample["labels"].tolist() == [0, 1, 0], sample["labels"]
    assert sample["image"].shape == (3, 33, 33) and sample["target"].shape == (33, 33)
    assert "target" not in samples(read=None)[0, 1]


def test_samples_and_whole_images_survive_pickling():
    """As workers get them that are not forked."""
    one, other = samples(), pickle.loads(pickle.dumps(samples()))
    assert_same([one[1, 4]], [other[1, 4]])
    images = WholeImages(Pictures(), Views((1.0, 2.0), 64, 16), read)
    one, other = images[3], pickle.loads(pickle.dumps(images))[3]
    assert torch.equal(one["target"], other["target"])
    assert all(torch.equal(a, b) for a, b in zip(one["views"], other["views"], strict=True))


# --- batches -------------------------------------------------------------------------------------------------------

def indices(batches):
    return [index for batch in batches for _, index in batch]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 100])
def test_every_index_comes_once_and_no_batch_is_a_left_over_sample(count, batch_size):
    batches = list(EpochBatches(count, batch_size, 0, 0))
    assert sorted(indices(batches)) == list(range(count)), indices(batches)
    sizes = [len(batch) for batch in batches]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1) and sizes[-1] <= batch_size + 1, sizes
    assert min(sizes) > 1 or count == 1 or batch_size == 1, f"a batch of one sample in {sizes}"
    assert len(EpochBatches(count, batch_size, 0, 0)) == len(sizes), (len(EpochBatches(count, batch_size, 0, 0)), sizes)


def test_batches_of_one_stay_batches_of_one():
    sizes = [len(batch) for batch in EpochBatches(5, 1, 0, 0)]
    assert sizes == [1] * 5, f"{sizes}: memory for one image may not do for two"


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert [len(batch) for batch in EpochBatches(3, 16, 0, 0)] == [3]
    assert [len(batch) for batch in EpochBatches(1, 16, 0, 0)] == [1]


def test_another_epoch_or_seed_is_another_permutation():
    orders = {(seed, epoch): indices(EpochBatches(40, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert orders[0, 0] == indices(EpochBatches(40, 8, 0, 0)), "the same seed and epoch gave another order"
    different = {tuple(order) for order in orders.values()}
    assert len(different) == 4 and tuple(range(40)) not in different, f"{len(different)} orders of 4"


def test_each_key_names_its_epoch():
    assert {epoch for batch in EpochBatches(9, 4, 0, 5) for epoch, _ in batch} == {5}


@pytest.mark.parametrize("start", range(6))
def test_start_gives_the_tail_of_the_epoch(start):
    whole = list(EpochBatches(17, 4, 3, 2))
    tail = EpochBatches(17, 4, 3, 2, start)
    assert list(tail) == whole[start:] and len(tail) == len(whole[start:]), f"{len(tail)} of {len(whole)} from {start}"


# --- whole images --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride", [8, 16])
def test_views_are_snapped_capped_and_follow_the_scale(stride):
    image = np.random.default_rng(0).integers(0, 256, (75, 131, 3), dtype=np.uint8)
    views = Views((0.5, 1.0, 1.5), 100, stride)(image)
    for scale, view in zip((0.5, 1.0, 1.5), views):
        for side, target in zip(view.shape[1:], (57 * scale, 100 * scale)):
            assert (side - 1) % stride == 0, f"side {side} at stride {stride}"
            assert abs(side - target) <= stride / 2 + 1, f"side {side} for {target} at scale {scale}"
        assert view.shape[0] == 3 and view.dtype == torch.float32, (view.shape, view.dtype)


def test_views_are_normalised_as_the_backbone_asks():
    image = np.random.default_rng(0).integers(0, 256, (65, 97, 3), dtype=np.uint8)  # of a size that stays as it is
    (view,) = Views((1.0,), 97, 16, Normalise((0.5, 0.25, 0.0), (0.5, 1.0, 2.0)))(image)
    expected = (image / 255 - (0.5, 0.25, 0.0)) / (0.5, 1.0, 2.0)
    gap = abs(view.permute(1, 2, 0).numpy() - expected).max() / abs(expected).max()
    assert gap < 1e-6, f"off by {gap:.1e} of the largest value"


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_images_come_in_order_with_their_own_size(workers):
    pictures = Pictures()
    images = WholeImages(pictures, Views((1.0, 2.0), 64, 16), read)
    items = list(whole_image_loader(images, Machine(CPU, workers=workers)))
    assert [item["index"] for item in items] == list(range(7)), [item["index"] for item in items]
    for item in items:
        size = pictures.image(item["index"]).shape[:2]
        assert tuple(int(side) for side in item["size"]) == size, f"{item['size']}, not {size}"
        assert len(item["views"]) == 2 and item["target"].shape == item["views"][0].shape[-2:]
        assert item["target"].dtype == torch.int64 and item["target"].max() <= 2


def test_more_workers_than_images_are_not_started():
    loader = whole_image_loader(WholeImages(Pictures(2), Views((1.0,), 64, 16)), Machine(CPU, workers=9))
    assert loader.num_workers == 2, loader.num_workers


def sized(*sides):
    return [{"index": i, "views": [torch.zeros(3, side, 9)]} for i, side in enumerate(sides)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_batches_hold_every_item_once_and_one_size_each(count):
    sides = [5, 7, 5, 5, 9, 7, 5, 5, 7, 11]
    batches = list(equal_batches(iter(sized(*sides)), count))
    assert sorted(item["index"] for batch in batches for item in batch) == list(range(len(sides)))
    for batch in batches:
        assert len(batch) <= count and len({item["views"][0].shape for item in batch}) == 1
    if count == 1:
        assert [batch[0]["index"] for batch in batches] == list(range(len(sides))), "the order changed for nothing"


def test_equal_batches_hold_back_no_more_than_four_batches():
    taken = []
    batches = equal_batches((taken.append(item) or item for item in sized(*range(40))), 2)
    held = []
    for given, _ in enumerate(batches, 1):
        held.append(len(taken) - given)
    assert max(held) < 8, f"{max(held)} items held back"
