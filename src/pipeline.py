"""Photo -> CAM -> walked scores -> mask, in memory: arrays and PIL images in, arrays out, nothing written or printed.

    pipeline = Pipeline.load("output/stage2_resnet50/model_best.pth.tar")
    mask = pipeline.mask(PIL.Image.open("photo.jpg"))          # uint8 (H, W): 0 background, class k as k + 1
"""
from __future__ import annotations

import contextlib
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Self

import numpy as np
import torch
from PIL import Image

from models.affinitynet import affinity_stencil
from models.backbone import for_inference
from models.weights import class_names, load_model, unpack
from src.masks import decide
from src.seeds import attach, check_fitted
from utils.config import Machine, MapConfig, WalkConfig
from utils.crf import CRF, PRESETS, settle_backend
from utils.datasets import DATASETS
from utils.errors import UserError
from utils.grids import Size, capped_size, grid_size, resize_maps, resize_tensor
from utils.images import to_rgb
from utils.loader import Views
from utils.maps import with_background
from utils.options import FLAGS, pick_device
from utils.precision import settle_precision
from utils.random_walk import half_disc, random_walks
from utils.recipes import DEEPLAB_TEST, step_defaults

CAM_STRIDE = 4    # pixels of a cell of a stored CAM
WALK_STRIDE = 8   # of AffinityNet's features, along which scores walk
PIXELS = {"cpu": 1 << 20, "cuda": 1 << 24}  # in one forward pass, which bounds its memory; one view at least
MIN_PROBABILITY = 0.05  # classes that nowhere reach it are left out of DeepLab's maps; the likeliest is always kept


@dataclass(frozen=True)
class Cam:
    """keys: (K,) zero-based classes, ascending.  maps: (K, h, w) float32 in [0, 1].  size: (H, W) of the image."""
    keys: np.ndarray
    maps: np.ndarray
    size: Size


