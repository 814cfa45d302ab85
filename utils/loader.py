"""Feeding a dataset to a network: augmented training samples, and whole images for validation and inference."""
import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.maps import capped_size, resize_image, snapped_size
from utils.transforms import normalise, resize_labels


class TrainingSamples(torch.utils.data.Dataset):
    """Augmented samples addressed by (epoch, index).

    What a sample looks like depends on (seed, epoch, index) only: not on the number of workers, nor on where a run
    was interrupted.  target: function index -> uint8 (H, W), or None.
    """

    def __init__(self, dataset, augmentation, seed, target=None):
        self.dataset, self.augmentation, self.seed, self.target = dataset, augmentation, seed, target

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        target = None if self.target is None else self.target(index)
        image, target = self.augmentation(self.dataset.image(index), target, rng)
        sample = {"image": image, "index": index}
        if self.dataset.labels is not None:
            sample["labels"] = torch.from_numpy(self.dataset.labels[index])
        if target is not None:
            sample["target"] = target
        return sample


class EpochBatches:
    """Batch sampler: a permutation of the samples drawn from (seed, epoch), cut into batches, from batch `start` on.

    A last batch of one sample joins the one before it, as batch statistics of one are useless.
    """

    def __init__(self, count, batch_size, seed, epoch, start=0):
        order = np.random.default_rng((seed, epoch, 2**31)).permutation(count).tolist()
        batches = [order[i:i + batch_size] for i in range(0, count, batch_size)]
        if len(batches) > 1 and len(batches[-1]) == 1 < batch_size:
            batches[-2:] = [batches[-2] + batches[-1]]
        self.batches = [[(epoch, index) for index in batch] for batch in batches[start:]]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class WholeImages(torch.utils.data.Dataset):
    """Images as a network sees them: at each scale of their capped size, snapped to stride*k + 1.

    Item i: {"index", "size": (H, W) in the file, "views": one float32 (3, h, w) per scale}; with `target`, a function
    index -> uint8 (H, W), also "target" int64 at the size of the first view.
    """

    def __init__(self, dataset, scales=(1.0,), max_size=512, stride=16, target=None):
        self.dataset, self.scales, self.max_size = dataset, scales, max_size
        self.stride, self.target = stride, target

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image = self.dataset.image(index)
        views = scaled_views(image, self.scales, self.max_size, self.stride)
        item = {"index": index, "size": image.shape[:2], "views": views}
        if self.target is not None:
            target = resize_labels(self.target(index), views[0].shape[-2:])
            item["target"] = torch.from_numpy(target.astype(np.int64))
        return item


def scaled_views(image, scales, max_size, stride):
    """uint8 (H, W, 3) -> normalised float32 (3, h, w) at each scale, sides stride*k + 1."""
    base = capped_size(image.shape[:2], max_size)
    sizes = [snapped_size([side * scale for side in base], stride) for scale in scales]
    return [normalise(resize_image(image, size)) for size in sizes]


def whole_image_loader(images, workers, device):
    """One image at a time, decoded ahead of the network by `workers` processes."""
    return DataLoader(images, batch_size=None, num_workers=min(workers, len(images)), pin_memory=device.type == "cuda")


def equal_batches(items, count):
    """Gather items of `WholeImages` whose views have equal sizes: lists of up to `count` of them.

    At most 4 times `count` items are held back; items whose partners do not come are then given out in fewer.
    """
    groups = {}  # sizes -> items, the group begun first at the front
    for item in items:
        sizes = tuple(view.shape for view in item["views"])
        groups.setdefault(sizes, []).append(item)
        if len(groups[sizes]) == count:
            yield groups.pop(sizes)
        elif sum(map(len, groups.values())) >= 4 * count:
            yield groups.pop(next(iter(groups)))
    yield from groups.values()


def training_loader(samples, batches, workers, device):
    """Batches of `samples` in the order of `batches` (an EpochBatches)."""
    # A generator of its own keeps the loader from drawing on the global one, so that resuming changes nothing.
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, generator=torch.Generator(),
                      pin_memory=device.type == "cuda")
