"""Training steps of every stage in float64, where rounding hides nothing: python tests/float64_steps.py <result.json>

Alone, or in each of two ranks that tests/together.py has joined: each takes its slice of the same batch.
What is to be the same in both cases:
"whole": without dropout and with frozen normalisation, the steps of one rank with the whole batch.
"by rank": with dropout and normalisation that learns, the sum of what each rank does with its slice alone; one rank
computes the slices one after the other.
"""
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

IMAGES, SIDE, STEPS, RANKS = 7, 33, 3, 2
OPTIONS = {"batch_size": IMAGES, "epochs": STEPS, "lr": 0.01, "head_lr": 10.0, "momentum": 0.9, "weight_decay": 1e-4,
           "crop_size": SIDE, "max_size": SIDE, "seed": 0}


def stages():
    """{name: (how to build the network, loss, totals)}."""
    from models.affinitynet import pair_counts
    from models.deeplab import labelled_pixels
    from src import segment, train
    from src.seeds.cam import CamConfig, Seed
    from src.training.loop import no_totals
    from utils.random_walk import half_disc
    offsets = half_disc(5)
    return {"classifier": ({"backbone": "resnet18"}, partial(Seed().loss, settings=CamConfig()), no_totals),
            "affinity": ({"backbone": "resnet38", "width": 0.05}, partial(train._affinity_loss, offsets=offsets),
                         lambda batch: pair_counts(train._on_grid(batch["target"]), offsets)),
            "deeplab": ({"backbone": "resnet18"}, segment._loss, lambda batch: labelled_pixels(batch["target"]))}


def slice_of(rank, ranks):
    """(first, end, images) of a rank's slice of the batch."""
    return IMAGES * rank // ranks, IMAGES * (rank + 1) // ranks, IMAGES


def batch_of(first, end, images):
    """A slice of a batch whose images have unequal numbers of labelled pixels."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 3, (images, SIDE, SIDE), generator=generator)
    target[:2], target[4, :9] = 255, 255
    batch = {"image": torch.randn(images, 3, SIDE, SIDE, generator=generator, dtype=torch.float64), "target": target,
             "labels": torch.randint(0, 2, (images, 3), generator=generator), "index": torch.arange(images)}
    return {name: value[first:end] for name, value in batch.items()}


def run_of(kind, how, loss, totals, exact):
    """A run that is about to take its first step.  exact: without what is drawn or measured in each rank."""
    from models.weights import build_network
    from src.training.loop import Run, Task
    from utils.config import Machine, TrainConfig
    torch.manual_seed(0)
    network = build_network(kind, classes=3, **how).double()
    for module in network.modules():
        if exact and isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    if exact:
        network.freeze(0, "frozen")
        # DeepLab's head has normalisation of its own, which no flag freezes.
        network._frozen_norms += [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    task = Task(kind, network, loss, range(IMAGES), None, None, totals)
    return Run(task, TrainConfig.of(OPTIONS), Machine(torch.device("cpu")), Path("unused"), OPTIONS)


def step_by_rank(run):
    """The step of several ranks in one: each slice is drawn for and normalised by itself, and gradients add up."""
    from src.training.loop import MicroBatch, draw_seed
    from src.training.optimiser import clip_gradient, set_rates
    number, said = run.global_step(), {}
    set_rates(run.optimiser, number / STEPS)
    run.optimiser.zero_grad()
    totals = run.task.totals(batch_of(0, IMAGES, IMAGES))
    for rank in range(RANKS):
        first, end, images = slice_of(rank, RANKS)
        torch.manual_seed(draw_seed(OPTIONS["seed"], number, rank))
        loss, terms = run.task.loss(run.network, batch_of(first, end, images),
                                    MicroBatch((end - first) / images, totals, number / STEPS))
        loss.backward()
        said = {name: said.get(name, 0) + value.item() for name, value in {"loss": loss, **terms}.items()}
    said["grad_norm"] = clip_gradient(run.optimiser, 0)
    run.optimiser.step()
    run.step += 1
    return said


def steps(exact, *stage):
    """What the steps say, and the norms of all parameters after them."""
    from utils import distributed
    run = run_of(*stage, exact=exact)
    if exact or distributed.world() > 1:
        place = slice_of(distributed.rank(), distributed.world())
        said = [run.train_step(batch_of(*place), place) for _ in range(STEPS)]
    else:
        said = [step_by_rank(run) for _ in range(STEPS)]
    norms = {name: tensor.norm().item() for name, tensor in run.network.named_parameters()}
    assert distributed.gather(norms) == [norms] * distributed.world(), "the ranks have moved apart"
    return {"steps": said, "norms": norms}


def main(argv):
    from utils import distributed
    to_float = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # the losses' own casts would round
    try:
        found = {name: {kind: steps(exact, kind, *rest) for kind, rest in stages().items()}
                 for name, exact in (("whole", True), ("by rank", False))}
    finally:
        torch.Tensor.float = to_float
    if distributed.is_main():
        Path(argv[0]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main(sys.argv[1:]))
