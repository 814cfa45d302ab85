"""Settings as defaults by dataset, by seed method and by DeepLab's head; each run prints which of them it took."""
from collections.abc import Mapping

# IRN's classifier, PSA's AffinityNet and its walk. Learning rates are a tenth of theirs, as momentum is true here
# (docs/published.md).
PUBLISHED = {
    "stage1": {"batch_size": 16, "epochs": 5, "lr": 0.01, "head_lr": 10.0, "weight_decay": 1e-4,
               "crop_size": 448, "scales": (0.5, 1.0, 1.5, 2.0)},
    "stage2": {"batch_size": 8, "epochs": 8, "lr": 0.01, "weight_decay": 5e-4, "alpha_low": 4.0, "alpha_high": 24.0,
               "crf_preset": "psa"},
    "masks": {"bg_alpha": 16.0, "beta": 8.0, "walk_steps": 256, "crf_preset": "psa"},
}

# Chosen on a third of the Pet sample and of VOC's animals together (docs/experiments.md).  Its maps are posteriors of
# whole objects, which meet the background score of alpha 6 where they are undecided, and which a long walk would blur.
METHODS = {"mixture": {
    "stage1": {"scales": (1.0, 1.5), "alternate": True},
    "stage2": {"alpha_low": 4.0, "alpha_high": 24.0, "crf_preset": "irn"},
    "masks": {"bg_alpha": 6.0, "walk_steps": 8, "crf_preset": "irn"},
}}


def by_step(max_size: int, steps: dict[str, dict] | None = None) -> dict[str, dict]:
    """{step: {flag: default}} of a dataset: its `max_size` for every step, and what `steps` adds to single ones."""
    return {step: {"max_size": max_size, **(steps or {}).get(step, {})}
            for step in ("stage1", "stage2", "masks", "deeplab")}


def step_defaults(by_step: Mapping[str, dict], step: str, method: str | None) -> dict[str, object]:
    """{flag: default} of a step, of a dataset (`by_step`) and, before these, of a seed method."""
    return {**by_step.get(step, {}), **METHODS.get(method, {}).get(step, {})}


# What each of DeepLab's heads was published with: SEAM's segmentation code; MCTformer's, whose optimiser has in effect
# neither momentum nor weight decay. Defaults of steps 5 and 6.
DEEPLAB_TRAINING = {
    "seamv1": {"lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 10, "epochs": 20, "crop_size": 448},
    "mctformer": {"lr": 0.0007, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 4, "epochs": 30, "crop_size": 321}}
DEEPLAB_TEST = {
    "seamv1": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5), "flip": True, "merge": "mean", "crf_preset": "seamv1"},
    "mctformer": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5), "flip": False, "merge": "max", "crf_preset": "mctformer"}}
