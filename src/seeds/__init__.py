"""Seed methods by the name of --method.  No torch here: the parsers read names and flags.

A seed is a plug: a subclass of `src.seeds.cam.Seed` in a file of its own and one line in SEEDS.  The line holds the
class itself, or "module:class", which is imported on first use.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from src.seeds.avc.flags import FLAGS as AVC_FLAGS
from utils.errors import UserError
from utils.options import Flag

if TYPE_CHECKING:
    from models.classifier import Classifier
    from src.seeds.cam import Seed

SEEDS: dict[str, type[Seed] | str] = {
    "cam": "src.seeds.cam:Seed",
    "common": "src.seeds.common:CommonObject",
    "avc": "src.seeds.avc.seed:AffinityConsistency",
    "mixture": "src.seeds.mixture:Mixture",
}
MIXTURE_FLAGS = {"mixture_depths": Flag(str, "names of the backbone's feature maps to read, shallow to deep (default: "
                                             "the backbone's own choice)", nargs="+", metavar="NAME")}
# Flags that a method adds to stage 1, by name.
SEED_FLAGS: dict[str, dict[str, Flag]] = {"avc": AVC_FLAGS, "mixture": MIXTURE_FLAGS}


def seed_class(name: str) -> type[Seed]:
    """The class of a seed method; UserError for an unknown name."""
    if name not in SEEDS:
        raise UserError(f"unknown seed method {name!r}; pass --method {', '.join(SEEDS)}")
    found = SEEDS[name]
    if isinstance(found, str):
        module, attribute = found.split(":")
        found = SEEDS[name] = getattr(import_module(module), attribute)
    return found


def attach(classifier: Classifier, record: dict[str, object]) -> None:
    """Build the seed that a classifier's record names, and attach it.  record: {"name": ..., what `build` takes}."""
    how = {key: value for key, value in record.items() if key != "name"}
    classifier.seed = seed_class(record["name"]).build(classifier, **how)


def check_fitted(record: dict[str, object]) -> None:
    """UserError for a classifier whose seed is still to be fitted: its maps are zeros.

    record: of any network; only one with a seed is looked at.
    """
    if not is_fitted(record):
        name = record["seed"]["name"]
        raise UserError(f"the checkpoint's {name} was never fitted, as its step 1 was stopped before; run step 1 again")


def is_fitted(record: dict[str, object]) -> bool:
    """Whether a network's record has no seed that is still to be fitted."""
    return "seed" not in record or seed_class(record["seed"]["name"]).is_fitted(record["state"])
