"""Feeding a dataset to a network: augmented training samples, and whole images for validation and inference."""
import atexit
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.config import Machine
from utils.datasets.base import Dataset
from utils.errors import ImageError, UserError
from utils.grids import capped_size, largest_view, resize_image, resize_labels, snapped_size
from utils.log import set_level, warn, worker_level
from utils.transforms import IMAGENET, Augmentation, Normalise

Read = Callable[[Dataset, int], np.ndarray]  # (split, position) -> label map uint8 (H, W); picklable


class TrainingSamples(torch.utils.data.Dataset):
    """Augmented samples addressed by (epoch, index).

    What a sample looks like depends on (seed, epoch, index) only: not on the number of workers or ranks, nor on where a
    run was interrupted.  read: label map of an image, or None.
    skip_bad: replace an undecodable image by the next decodable one, in the order of the split; a sample then has
    "failures", JSON {image id: reason} of those it passed over.
    """

    def __init__(self, dataset: Dataset, augmentation: Augmentation, seed: int, read: Read | None = None,
                 skip_bad: bool = False):
        self.dataset, self.augmentation, self.seed, self.read = dataset, augmentation, seed, read
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, object]:
        epoch, wanted = key
        rng = np.random.default_rng((self.seed, epoch, wanted))
        index, image, failures = self._readable(wanted)
        target = None if self.read is None else self.read(self.dataset, index)
        image, target = self.augmentation(image, target, rng)
        sample = {"image": image, "index": index}
        if self.dataset.labels is not None:
            sample["labels"] = torch.from_numpy(self.dataset.labels[index])
        if target is not None:
            sample["target"] = target
        return {**sample, "failures": json.dumps(failures)} if self.skip_bad else sample

    def _readable(self, wanted: int) -> tuple[int, np.ndarray, dict[str, str]]:
        """(index, image, {id: reason}) of the first image from `wanted` on that can be decoded."""
        failures = {}
        for index in [*range(wanted, len(self.dataset)), *range(wanted)] if self.skip_bad else [wanted]:
            try:
                return index, self.dataset.photo(index, self.augmentation.largest)[0], failures
            except ImageError as error:
                if not self.skip_bad:
                    raise
                failures[self.dataset.ids[index]] = str(error)
        raise UserError(f"none of the {len(failures)} training images can be decoded, such as: "
                        f"{next(iter(failures.values()))}")


class EpochBatches:
    """Batch sampler: a permutation of the samples drawn from (seed, epoch), cut into batches, from batch `start` on.

    A last batch of one sample joins the one before it, as batch statistics of one are useless; so does one of fewer
    samples than there are ranks.  rank, world: this rank takes its slice of each batch, `bounds` says which.
    The order is held as an array, not as a list of tuples: 0.7 MB for COCO instead of 9.
    """

    def __init__(self, count: int, batch_size: int, seed: int, epoch: int, start: int = 0, rank: int = 0,
                 world: int = 1):
        self.order = np.random.default_rng((seed, epoch, 2**31)).permutation(count)
        self.epoch, self.start, self.rank, self.world = epoch, start, rank, world
        self.edges = [*range(0, count, batch_size), count]
        if len(self.edges) > 2 and self.edges[-1] - self.edges[-2] < min(max(2, world), batch_size):
            del self.edges[-2]

    def bounds(self, number: int) -> tuple[int, int, int]:
        """(first, end, images): the slice of the batch `number` of the epoch that this rank takes, and its size."""
        images = self.edges[number + 1] - self.edges[number]
        return images * self.rank // self.world, images * (self.rank + 1) // self.world, images

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, len(self.edges) - 1):
            first, end, _ = self.bounds(number)
            chosen = self.order[self.edges[number] + first:self.edges[number] + end]
            yield [(self.epoch, index) for index in chosen.tolist()]

    def __len__(self) -> int:
        return max(0, len(self.edges) - 1 - self.start)


