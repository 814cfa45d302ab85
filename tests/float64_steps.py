"""Training steps of every stage in float64, where rounding hides nothing: python tests/float64_steps.py <result.json>

Alone, or in one of several processes that tests/together.py has joined: each takes its slice of the same batch.
"""
import json
import sys
from pathlib import Path

import torch

IMAGES, STEPS = 7, 3
OPTIONS = {"lr": 0.01, "head_lr": 10.0, "momentum": 0.9, "weight_decay": 1e-4, "accumulate": 1, "clip_grad": 0.0,
           "compile": False, "seed": 0, "precision": "fp32"}


def stages():
    """{name: (how to build the network, loss, totals)}: dropout and learning normalisation included."""
    from models.deeplab import labelled_pixels
    from src import segment, train
    from src.task import no_totals
    from utils.random_walk import half_disc
    offsets = half_disc(5)
    return {"classifier": ({"backbone": "resnet18"}, train._classifier_loss(0.0), no_totals),
            "affinity": ({"backbone": "resnet38", "width": 0.05}, train._affinity_loss(offsets),
                         train._pair_totals(offsets)),
            "deeplab": ({"backbone": "resnet18"}, segment._loss, lambda batch: labelled_pixels(batch["target"]))}


def batch_of(first, end):
    """A slice of a batch whose images have unequal numbers of labelled pixels."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 3, (IMAGES, 65, 65), generator=generator)
    target[:3], target[4, :20] = 255, 255
    batch = {"image": torch.randn(IMAGES, 3, 65, 65, generator=generator, dtype=torch.float64), "target": target,
             "labels": torch.randint(0, 2, (IMAGES, 3), generator=generator), "index": torch.arange(IMAGES)}
    return {name: value[first:end] for name, value in batch.items()}


def steps(kind, how, loss, totals):
    """What the steps say, and the norms of all tensors after them."""
    from models.build import build_network
    from src.stepper import Stepper
    from src.task import Task
    from utils import distributed
    torch.manual_seed(0)
    network = build_network(kind, classes=3, **how).double()
    stepper = Stepper(Task(kind, network, loss, None, IMAGES, None, None, totals), OPTIONS, torch.device("cpu"))
    first, end = (IMAGES * rank // distributed.world() for rank in (distributed.rank(), distributed.rank() + 1))
    said = [stepper.step(batch_of(first, end), (first, end, IMAGES), number, number / STEPS) for number in range(STEPS)]
    return {"steps": said, "norms": {name: value.double().norm().item() for name, value in network.state_dict().items()}}


def main(argv):
    from utils import distributed
    to_float = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # the losses' own casts would round
    try:
        found = {kind: steps(kind, *rest) for kind, rest in stages().items()}
    finally:
        torch.Tensor.float = to_float
    if distributed.is_main():
        Path(argv[0]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main(sys.argv[1:]))
