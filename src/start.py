"""What every script does between its flags and its work: settle what depends on data and machine, and say so."""
import argparse
import sys
from pathlib import Path

import torch

from models.backbone import build_backbone, find_backbone
from models.weights import check_pretrained
from src.inference import Places
from utils import distributed
from utils.checkpoint import is_checkpoint
from utils.config import Machine
from utils.crf import CRF, PRESETS, CRFParams, settle_backend
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.files import check_folder
from utils.log import commit_told, environment, say, warn
from utils.options import pick_device, print_options
from utils.precision import settle_precision, told
from utils.store import run_dir


def settled_pretrained(pretrained: str | None, backbone: str) -> str:
    """--pretrained; left out, ImageNet weights, or random ones, with a warning, where there are none to be fetched."""
    if pretrained is None and find_backbone(backbone).imagenet is None:
        warn(f"WARNING: no ImageNet weights of {backbone} can be fetched, and --pretrained names no file: training "
             "starts from RANDOM weights; results will be much worse")
        return "none"
    return pretrained or "imagenet"


def check_network(args: argparse.Namespace) -> None:
    """UserError, before any work, unless --backbone can be built and --pretrained can be loaded into it."""
    with torch.device("meta"):
        build_backbone(args.backbone, args.output_stride, args.width, args.dilated)
    check_pretrained(args.pretrained, args.backbone, args.width)


def settled_labels(labels: str | None, dataset: Dataset, default: str | None = None) -> str:
    """--labels: known ones on a training split, where pseudo-masks are made; predicted ones elsewhere.

    default: what holds if it was left out, instead.  UserError if the known ones are asked for in vain.
    """
    labels = labels or default or ("gt" if dataset.split in dataset.training_splits else "predicted")
    if labels == "gt" and dataset.labels is None:
        raise UserError(f"split {dataset.split} of {dataset.root} has no image labels; pass --labels predicted")
    return labels


def settled_crf(args: argparse.Namespace, always: bool = False) -> CRF | None:
    """The `CRF` that the flags ask for: the preset, what is given explicitly, the backend; None for --no-crf.

    always: for step 2, which has no such flag.  UserError if the backend cannot be had.
    """
    if not always and not args.crf:
        return None
    given = {name: getattr(args, f"crf_{name}") for name in CRFParams.__dataclass_fields__}
    params = {**vars(PRESETS[args.crf_preset]), **{name: value for name, value in given.items() if value is not None}}
    backend = settle_backend(args.crf_backend)
    return CRF(CRFParams(**params), backend, str(pick_device(args.device)) if backend == "torch" else "cpu")


def machine_of(args: argparse.Namespace) -> Machine:
    """What the work runs on, by the flags; --precision auto is settled, for the record too."""
    device = pick_device(args.device)
    args.precision = settle_precision(args.precision, device)
    return Machine(device, args.precision, args.workers, args.on_bad_image == "skip")


def begin(step: str, args: argparse.Namespace, machine: Machine, dataset: Dataset | None = None) -> bool:
    """Print the header; returns whether to go on: a dry run says that it stops.

    UserError if results cannot lie where they are to be written.
    """
    check_places(args, dataset)
    print_options(step, vars(args))
    facts = environment(machine.device)
    place = facts["device_name"] + (f" in {distributed.world()} processes" if distributed.world() > 1 else "")
    say(f"  torch {facts['torch']} on {place}, {told(machine.precision, machine.device)}, "
        f"commit {commit_told(facts)}"
        + (f", {len(dataset)} images, {len(dataset.classes)} classes" if dataset is not None else ""))
    if args.dry_run:
        print("Dry run: everything checked, nothing done.", file=sys.stderr)
    return not args.dry_run


def check_places(args: argparse.Namespace, dataset: Dataset | None) -> None:
    """UserError if a folder of results is a file, or the folder of the photos."""
    for name in ("output_dir", "cam_dir"):
        path = getattr(args, name, None)
        if path is None:
            continue
        check_folder(path, f"--{name}")
        if dataset is not None and Path(path).resolve() == dataset.image_dir.resolve():
            raise UserError(f"--{name} {path} is the folder of the photos, among which results would be written; name "
                            "another")


def record_of(args: argparse.Namespace, machine: Machine) -> dict[str, object]:
    """What a manifest says of a run: its options and the environment."""
    return {"options": vars(args), **environment(machine.device)}


def places_of(args: argparse.Namespace, payload: dict) -> Places:
    """Where maps of a split are kept: beside the checkpoint they are made from; for a published one, in output/."""
    path = Path(args.model_path)
    home = path.parent / "scores" if is_checkpoint(payload) else run_dir("scores", path.stem)
    return Places(args.cam_dir, home, args.overwrite)
