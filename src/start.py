"""What every script does between its flags and its work: open the split, settle the device, say what will run."""
import sys

from utils import distributed
from utils.crf import settle_backend
from utils.datasets import open_dataset
from utils.errors import UserError
from utils.log import environment
from utils.options import pick_device, print_options


def open_split(args):
    """The split that the flags name; --split is settled to the training split if it was left out."""
    with distributed.main_first():  # what it downloads or parses is there for the others
        dataset = open_dataset(args.dataset, args.data_root, args.split, args.limit, args.ids,
                               getattr(args, "download", False), args.difficult)
    args.split = dataset.split
    return dataset


def settle_labels(args, dataset, default=None):
    """Settle --labels: known ones on a training split, where pseudo-masks are made; predicted ones elsewhere, where
    scores are.  default: what holds if it was left out, instead.  UserError if the known ones are asked for in vain.
    """
    known = "gt" if dataset.split in dataset.training_splits else "predicted"
    args.labels = args.labels or default or known
    if args.labels == "gt" and dataset.labels is None:
        raise UserError(f"split {dataset.split} of {dataset.root} has no image labels; pass --labels predicted")


def settle_crf(args):
    """Settle --crf_backend if a CRF is to run (step 2 always runs one); UserError if it cannot be had."""
    if getattr(args, "crf", True):
        args.crf_backend = settle_backend(args.crf_backend)


def begin(step, args, dataset=None):
    """Settle the device and print the header; a dry run says that it stops.  Returns the torch.device."""
    device = pick_device(args.device)
    print_options(step, args)
    facts = environment(device)
    dirty = " with changes" if facts["git_dirty"] else ""
    place = facts["device_name"] + (f" in {distributed.world()} processes" if distributed.world() > 1 else "")
    print(f"  torch {facts['torch']} on {place}, commit {(facts['git_commit'] or 'none')[:10]}{dirty}"
          + (f", {len(dataset)} images, {len(dataset.classes)} classes" if dataset is not None else ""),
          file=sys.stderr)
    if args.dry_run:
        print("Dry run: everything checked, nothing done.", file=sys.stderr)
    return device
