"""One map of work over a split into a folder: what is pending, progress, failures, the manifest."""
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from utils.config import Machine
from utils.datasets.base import Dataset
from utils.errors import ImageError
from utils.loader import Views, WholeImages, equal_batches, whole_image_loader
from utils.log import progress, say
from utils.parallel import in_threads, map_parallel
from utils.runtime import release_memory
from utils.store import Folder, made_of

Item, Result = TypeVar("Item"), TypeVar("Result")
Failures = dict[str, str]  # image id -> reason
# Images of equal size that go through a network together. Two cores are kept busy by one: batches of four gained 2 to
# 10 % there, and an image's map would depend, in its last bits, on which others are done in the same run.
TOGETHER = {"cpu": 1, "cuda": 16}
RELEASE = 50  # images of many sizes leave holes in freed memory: after so many it is given back to the system
THREADS = 4  # images that a CPU works on at once, at most: two cores take 0.75 of the time, and each needs memory


def map_split(dataset: Dataset, folder: Folder, work: Callable[[Dataset], Failures], record: dict[str, object],
              parent: Path | None = None, keep: bool = False) -> Dataset:
    """Make the files of a split that a folder does not have yet.

    work: writes the files of a split, and returns the images that could not be read (--on_bad_image skip).
    record: for the manifest: {"options": ..., and the environment}.  parent: the folder whose files the work reads;
    what could not be made there is left out here.  keep: leave a folder that has everything as it is, with its
    manifest, whose hash later folders carry.
    Returns the split without the images that could not be made.
    """
    dataset = dataset if parent is None else made_of(dataset, parent)
    if keep and folder.holds(dataset):
        say(f"Using {folder.path}: made with the same networks, options and data")
        return made_of(dataset, folder.path)
    pending = folder.begin(dataset)
    if len(pending):
        folder.failures.update(work(pending))
    folder.finish(dataset, record, parent)
    return dataset.without(folder.failures)


def through_network(pending: Dataset, views: Views, make: Callable[[list[dict], list[str]], None], machine: Machine,
                    description: str, threads: int = 1) -> Failures:
    """Hand images to a network: make(items of `WholeImages` whose views have equal sizes, their ids) writes files.

    threads: in which `make` runs at once, see `network_threads`.
    """
    images = WholeImages(pending, views, skip_bad=machine.skip_bad)
    items = progress(whole_image_loader(images, machine), description, len(pending))
    batches = equal_batches(items, TOGETHER[machine.device.type])
    for _ in at_once(lambda batch: make(batch, [pending.ids[item["index"]] for item in batch]), batches, threads):
        pass
    return images.failures


def at_once(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """What a function that runs a network gives for each item, in their order.  threads: see `network_threads`."""
    for count, result in enumerate(in_threads(function, items, threads), start=1):
        if count % RELEASE == 0:
            release_memory()
        yield result


def network_threads(backbone: nn.Module, device: torch.device) -> int:
    """In how many threads a network is best run at once: on a CPU one for each core, at most THREADS."""
    if device.type != "cpu" or not getattr(backbone, "reentrant", False):
        return 1
    return min(THREADS, torch.get_num_threads())


def through_workers(pending: Dataset, function: Callable[[tuple[str, Dataset]], None], machine: Machine,
                    description: str, threads: bool = False) -> Failures:
    """Hand images to worker processes, or threads: function((image id, that image alone as a split)) writes a file."""
    if machine.skip_bad:
        function = partial(_or_reason, function)
    failures = {}
    for failure in map_parallel(function, pending, machine.workers, description, threads):
        failures.update(failure or {})
    return failures


def _or_reason(function: Callable, item: tuple[str, Dataset]) -> Failures | None:
    """Work on an item; {image id: reason} if its image cannot be decoded."""
    try:
        function(item)
    except ImageError as error:
        return {item[0]: str(error)}
    return None
