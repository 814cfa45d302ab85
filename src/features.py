"""Feature maps of a split's images by a frozen backbone, and what one pass over them keeps for later ones."""
import copy
import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch

from models.backbone import Network, for_inference
from src.seeds.cam import Reader
from src.split_map import at_once, network_threads
from utils.config import Machine
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.loader import Views, WholeImages, whole_image_loader
from utils.log import progress

MEMORY = 2**30  # bytes of features that are kept

Maps = dict[str, torch.Tensor]


class Kept:
    """Feature maps of chosen images in memory, as many as fit: a later pass needs no network for them.

    names: of the maps that are kept.  wanted: ids of the images that a later pass reads.
    """

    def __init__(self, names: Iterable[str] = (), wanted: Collection[str] = ()):
        self.names, self.wanted = tuple(dict.fromkeys(names)), set(wanted)
        self.room, self.maps = MEMORY, {}

    def offer(self, image_id: str, maps: Maps) -> None:
        """Keep the maps of an image if they are wanted and there is room."""
        if image_id not in self.wanted:
            return
        size = sum(maps[name].nbytes for name in self.names)
        if size > self.room:
            self.wanted = set()  # no later image either: those that are read anew are then read in one go
            return
        self.room -= size
        self.maps[image_id] = {name: maps[name].cpu() for name in self.names}

    def take(self, image_ids: Sequence[str], device: torch.device) -> Maps | None:
        """Give up the maps (B, D, h, w) of images of one size, for their last use; None unless all are there."""
        taken = [self.maps.pop(image_id) for image_id in image_ids if image_id in self.maps]
        if len(taken) < len(image_ids):
            return None
        return {name: torch.cat([maps[name] for maps in taken]).to(device) for name in self.names}


class Features:
    """Feature maps of a split's images, each whole and at one scale, by the frozen backbone of a classifier.

    kept: takes maps of the images that the network sees, and gives those that it has.
    largest: pixels of the long side that a photo is decoded for, as in the pass that takes over what is kept: a large
    photo that is decoded at half its size has other pixels.
    """

    def __init__(self, classifier: Network, dataset: Dataset, max_size: int, machine: Machine,
                 kept: Kept | None = None, largest: float | None = None):
        self.classifier = for_inference(copy.deepcopy(classifier.eval()), machine.device)
        self.dataset, self.machine, self.kept = dataset, machine, kept or Kept()
        backbone = self.classifier.backbone
        self.views = Views((1.0,), max_size, backbone.stride, backbone.normalise, largest)

    @torch.no_grad()
    def maps(self, positions: Sequence[int], what: str) -> Iterator[tuple[int, Maps]]:
        """(position in the split, maps (1, D, h, w)) of the images at some ascending positions.

        what: for the progress line.
        """
        ids = self.dataset.ids
        known, unknown = ([i for i in positions if (ids[i] in self.kept.maps) == there] for there in (True, False))
        yield from heapq.merge(self._known(known), self._seen(unknown, what), key=lambda pair: pair[0])

    def reader(self, what: str) -> Reader:
        """A `Reader` of the split.  what: for the progress line."""
        @torch.no_grad()
        def read(positions: Sequence[int]) -> Iterator[tuple[Maps, torch.Tensor, np.ndarray]]:
            position = None
            for position, maps in self.maps(positions, what):
                with self.machine.autocast():
                    cam = self.classifier.cam(maps)
                yield maps, cam, np.flatnonzero(self.dataset.labels[position])
            if position is None:
                raise UserError(f"none of the {len(positions)} images of {self.dataset.root} that the seed is to be "
                                "fitted to can be decoded")
        return read

    def _known(self, positions: Sequence[int]) -> Iterator[tuple[int, Maps]]:
        for position in positions:
            maps = self.kept.maps[self.dataset.ids[position]]
            yield position, {name: one.to(self.machine.device) for name, one in maps.items()}

    def _seen(self, positions: Sequence[int], what: str) -> Iterator[tuple[int, Maps]]:
        if not positions:
            return
        images = WholeImages(self.dataset.subset(positions), self.views, skip_bad=self.machine.skip_bad)
        items = progress(whole_image_loader(images, self.machine), what, len(positions))
        for index, maps in at_once(self._run, items, network_threads(self.classifier.backbone, self.machine.device)):
            self.kept.offer(images.dataset.ids[index], maps)
            yield positions[index], maps

    @torch.no_grad()
    def _run(self, item: dict[str, object]) -> tuple[int, Maps]:
        view = item["views"][0][None].to(self.machine.device, memory_format=torch.channels_last)
        with self.machine.autocast():
            return item["index"], self.classifier.backbone(view)
