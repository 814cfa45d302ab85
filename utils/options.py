"""Every flag of the scripts, declared once: its type, unit, meaning, default and group."""
import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils import distributed, log
from utils.datasets import DATASETS
from utils.errors import UserError
from utils.export import EXPORTS
from utils.images import allow_large_images
from utils.log import LEVELS, say
from utils.recipes import METHODS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Flag:
    """type: converter, or bool for --x/--no-x.  default: what holds if neither the user nor an upstream record says.
    rule: in words, how the default follows from the machine, if it does."""
    type: Callable[[str], object]
    help: str
    default: object = None
    choices: tuple[str, ...] | None = None
    nargs: int | str | None = None
    metavar: str | tuple[str, ...] | None = None
    rule: str | None = None


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], float]:
    """A converter of text to an `int` or `float` from `low` (excluded if `above`) to `high`; its `bounds` say so."""
    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {convert.bounds}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"
    convert.bounds = (f"above {low}" if above else f"at least {low}") + (
        f" and at most {high}" if high != float("inf") else "")
    return convert


def point(text: str) -> tuple[int, int]:
    """X,Y -> (x, y) in pixels, from the image's upper left corner."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is no pixel; pass two whole numbers such as 120,80")
    return tuple(map(int, parts))


count, natural, side = number(int, 1), number(int, 0), number(int, 32)
positive, ratio, weight = number(float, 0, above=True), number(float, 0, 1), number(float, 0)
# Of a CRF's kernels. Narrower ones would overflow pydensecrf's 16-bit lattice coordinates on large images.
width, strength = number(float, 0.5, 10_000), number(float, 0, 10_000)

FLAGS = {
    "dataset": Flag(str, "layout of the data", "pet"),
    "data_root": Flag(str, "folder of the dataset"),
    "split": Flag(str, "split to work on; pet: trainval, test; voc: trainaug, train, val, test, ...; coco: train, val, "
                       "val_labelled; folder: all or the name of a list <split>.txt"),
    "difficult": Flag(bool, "voc: objects marked difficult count as image labels, as in published code", True),
    "ids": Flag(str, "text file of image ids, one a line: work on these images of the split only", metavar="FILE"),
    "limit": Flag(count, "only the first N images", metavar="N"),
    "images": Flag(str, "an image or a folder of images, instead of a dataset's split (default: none)", metavar="PATH"),
    "download": Flag(bool, "fetch Oxford-IIIT Pet (0.8 GB) if it is not there", False),
    "backbone": Flag(str, "backbone of the network: resnet18, resnet34, resnet50, resnet101, resnet38, "
                         "efficientnet_lite0, efficientnet_lite2, or any model of timm that gives feature maps",
                     "resnet50"),
    "width": Flag(positive, "channel multiplier; only of resnet38", 1.0),
    "output_stride": Flag(int, "pixels per cell of the backbone's last feature map", 16, choices=(8, 16)),
    "dilated": Flag(bool, "dilate a ResNet's layers whose stride was taken out (IRN does not)", True),
    "pretrained": Flag(str, "initial weights of the backbone: imagenet, none, or a file (python -m models.weights FILE "
                            "says which part it would fill)"),
    "bn": Flag(str, "batch normalisation: frozen, train, or auto = frozen where its statistics were loaded, else train",
               "auto", choices=("auto", "frozen", "train")),
    "freeze": Flag(natural, "how many of the backbone's first blocks stay as loaded (block 1 is the stem; 0 with "
                            "random weights)", 2),
    "method": Flag(str, "seed method of stage 1: cam = class activation maps; common = a discriminant of what a "
                        "class's images share says where the object is, the CAM which class; avc = affinity vector "
                        "consistency, CAMs refined along affinities that two views agree on; mixture = a mixture of "
                        "Gaussians of frozen features, which image labels constrain; left out: mixture with "
                        "pretrained weights, cam with random ones"),
    "head_only": Flag(bool, "fit the classifier's head to stored features of whole images, in one pass, instead of "
                            "training (default: with --method mixture)"),
    "cutmix": Flag(ratio, "probability that a step pastes rectangles between its images and mixes their labels "
                           "(CutMix)", 0.0),
    "batch_size": Flag(count, "images per step, of all processes together", 16),
    "accumulate": Flag(count, "compute each step in N micro-batches of batch_size / N images, one after the other: "
                              "less memory", 1, metavar="N"),
    "clip_grad": Flag(weight, "largest norm of the gradient; a longer one is scaled down to it (0: never)", 0.0),
    "compile": Flag(bool, "compile the backbone with torch.compile: minutes at the start, faster steps on GPUs", False),
    "save_every": Flag(weight, "minutes after which the state is saved within an epoch too (0: never)", 10.0),
    "epochs": Flag(count, "passes over the training images"),
    "lr": Flag(positive, "initial learning rate of the backbone; heads get --head_lr times as much", 0.01),
    "head_lr": Flag(positive, "learning-rate multiplier of newly initialised heads", 10.0),
    "momentum": Flag(ratio, "SGD momentum", 0.9),
    "weight_decay": Flag(weight, "SGD weight decay, of weights only (not of biases and batch normalisation)", 1e-4),
    "crop_size": Flag(side, "side of the square training crop in pixels, rounded to 16k + 1", 448),
    "long_side": Flag(side, "range from which a training image's long side is drawn, in pixels; left out: 5/8 to 5/4 "
                            "of the crop", nargs=2, metavar=("MIN", "MAX")),
    "max_size": Flag(side, "images with a longer side, in pixels, are scaled down to it for the networks and the CRF",
                     1024),
    "val_fraction": Flag(number(float, 0, 0.5), "fraction of the training images held out to choose model_best "
                                                 "(by labels or pseudo-labels, never by ground-truth masks)", 0.1),
    "scales": Flag(number(float, 0, 8, above=True), "image scales whose maps are averaged", (0.5, 1.0, 1.5), nargs="+"),
    "flip": Flag(bool, "average with the horizontally flipped image", True),
    "alternate": Flag(bool, "with --flip and several scales: the first scale as it is, the second flipped, and so on, "
                            "instead of each scale both ways; takes half the time", False),
    "merge": Flag(str, "how the scales are merged: mean of the logits, or max of the softmax", "mean",
                  choices=("mean", "max")),
    "labels": Flag(str, "image labels that gate the maps: gt (known) or predicted by the classifier",
                   choices=("gt", "predicted")),
    "cam_dir": Flag(str, "folder of CAMs", "data/cams"),
    "head": Flag(str, "DeepLab's head: of SEAM's segmentation code, which AVC uses, or of MCTformer's", "seamv1",
                 choices=("seamv1", "mctformer")),
    "mask_dir": Flag(str, "folder of masks (PNG)"),
    "model_path": Flag(str, "checkpoint to start from, ours or a published one"),
    "output_dir": Flag(str, "folder for the results"),
    "overwrite": Flag(bool, "make finished files again if they were made with other settings, images or labels", False),
    "save_overlays": Flag(bool, "also write the masks laid over the images, with the names of their classes", False),
    "report": Flag(bool, "also write report.html: the scores and a gallery of the split, in one file that a browser "
                         "opens from disk", True),
    "save_walk": Flag(bool, "also write the propagation of up to 8 images as animated GIFs to <output_dir>/walks",
                      False),
    "show_affinity": Flag(point, "also write heat maps of the affinity of pixel X,Y with all others to "
                                 "<output_dir>/affinity: of the CAM network and of AffinityNet, for --images or the "
                                 "first 8 images of the split (default: none)", metavar="X,Y"),
    "submission": Flag(str, "also pack the masks of --dataset voc --split test (or val) for the VOC evaluation server "
                            "(default: none)", metavar="FILE.tgz"),
    "export": Flag(str, "also write the masks to <output_dir>/export/NAME in the formats that annotation tools import: "
                        f"{', '.join(EXPORTS)} (default: none)", nargs="+", metavar="NAME"),
    "crf": Flag(bool, "refine with a dense CRF", True),
    "crf_preset": Flag(str, "parameters of the dense CRF", "psa", choices=("psa", "irn", "seamv1", "mctformer", "avc")),
    "crf_gaussian_sxy": Flag(width, "width of the CRF's smoothness kernel in pixels; left out: the preset's"),
    "crf_gaussian_compat": Flag(strength, "weight of the CRF's smoothness kernel; left out: the preset's"),
    "crf_bilateral_sxy": Flag(width, "width of the CRF's appearance kernel in pixels; left out: the preset's"),
    "crf_bilateral_srgb": Flag(width, "width of the CRF's appearance kernel in grey levels (0..255); left out: the "
                                      "preset's"),
    "crf_bilateral_compat": Flag(strength, "weight of the CRF's appearance kernel; left out: the preset's"),
    "crf_iterations": Flag(number(int, 0, 1000), "mean-field steps of the CRF; left out: the preset's"),
    "crf_backend": Flag(str, "what computes the CRF: torch on --device (auto), or pydensecrf, the authors' C++ "
                             "code, on the CPU", "auto", choices=("auto", "pydensecrf", "torch")),
    "alpha_low": Flag(positive, "background exponent for confident foreground", 4.0),
    "alpha_high": Flag(positive, "background exponent for confident background", 24.0),
    "bg_alpha": Flag(positive, "exponent of the background score (1 - max cam)^alpha", 6.0),
    "bg_threshold": Flag(ratio, "foreground probability from which on a pixel counts as foreground", 0.5),
    "beta": Flag(positive, "element-wise power of the affinities in the random walk", 8.0),
    "walk_steps": Flag(natural, "power t of the transition matrix", 256),
    "walk_eps": Flag(weight, "bound of the walk's error relative to the scores: t steps become a few dozen; 0 takes "
                             "them one by one", 1e-3),
    "radius": Flag(number(int, 2), "pixel pairs closer than this, in stride-8 cells, have an affinity", 5),
    "device": Flag(str, "cpu, cuda or cuda:N; auto takes a GPU if there is one", "auto"),
    "precision": Flag(str, "arithmetic of the networks; auto = bf16 on a GPU or CPU that has units for it (CPUs: AMX, "
                           "AVX512-BF16), else fp32; bf16 is autocast, scores and losses stay float32", "auto",
                      choices=("auto", "fp32", "bf16")),
    "workers": Flag(natural, "processes that read images; processes, with torch threads, that run the CRF; for "
                    "each process of torchrun",
                    min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))),
                    rule="one for each CPU core, at most 8"),
    "on_bad_image": Flag(str, "an image that cannot be decoded: error ends the run; skip leaves it out, and the record "
                              "names it under failures", "error", choices=("error", "skip")),
    "large_images": Flag(bool, "also read images of more than 178 megapixels, which take gigabytes of memory", False),
    "seed": Flag(number(int, 0, 2 ** 32 - 1), "seed of everything random", 0),
    "resume": Flag(bool, "go on from what the output folder holds of the same run", False),
    "dry_run": Flag(bool, "check everything, print the options and stop", False),
    "log_level": Flag(str, "what is printed besides results and errors: error = nothing; warning = warnings; info = "
                           "also the options, what is used again, and progress; debug = also where an error arose",
                      "info", choices=LEVELS),
    "tensorboard": Flag(bool, "also write TensorBoard events (needs the tensorboard package)", False),
}

DATA = ("dataset", "data_root", "split", "ids", "limit", "difficult")
CHOICE = ("split", "ids", "limit")  # which images of a dataset
NO_CHOICE = "they choose images of a dataset, and --images names images by itself; leave one of them out"
OPENING = (*DATA, "download", "large_images")  # all that decides which split is opened
NETWORK = ("backbone", "width", "output_stride", "dilated")
BACKBONE = (*NETWORK, "pretrained")
TRAINING = ("batch_size", "epochs", "lr", "head_lr", "momentum", "weight_decay", "crop_size", "max_size",
            "val_fraction", "bn", "freeze", "accumulate", "clip_grad", "compile", "save_every", "resume", "tensorboard")
MAPS = ("scales", "flip", "alternate", "labels")
CRF = ("crf_preset", "crf_gaussian_sxy", "crf_gaussian_compat", "crf_bilateral_sxy", "crf_bilateral_srgb",
       "crf_bilateral_compat", "crf_iterations", "crf_backend")
WALK = ("bg_alpha", "bg_threshold", "beta", "walk_steps", "walk_eps", "radius")
MACHINE = ("device", "precision", "workers", "on_bad_image", "large_images", "seed", "dry_run", "log_level")
# Options that may differ between the parts of one run: they do not change what is computed from good images.
RESUME_FREE = ("resume", "workers", "device", "dry_run", "tensorboard", "download", "output_dir", "data_root",
               "cam_dir", "mask_dir", "save_every", "on_bad_image", "overwrite", "large_images", "log_level")
GROUPS = {"data": (*DATA, "images", "download"), "network": (*BACKBONE, "head", "model_path"),
          "training": (*TRAINING, "long_side", "cutmix", "head_only"), "maps": ("method", *MAPS, "merge"),
          "affinity labels": ("alpha_low", "alpha_high"), "random walk": WALK, "dense CRF": ("crf", *CRF),
          "folders": ("cam_dir", "mask_dir", "output_dir", "overwrite"),
          "extras": ("save_overlays", "report", "save_walk", "show_affinity", "submission", "export"),
          "machine": MACHINE}


class Parser(argparse.ArgumentParser):
    """The flags of one step, in the groups of GROUPS.  Errors are one line with exit status 2.

    names: of FLAGS.  step: whose defaults by dataset hold ("stage1", "stage2", "masks", "deeplab"), taken by `resolve`.
    heads: {DeepLab's head: {flag: default}}, taken by `settle_head`.  methods: {seed method: its own flags}.  What a
    method changes of other flags' defaults is in `utils.recipes.METHODS`.
    defaults: override those of FLAGS for this step.
    """

    def __init__(self, description: str, names: Sequence[str], step: str,
                 heads: Mapping[str, Mapping[str, object]] | None = None,
                 methods: Mapping[str, Mapping[str, Flag]] | None = None, **defaults: object):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.flags, self.heads = {}, heads or {}
        self.datasets = {name: {"data_root": layout.data_root, **{flag: value for flag, value in
                                layout.defaults.get(step, {}).items() if flag in names}}
                         for name, layout in DATASETS.items()}
        self.methods = {method: {flag: value for flag, value in steps.get(step, {}).items() if flag in names}
                        for method, steps in METHODS.items()}
        open_flags = {name for recipe in self.heads.values() for name in recipe}
        for title, members in GROUPS.items():
            group = self.add_argument_group(title)
            for name in members:
                if name in names:
                    default = None if name in open_flags else defaults.get(name, FLAGS[name].default)
                    self._declare(group, name, FLAGS[name], default)
        for method, own in (methods or {}).items():
            group = self.add_argument_group(f"--method {method}")
            for name, flag in own.items():
                self._declare(group, name, flag, flag.default)
        methods = {method: recipe for method, recipe in self.methods.items() if recipe}
        self.epilog = "\n".join(_recipe_lines("dataset", self.datasets) + _recipe_lines("seed method", methods)
                                + _recipe_lines("DeepLab's head", self.heads))

    def _declare(self, group: argparse._ArgumentGroup, name: str, flag: Flag, default: object) -> None:
        self.flags[name] = default
        text = flag.help
        if default is not None:
            text += f" (default: {typed(default)}{f', {flag.rule}' if flag.rule else ''})"
        elif "(default: " not in text:
            text += " (default: inherited or chosen by the step)"
        registries = {"dataset": DATASETS, "export": EXPORTS}
        keywords = {"dest": name, "default": None, "help": text.replace("%", "%%")}
        if flag.type is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            choices = tuple(registries[name]) if name in registries else flag.choices
            keywords.update(type=flag.type, choices=choices, nargs=flag.nargs, metavar=flag.metavar)
        group.add_argument(f"--{name}", **keywords)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
                   ) -> argparse.Namespace:
        """As usual; from then on, this process prints what --log_level says."""
        found = super().parse_args(args, namespace)
        log.set_level(getattr(found, "log_level", None) or "info")
        return found

    def settle_head(self, head: str) -> None:
        """Take the defaults of one of DeepLab's heads, once it is known."""
        self.flags.update(self.heads[head])

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def typed(default: object) -> str:
    """A default as a user would type it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)


def _recipe_lines(what: str, recipes: Mapping[str, Mapping[str, object]]) -> list[str]:
    lines = [f"  {name}: {_listed(recipe)}" for name, recipe in recipes.items()]
    return [f"defaults by {what}:", *lines] if lines else []


def _listed(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}={_told(value)}" for name, value in values.items())


def _told(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def resolve(parser: Parser, args: argparse.Namespace, upstream: Mapping[str, object] | None = None,
            source: str | None = None, inherit: Sequence[str] = (), names: Sequence[str] | None = None
            ) -> argparse.Namespace:
    """Fill every flag left at None: from the upstream step's record if its name is in `inherit`, else by the default
    of the seed method, else of the dataset, else by its own.

    upstream: the record's options, or None.  source: where it comes from, for the printed line.  Of a record of another
    dataset than --dataset, nothing that says where the data is counts. bf16 in a record becomes auto here: this machine
    may have no units for it.  names: only these flags (default: all).
    Returns args; what came from a record or a recipe is printed, so that nothing is settled in silence.
    """
    method = (upstream or {}).get("method") or getattr(args, "method", None)
    upstream = {name: value for name, value in (upstream or {}).items() if name in inherit and value is not None}
    if upstream.get("precision") == "bf16":
        upstream["precision"] = "auto"
    if args.dataset not in (None, upstream.get("dataset")):
        upstream = {name: value for name, value in upstream.items() if name not in DATA}
    dataset = args.dataset or upstream.get("dataset") or parser.flags["dataset"]
    if dataset not in DATASETS:
        raise UserError(f"{source} was made from --dataset {dataset}, which is not registered here; pass --dataset "
                        f"{', '.join(DATASETS)}")
    open_flags = [name for name in names or parser.flags if getattr(args, name) is None]
    inherited = {name: upstream[name] for name in open_flags if name in upstream}
    by_method = parser.methods.get(method, {})
    by_dataset = {name: value for name, value in parser.datasets[dataset].items() if name not in by_method}
    for name in open_flags:
        value = {**parser.flags, **by_dataset, **by_method, **inherited}[name]
        setattr(args, name, list(value) if isinstance(value, tuple) else value)
    if getattr(args, "large_images", False):
        allow_large_images()
    if inherited:
        say(f"Inherited {_listed(inherited)} from {source}")
    for source, recipe in ((f"--dataset {dataset}", by_dataset), (f"--method {method}", by_method)):
        taken = {name: value for name, value in recipe.items() if name in open_flags and name not in inherited}
        if taken:
            say(f"Defaults of {source}: {_listed(taken)}")
    return args


def refuse_unused(parser: Parser, args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """A parser's error if flags were typed that have no effect here; to be called before `resolve` fills them.

    reason: why they have none, and the remedy.
    """
    typed = [f"--{'no-' if value is False else ''}{name}" for name in names
             if (value := getattr(args, name, None)) is not None]
    if typed:
        parser.error(f"{' and '.join(typed)}: {reason}")


def default_method(pretrained: str) -> str:
    """The seed method of stage 1 where --method is left out: the mixture needs features of pretrained weights."""
    return "cam" if pretrained == "none" else "mixture"


def print_options(step: str, options: Mapping[str, object]) -> None:
    """Print the resolved options in one block."""
    values = {name: value for name, value in sorted(options.items()) if value is not None}
    say(f"{step}\n  " + "  ".join(f"{name}={_told(value)}" for name, value in values.items()))


def pick_device(name: str) -> "torch.device":
    """torch.device of --device; UserError where it is not to be had.  Several processes get a GPU each."""
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world() > 1 and torch.cuda.is_available():
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(f"process {distributed.local_rank()} of this machine has no GPU of its own among "
                            f"{torch.cuda.device_count()}; start as many with --nproc_per_node, or pass --device cpu")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if str(device) != name or device.type not in ("cpu", "cuda"):  # torch takes cuda:256 for cuda:0
        raise UserError(f"no device {name!r} here; pass --device cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise UserError(f"--device {name} but PyTorch sees {seen}; pass --device cpu, or one that there is")
    return device
