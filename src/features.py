"""Feature maps of a split's images by a frozen backbone, and what one pass over them keeps for the next."""
import copy
import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch

from models.backbone import Network, for_inference
from src.seeds.cam import Reader
from utils.config import Machine
from utils.datasets.base import Dataset
from utils.loader import Views, WholeImages, whole_image_loader
from utils.log import progress

MEMORY = 2**30  # bytes of features that are kept

Maps = dict[str, torch.Tensor]


class Kept:
    """Feature maps of chosen images in memory, as many as fit: a second pass needs no network for them.

    names: of the maps that are kept.  wanted: positions, in the split, of the images that a later pass reads.
    """

    def __init__(self, names: Iterable[str] = (), wanted: Collection[int] = ()):
        self.names, self.wanted, self.room, self.maps = tuple(names), set(wanted), MEMORY, {}

    def offer(self, position: int, maps: Maps) -> None:
        """Keep the maps of an image if they are wanted and there is room."""
        if position not in self.wanted:
            return
        size = sum(maps[name].nbytes for name in self.names)
        if size > self.room:
            self.wanted = set()  # no later image either: those that are read anew are then read in one go
            return
        self.room -= size
        self.maps[position] = {name: maps[name].cpu() for name in self.names}


def feature_reader(classifier: Network, dataset: Dataset, max_size: int, machine: Machine, what: str,
                   kept: Kept | None = None) -> Reader:
    """A `Reader` of a split: each image whole, at one scale.  what: for the progress line.

    kept: takes maps of the images that the network sees, and gives those that it has.
    """
    classifier, kept = for_inference(copy.deepcopy(classifier.eval()), machine.device), kept or Kept()
    backbone = classifier.backbone

    def seen(positions: Sequence[int]) -> Iterator[tuple[int, Maps]]:
        if not positions:
            return
        views = Views((1.0,), max_size, backbone.stride, backbone.normalise)
        images = WholeImages(dataset.subset(positions), views, skip_bad=machine.skip_bad)
        for item in progress(whole_image_loader(images, machine), what, len(positions)):
            view = item["views"][0][None].to(machine.device, memory_format=torch.channels_last)
            with machine.autocast():
                maps = backbone(view)
            kept.offer(positions[item["index"]], maps)
            yield positions[item["index"]], maps

    def known(positions: Sequence[int]) -> Iterator[tuple[int, Maps]]:
        for position in positions:
            yield position, {name: one.to(machine.device) for name, one in kept.maps[position].items()}

    @torch.no_grad()
    def read(positions: Sequence[int]) -> Iterator[tuple[Maps, torch.Tensor, np.ndarray]]:
        streams = [known([i for i in positions if i in kept.maps]), seen([i for i in positions if i not in kept.maps])]
        for position, maps in heapq.merge(*streams, key=lambda pair: pair[0]):
            with machine.autocast():
                cam = classifier.cam(maps)
            yield maps, cam, np.flatnonzero(dataset.labels[position])
    return read