class _Pipeline:
    """What both pipelines share: networks built on first use, and the mask at the end."""
    steps: tuple[str, ...] = ()      # whose checkpoints it takes
    options: tuple[str, ...] = ()    # that may be changed, by the names of their flags
    inherited: tuple[str, ...] = ()  # of them, those that hold as in the checkpoint's run

    def __init__(self, payload: dict, maps: MapConfig, machine: Machine, crf_preset: str):
        self.records, self.classes, self.maps, self.machine = payload["networks"], payload["classes"], maps, machine
        self.crf_preset = crf_preset
        self._lock, self._threads = threading.Lock(), torch.get_num_threads()
        for record in self.records.values():
            check_fitted(record)

    @classmethod
    def load(cls, path: str, device: str = "auto", precision: str = "auto", **changes: object) -> Self:
        """From a checkpoint file, with the options that its step of masks would take by default.

        device: "auto", "cpu", "cuda" or "cuda:N".  precision: "auto" (bf16 where the device has units for it),
        "fp32" or "bf16".  changes: options that are to differ:
        scales, flip, alternate, max_size, crf_preset; of `Pipeline` bg_alpha, beta, walk_steps, walk_eps, radius; of
        `DeepLabPipeline` merge.
        Raises UserError for a missing, damaged or foreign file, and for an option that its flag would refuse.
        """
        unknown = [name for name in changes if name not in cls.options]
        if unknown:
            raise UserError(f"no option {unknown[0]!r} here; there are {', '.join(cls.options)}")
        changes = {name: _checked(name, value) for name, value in changes.items()}
        precision = _checked("precision", precision)
        payload = load_model(path, cls.steps)
        payload = {**payload, "classes": class_names(payload)}
        made_with = payload["options"]
        layout = DATASETS.get(made_with.get("dataset"))
        options = {**{name: FLAGS[name].default for name in cls.options},
                   **cls._defaults(payload, layout.defaults if layout else {}),
                   **{name: made_with[name] for name in cls.inherited if made_with.get(name) is not None}, **changes}
        place = pick_device(device)
        return cls._of(payload, options, Machine(place, settle_precision(precision, place)))

    @contextlib.contextmanager
    def _turn(self, images: torch.Tensor) -> Iterator[None]:
        """A network's pass over images, in autocast.  Of several threads that work on images, one at a time looks at a
        large view, which takes gigabytes; with all of torch's threads.
        """
        if images[:, 0].numel() <= PIXELS[self.machine.device.type]:
            with self.machine.autocast():
                yield
            return
        with self._lock, self.machine.autocast():
            own = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                yield
            finally:
                torch.set_num_threads(own)

    def _network(self, kind: str) -> torch.nn.Module:
        if kind not in self.records:
            raise UserError(f"the checkpoint has no {kind} network, but {', '.join(self.records)}; pass one of stage 2")
        return for_inference(unpack(self.records[kind], attach), self.machine.device)

    def keys_of(self, labels: Iterable[int | str]) -> np.ndarray:
        """Zero-based classes, ascending, of class names or numbers; UserError for one that the checkpoint lacks."""
        labels = labels.tolist() if isinstance(labels, (np.ndarray, torch.Tensor)) else labels
        if not isinstance(labels, Iterable):
            raise UserError(f"labels is {labels!r}; pass a list of names or zero-based numbers, such as [{labels!r}]")
        labels = [labels] if isinstance(labels, str) else list(labels)
        if any(isinstance(label, (bool, np.bool_)) for label in labels):  # which would count as classes 0 and 1
            raise UserError("labels are True and False; pass the numbers or names of the classes that the image shows, "
                            "such as numpy.flatnonzero(labels)")
        unknown = [label for label in labels if not self._knows(label)]
        if unknown:
            raise UserError(f"no class {unknown[0]!r} here; there are {', '.join(self.classes)}")
        keys = [self.classes.index(label) if isinstance(label, str) else label for label in labels]
        return np.unique(keys).astype(int)

    def _knows(self, label: object) -> bool:
        return label in self.classes if isinstance(label, str) else \
            isinstance(label, Real) and label in range(len(self.classes))

    def mask(self, image: Image.Image | np.ndarray, labels: Iterable[int | str] | None = None,
             crf: str | CRF | None = "default", threshold: float = 0.5) -> np.ndarray:
        """The mask of an image at its size, uint8 (H, W): 0 background, class k as k + 1.

        image: PIL image, turned by its EXIF orientation as a viewer displays it, and the mask with it; or uint8
        (H, W, 3) RGB, as it is.  labels: the classes it shows, names or zero-based; None: predicted.
        crf: a preset of `utils.crf.PRESETS`, "default" for that of the checkpoint's dataset or head, a `CRF`, or None
        to do without.  threshold: foreground probability from which on a pixel counts as foreground.
        """
        image = to_rgb(image)
        threshold = _checked("bg_threshold", threshold, "threshold")
        if isinstance(crf, str):
            crf = _checked("crf_preset", self.crf_preset if crf == "default" else crf)
            crf = CRF(PRESETS[crf], settle_backend("auto"), str(self.machine.device))
        elif crf is not None and not isinstance(crf, CRF):
            raise UserError(f"crf is {crf!r}; pass one of {', '.join(PRESETS)}, a CRF, or None to do without")
        keys, probabilities = self.scores(image, labels)
        return decide(image, keys, probabilities, crf, self.maps.max_size, threshold)