class WholeImages(torch.utils.data.Dataset):
    """Images as a network sees them: at each scale of their capped size, snapped to stride * k + 1.

    Item i: {"index", "size": (H, W) in the file, "views": one float32 (3, h, w) per scale}; with `read`, also "target"
    int64 at the size of the first view.
    skip_bad: whether the loader passes over images that cannot be decoded; `failures`, {image id: reason}, has them.
    """

    def __init__(self, dataset: Dataset, views: "Views", read: Read | None = None, skip_bad: bool = False):
        self.dataset, self.views, self.read, self.skip_bad = dataset, views, read, skip_bad
        self.failures = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, object]:
        try:
            image, size = self.dataset.photo(index, self.views.largest)
        except ImageError as error:
            if not self.skip_bad:
                raise
            return {"index": index, "failure": str(error)}
        views = self.views(image)
        item = {"index": index, "size": size, "views": views}
        if self.read is not None:
            target = resize_labels(self.read(self.dataset, index), views[0].shape[-2:])
            item["target"] = torch.from_numpy(target.astype(np.int64))
        return item


class Views:
    """uint8 (H, W, 3) -> a normalised float32 (3, h, w) at each scale of its size capped at `max_size`.

    Inputs are resized to k * stride + 1 pixels, so that feature maps can be resampled corners on corners.
    largest: pixels of the long side that a photo is decoded for; left out, those of the largest view.
    """

    def __init__(self, scales: Sequence[float], max_size: int, stride: int, normalise: Normalise = IMAGENET,
                 largest: float | None = None):
        self.scales, self.max_size, self.stride, self.normalise = tuple(scales), max_size, stride, normalise
        self.largest = largest or largest_view(max_size, self.scales)

    def __call__(self, image: np.ndarray) -> list[torch.Tensor]:
        base = capped_size(image.shape[:2], self.max_size)
        sizes = [snapped_size([side * scale for side in base], self.stride) for scale in self.scales]
        return [self.normalise(resize_image(image, size)) for size in sizes]


class Loader(DataLoader):
    """A DataLoader that tells in one line that the system has ended one of its workers."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(f"the system ended a process that reads images ({str(error).splitlines()[0]}), most often "
                            "because memory or /dev/shm ran out; run again with fewer --workers (now "
                            f"{self.num_workers}); finished work is kept, and training goes on with --resume") from None


class WholeImageLoader(Loader):
    """Passes over images that cannot be decoded, and notes them in `failures` of its `WholeImages`."""

    def __iter__(self):
        for item in super().__iter__():
            if "failure" in item:
                image_id = self.dataset.dataset.ids[item["index"]]
                warn(f"Skipping {image_id}: {item['failure']}")
                self.dataset.failures[image_id] = item["failure"]
            else:
                yield item


def whole_image_loader(images: WholeImages, machine: Machine) -> WholeImageLoader:
    """One image at a time, decoded ahead of the network by the machine's workers."""
    return WholeImageLoader(images, batch_size=None, num_workers=min(machine.workers, len(images)),
                            pin_memory=machine.device.type == "cuda",
                            worker_init_fn=partial(_print_as_told, level=worker_level()))


def _print_as_told(_: int, level: str) -> None:
    set_level(level)


def _outlive_sigterm(worker: int, level: str) -> None:
    """Let this worker pass over one SIGTERM; the second ends it.  level: what it prints.

    A cluster sends it to all processes; the main one then finishes its step and saves, and needs its data for that.
    A worker that hangs gets more: the main process sends it when it closes the loader, and SIGKILL at its own end.  A
    handler, as a blocked signal would reach the threads that numpy has started in a worker that was not forked.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    _print_as_told(worker, level)


@atexit.register
def _end_workers() -> None:
    """End the workers of loaders that are open when this process ends, as an error's traceback may hold them.

    multiprocessing would send them one SIGTERM, which `_outlive_sigterm` passes over, and wait for ever.
    """
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # of torch, which would report the end of a worker as an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def equal_batches(items: Iterable[dict[str, object]], count: int) -> Iterator[list[dict[str, object]]]:
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


def training_loader(samples: TrainingSamples, batches: EpochBatches, workers: int, device: torch.device) -> Loader:
    """Batches of `samples` in the order of `batches`; its workers outlive one SIGTERM."""
    # A generator of its own keeps the loader from drawing on the global one, so that resuming changes nothing.
    return Loader(samples, batch_sampler=batches, num_workers=workers, generator=torch.Generator(),
                  pin_memory=device.type == "cuda", worker_init_fn=partial(_outlive_sigterm, level=worker_level()))