class Pipeline(_Pipeline):
    """A classifier and its seed, and an AffinityNet if there is one.

    payload: a checkpoint of stage 1 or 2 as `models.weights.load_model` gives it, with its classes.
    """
    steps = ("stage2", "stage1")
    options = ("scales", "flip", "alternate", "max_size", "crf_preset", "bg_alpha", "beta", "walk_steps", "walk_eps",
               "radius")
    inherited = ("scales", "flip", "alternate", "max_size", "radius")

    def __init__(self, payload: dict, maps: MapConfig, walk: WalkConfig, machine: Machine,
                 crf_preset: str = "mctformer"):
        super().__init__(payload, maps, machine, crf_preset)
        self.walk_config, self.offsets = walk, half_disc(walk.radius)

    @classmethod
    def _defaults(cls, payload: dict, by_step: dict) -> dict:
        return {"crf_preset": "mctformer", **step_defaults(by_step, "masks", payload["options"].get("method"))}

    @classmethod
    def _of(cls, payload: dict, options: dict, machine: Machine) -> Self:
        return cls(payload, MapConfig.of(options), WalkConfig.of(options), machine, options["crf_preset"])

    @cached_property
    def classifier(self) -> torch.nn.Module:
        """`models.classifier.Classifier` with its seed, ready for inference."""
        return self._network("classifier")

    @cached_property
    def affinity_net(self) -> torch.nn.Module:
        """`models.affinitynet.AffinityNet`, ready for inference."""
        return self._network("affinity")

    def cam_views(self) -> Views:
        """What the classifier sees of an image."""
        backbone = self.classifier.backbone
        return Views(self.maps.scales, self.maps.max_size, backbone.stride, backbone.normalise)

    def walk_views(self) -> Views:
        """What AffinityNet sees of an image."""
        return Views((1.0,), self.maps.max_size, WALK_STRIDE, self.affinity_net.backbone.normalise)

    def cam(self, image: Image.Image | np.ndarray, labels: Iterable[int | str] | None = None) -> Cam:
        """The class activation maps of an image, by the checkpoint's seed method.  Arguments as of `mask`."""
        image = to_rgb(image)
        keys = None if labels is None else self.keys_of(labels)
        return self.cams([self.cam_views()(image)], [image.shape[:2]], [keys])[0]

    def walk(self, image: Image.Image | np.ndarray, cam: Cam) -> np.ndarray:
        """Propagate the CAM of an image along its affinities: probabilities (K + 1, h, w), background first."""
        return self.walks([self.walk_views()(to_rgb(image))[0]], [cam.maps])[0]

    def scores(self, image: np.ndarray, labels: Iterable[int | str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(keys, probabilities (K + 1, h, w)): walked ones, without AffinityNet those of the CAM itself."""
        cam = self.cam(image, labels)
        return cam.keys, self.scored(image, cam)

    def scored(self, image: Image.Image | np.ndarray, cam: Cam) -> np.ndarray:
        """Probabilities (K + 1, h, w), background first: `walk`, or without AffinityNet those of the CAM itself."""
        if "affinity" in self.records:
            return self.walk(image, cam)
        return with_background(cam.maps, self.walk_config.bg_alpha)

    # --- several images of one size at once, as a split's steps have them -------------------------------------------

    def cams(self, views: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Size], keys: Sequence[np.ndarray | None],
             known: dict[str, torch.Tensor] | None = None) -> list[Cam]:
        """CAMs of images whose views have equal sizes.

        views: of each image, what `cam_views` gives.  sizes: of the images.  keys: of each, its known classes, or None
        for those that the classifier predicts: every class of positive logit, the likeliest at least.
        known: the feature maps of the images at scale 1, unflipped, if an earlier pass has kept them.
        """
        scales = [self._look(list(scale), flips, known if plain else None)
                  for scale, flips, plain in zip(zip(*views), self.maps.flips(), self.maps.plain())]
        logits = (sum(one.mean(dim=1) for one, _ in scales) / len(scales)).cpu().numpy()  # (B, K)
        found = []
        for i, (size, known) in enumerate(zip(sizes, keys)):
            own = predicted(logits[i]) if known is None else known
            capped = capped_size(size, self.maps.max_size)
            grid = tuple(-(-side // CAM_STRIDE) for side in capped)
            maps = self.classifier.seed.merge([tuple(part[i] for part in parts) for _, parts in scales], own, grid)
            found.append(Cam(own, maps, size))
        return found

    @torch.no_grad()
    def _look(self, views: list[torch.Tensor], flips: tuple[bool, ...],
              known: dict[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Logits (B, V, K), and the seed's maps (B, V, C, h, w), float32 on the device, of images of one size.

        views: B normalised images (3, H, W).  flips: for each of V views of an image, whether the network sees it
        flipped; its maps are flipped back.  known: the backbone's maps of these, if it need not run.
        """
        batch, found = _flipped(views, flips), []
        most = max(1, PIXELS[self.machine.device.type] // batch[0, 0].numel()) if known is None else len(batch)
        for images in batch.split(most):
            images = images.to(self.machine.device, memory_format=torch.channels_last)
            with self._turn(images):
                features = self.classifier.backbone(images) if known is None else known
                cam = self.classifier.cam(features)
                maps = self.classifier.seed.maps(self.classifier, features, cam, images)
            found.append((cam.mean(dim=(2, 3)), *maps))
        logits, *maps = (torch.cat(parts).float().unflatten(0, (len(views), -1)) for parts in zip(*found))
        return logits, tuple(_upright(part, flips, dim=1) for part in maps)

    def walks(self, views: Sequence[torch.Tensor], cams: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Propagate CAMs and their background scores: probabilities (K + 1, h, w) of each image, background first.

        views: of one size, what `walk_views` gives.  cams: (K, h', w') of each image.
        """
        stencils, config = self.stencils(views), self.walk_config
        scores = [self.start(cam, stencil) for cam, stencil in zip(cams, stencils)]
        walked = random_walks(scores, stencils, self.offsets, config.beta, config.walk_steps, config.walk_eps)
        return [(maps / maps.sum(dim=0).clamp(min=1e-8)).cpu().numpy() for maps in walked]

    @torch.no_grad()
    def stencils(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Affinity stencils (P, h, w), see `utils.random_walk`, of views of one size."""
        images = torch.stack(list(views)).to(self.machine.device, memory_format=torch.channels_last)
        with self._turn(images):
            features = self.affinity_net(images)
        return [affinity_stencil(one.float(), self.offsets) for one in features]

    def start(self, cam: np.ndarray, stencil: torch.Tensor) -> torch.Tensor:
        """Where a walk starts: the CAM (K, h', w') and its background score on the stencil's grid and device."""
        scores = with_background(resize_maps(cam, stencil.shape[-2:]), self.walk_config.bg_alpha)
        return torch.from_numpy(scores).to(stencil.device)


class DeepLabPipeline(_Pipeline):
    """A DeepLab over several scales and flips.

    payload: a checkpoint of step 5.  merge: "mean", the softmax of the mean of the logits (SEAM's code), or "max", the
    largest softmax of each class (MCTformer's), divided by its sum over classes.
    """
    steps = ("deeplab",)
    options = ("scales", "flip", "alternate", "max_size", "crf_preset", "merge")
    inherited = ("max_size",)

    def __init__(self, payload: dict, maps: MapConfig, merge: str, machine: Machine, crf_preset: str = "seamv1"):
        super().__init__(payload, maps, machine, crf_preset)
        self.merge = merge

    @classmethod
    def _defaults(cls, payload: dict, by_step: dict) -> dict:
        return {**DEEPLAB_TEST[payload["networks"]["deeplab"].get("head", "seamv1")], **by_step.get("deeplab", {})}

    @classmethod
    def _of(cls, payload: dict, options: dict, machine: Machine) -> Self:
        return cls(payload, MapConfig.of(options), options["merge"], machine, options["crf_preset"])

    @cached_property
    def deeplab(self) -> torch.nn.Module:
        """`models.deeplab.DeepLab`, ready for inference."""
        return self._network("deeplab")

    def views(self) -> Views:
        """What the network sees of an image."""
        backbone = self.deeplab.backbone
        return Views(self.maps.scales, self.maps.max_size, backbone.stride, backbone.normalise)

    def scores(self, image: np.ndarray, labels: Iterable[int | str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(keys, probabilities (K + 1, h, w)) on the stride-8 grid, background first."""
        keys = None if labels is None else self.keys_of(labels)
        return self.probabilities(self.views()(image), image.shape[:2], keys)

    def probabilities(self, views: Sequence[torch.Tensor], size: Size, keys: np.ndarray | None
                      ) -> tuple[np.ndarray, np.ndarray]:
        """(keys, probabilities (K + 1, h, w)) of an image.  views: see `views`.  keys: its known classes, or None for
        those that somewhere reach MIN_PROBABILITY, the likeliest at least."""
        found = self.merged(views, grid_size(capped_size(size, self.maps.max_size), 8))
        keys = predicted(found[1:].max(axis=(1, 2)) - MIN_PROBABILITY) if keys is None else keys
        kept = found[np.concatenate([[0], keys + 1])]
        return keys, kept / np.maximum(kept.sum(axis=0), 1e-8)

    @torch.no_grad()
    def merged(self, views: Sequence[torch.Tensor], grid: Size) -> np.ndarray:
        """Probabilities of all classes (C, *grid) float32 from all scales and flips."""
        maps = []
        for view, flips in zip(views, self.maps.flips()):
            batch = _flipped([view], flips).to(self.machine.device, memory_format=torch.channels_last)
            with self._turn(batch):
                logits = self.deeplab(batch)
            maps.append(resize_tensor(_upright(logits.float(), flips, dim=0), grid))
        logits = torch.cat(maps)  # (scales and flips, C, *grid)
        if self.merge == "mean":
            return logits.mean(dim=0).softmax(dim=0).cpu().numpy()
        largest = logits.softmax(dim=1).amax(dim=0)
        return (largest / largest.sum(dim=0)).cpu().numpy()


def _checked(name: str, value: object, called: str | None = None) -> object:
    """The value of an option as its flag would take it; UserError if that would refuse it.  called: its name here."""
    flag, called = FLAGS[name], called or name
    if flag.choices:
        if value not in flag.choices:
            raise UserError(f"{called} is {value!r}; pass one of {', '.join(map(str, flag.choices))}")
        return value
    if flag.type is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{called} is {value!r}; pass True or False")
        return bool(value)
    if flag.nargs is None:
        return _number(called, value, value, flag.type)
    if not isinstance(value, Iterable) or isinstance(value, str) or not (several := tuple(value)):
        raise UserError(f"{called} is {value!r}; pass a list of numbers")
    return tuple(_number(called, value, one, flag.type) for one in several)


def _number(called: str, value: object, one: object, convert: Callable[[str], float]) -> float:
    """A number of the value of an option by its flag's converter, see `utils.options.number`."""
    try:
        if isinstance(one, Real) and not isinstance(one, bool):
            return convert(str(one))
    except (ValueError, ArgumentTypeError):
        pass
    raise UserError(f"{called} is {value!r}; pass a {convert.__name__} {convert.bounds}")


def predicted(evidence: np.ndarray) -> np.ndarray:
    """The zero-based classes whose evidence (K,) is above 0, the one of most evidence at least."""
    keys = np.flatnonzero(evidence > 0)
    return keys if len(keys) else np.array([int(evidence.argmax())])


def _flipped(views: list[torch.Tensor], flips: tuple[bool, ...]) -> torch.Tensor:
    """A batch of views (3, H, W), each flipped horizontally or not, as `flips` says, and as often."""
    return torch.stack([view.flip(-1) if flip else view for view in views for flip in flips])


def _upright(maps: torch.Tensor, flips: tuple[bool, ...], dim: int) -> torch.Tensor:
    """Maps (..., w) of views that lie along a dimension, those of flipped views flipped back."""
    if not any(flips):
        return maps
    return torch.stack([one.flip(-1) if flip else one for one, flip in zip(maps.unbind(dim), flips)], dim)
