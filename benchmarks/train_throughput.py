"""Images a second of a training step of each stage at its published size, ours beside the published way of writing it.

    python -m benchmarks.train_throughput [--stages cam affinity deeplab] [--variants plain fp32 bf16 compile]
                                          [--batch_size N] [--repeats N] [--crop_size N] [--device auto]

Stages: cam, ResNet-50 at 512 (IRN); affinity, AffinityNet on ResNet38 at 448 (PSA); deeplab, DeepLabV1-ResNet38 at 448.
Variants: plain, the loop as published code has it (float32, tensors in PyTorch's default order, memory from glibc's
defaults, momentum SGD, the loss read at every step); fp32, bf16 and compile (bf16 and torch.compile), our training step
with channels-last tensors, whatever the stage's loss and layers are; the last two only where the processor has units
for bf16.  Images are random and lie ready, so that reading them does not count: benchmarks.loader says how fast that
is.  Each runs in a process of its own; the least of the repeats counts, after one to warm up.

Utilisation is the ratio of the step's rate to the device's rate of matrix products: floating-point operations of the
network's products, counted by torch.utils.flop_counter (forward and backward; recomputation does not count), against a
large product of two matrices in the same precision, measured here (float32 with TF32 on GPUs, which PyTorch's
convolutions use there too).  Prints a table, then a JSON line for each case, with the hours for the published epochs of
VOC (10,582 images) and COCO (82,081).
"""
import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measure import Parser, Table, in_process, precisions, timed, training_step
from utils.config import Machine
from utils.errors import UserError
from utils.grids import snapped_size
from utils.log import environment, memory_gb
from utils.options import pick_device
from utils.runtime import keep_memory, wait_quietly

VARIANTS = ("plain", "fp32", "bf16", "compile")
SPLITS = {"voc": 10_582, "coco": 82_081}


@dataclass(frozen=True)
class Case:
    """A stage at its published size.  how: for `build_network`.  freeze: blocks, and the policy for normalisation."""
    title: str
    how: dict[str, object]
    crop: int
    batch: int
    epochs: int
    freeze: tuple[int, str]


CASES = {
    "cam": Case("ResNet-50 CAM", {"kind": "classifier", "backbone": "resnet50", "classes": 20}, 512, 16, 5,
                (0, "frozen")),
    "affinity": Case("AffinityNet on ResNet38", {"kind": "affinity", "backbone": "resnet38"}, 448, 8, 8, (2, "frozen")),
    "deeplab": Case("DeepLabV1-ResNet38", {"kind": "deeplab", "backbone": "resnet38", "classes": 20}, 448, 10, 20,
                    (0, "train")),
}


def build(name: str):
    """The network of a stage, as its training step has it."""
    import torch

    from models.weights import build_network
    from src.seeds import attach
    torch.manual_seed(0)
    case = CASES[name]
    network = build_network(**case.how)
    if name == "cam":
        attach(network, {"name": "cam"})
    return network.freeze(*case.freeze).train()


def random_batch(batch_size: int, crop: int) -> dict:
    """A batch as the loader gives it; "cells" are the pixels of "target" on AffinityNet's grid."""
    import torch
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 21, (batch_size, crop // 64 + 1, crop // 64 + 1), generator=generator)
    target = target.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :crop, :crop].contiguous()
    return {"image": torch.randn(batch_size, 3, crop, crop, generator=generator), "index": torch.arange(batch_size),
            "labels": torch.randint(0, 2, (batch_size, 20), generator=generator), "target": target,
            "cells": target[:, ::8, ::8]}


def losses(name: str) -> tuple[Callable, Callable]:
    """(loss, totals) of a stage, as `src.training.loop.Task` takes them."""
    from models.affinitynet import affinity_loss, pair_counts
    from models.deeplab import labelled_pixels, segmentation_loss
    from src.seeds.cam import CamConfig
    from src.training.loop import no_totals
    from utils.random_walk import half_disc
    if name == "cam":
        return lambda net, batch, micro: net.seed.loss(net, batch, micro, CamConfig()), no_totals
    if name == "affinity":
        offsets = half_disc(5)
        return (lambda net, batch, micro: (affinity_loss(net(batch["image"]), batch["cells"], offsets, micro.totals)[0],
                                           {}), lambda batch: pair_counts(batch["cells"], offsets))
    return (lambda net, batch, micro: (segmentation_loss(net(batch["image"]), batch["target"], 255, micro.totals), {}),
            lambda batch: labelled_pixels(batch["target"]))


def our_step(name: str, variant: str, batch: dict, device) -> Callable[[], None]:
    """Our training step, as a function without arguments."""
    loss, totals = losses(name)
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    machine = Machine(device, "fp32" if variant == "fp32" else "bf16")
    return training_step(build(name), loss, batch, machine, totals, variant == "compile")


def plain_step(name: str, batch: dict, device) -> Callable[[], None]:
    """The step as published code has it, as a function without arguments.

    PSA's code gathers all pairs of the affinity loss at once, which needs 9 GB for a batch of 8: our loss, which gives
    the same numbers, takes its place.
    """
    import torch
    from torch.nn import functional as F

    from src.training.loop import MicroBatch
    network = build(name).to(device)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    loss_of, totals = losses(name)

    def step():
        here = {key: value.to(device) for key, value in batch.items()}
        if name == "deeplab":
            size = here["image"].shape[-2:]
            logits = F.interpolate(network(here["image"]), size, mode="bilinear", align_corners=True)
            loss = F.cross_entropy(logits, here["target"], ignore_index=255)
        else:
            loss, _ = loss_of(network, here, MicroBatch(1.0, totals(here), 0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return step


def measure(name: str, variant: str, batch_size: int, crop: int, repeats: int, device_name: str) -> None:
    """One variant in this process; prints {"seconds", "processor_seconds" (of all threads), "gigabytes"}."""
    if variant != "plain":
        wait_quietly()
        keep_memory()
    device, batch = pick_device(device_name), random_batch(batch_size, crop)
    step = plain_step(name, batch, device) if variant == "plain" else our_step(name, variant, batch, device)
    step()  # to warm up
    seconds, processor = [], []
    for _ in range(repeats):
        started, worked = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - worked)
    print(json.dumps({"seconds": min(seconds), "processor_seconds": round(min(processor), 3),
                      "gigabytes": round(memory_gb(device), 2)}))


def count_operations(name: str, crop: int) -> int:
    """Floating-point operations of one image's training step, counted without computing it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        network = build(name)
        image = torch.empty(1, 3, crop, crop)
    with FlopCounterMode(display=False) as counter:
        found = network(image)
        found.sum().backward()
    return counter.get_total_flops()


def matrix_rate(device, precision: str) -> float:
    """Operations a second of a product of two large matrices: what utilisation is relative to."""
    import torch
    torch.backends.cuda.matmul.allow_tf32 = True
    size = 8192 if device.type == "cuda" else 2048
    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    one, two = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))

    def product():
        return (one @ two)[0, 0].item()  # waits for the device
    product()
    return 2 * size ** 3 / timed(product, 10)[0]


def run_stage(name: str, args: argparse.Namespace, rates: dict[str, float]) -> list[dict]:
    """Measure the variants of a stage, print a line for each, and return what `Table.add` takes."""
    case = CASES[name]
    crop = snapped_size((args.crop_size or case.crop,) * 2, 16)[0]
    batch_size = args.batch_size or (case.batch if args.on_gpu else 1)
    operations = count_operations(name, crop)
    print(f"\n{case.title}, {crop} x {crop}, batch {batch_size}: {operations / 1e9:.0f} GFLOP an image and step")
    print(f"{'':<10}{'s a step':>10}{'img/s':>9}{'ratio':>8}{'GB':>7}{'use':>7}{'VOC h':>8}{'COCO h':>8}")
    rows, plain = [], None
    for variant in args.variants:
        try:
            found = in_process("benchmarks.train_throughput", "--device", args.device, "--repeats", args.repeats,
                               "--measure", name, variant, batch_size, crop)
        except UserError as error:
            print(f"{name} {variant}: failed: {error}", file=sys.stderr)
            continue
        plain = found["seconds"] if variant == "plain" else plain
        pace = batch_size / found["seconds"]
        hours = {split: images * case.epochs / pace / 3600 for split, images in SPLITS.items()}
        use = operations * pace / rates["fp32" if variant in ("plain", "fp32") else "bf16"]
        ratio = f"{plain / found['seconds']:.2f}" if plain else "-"
        print(f"{variant:<10}{found['seconds']:>10.3f}{pace:>9.2f}{ratio:>8}{found['gigabytes']:>7.1f}{use:>7.0%}"
              f"{hours['voc']:>8.1f}{hours['coco']:>8.1f}", flush=True)
        rows.append({"case": f"{name} {variant}", "seconds": found["seconds"],
                     "reference_seconds": plain or found["seconds"], "memory": 1000 * found["gigabytes"],
                     "images_per_second": round(pace, 3), "processor_seconds": found["processor_seconds"],
                     "utilisation": round(use, 3), "epochs": case.epochs,
                     **{f"hours_{split}": round(value, 2) for split, value in hours.items()}})
    return rows


def main() -> int:
    parser = Parser("benchmarks.train_throughput", __doc__)
    parser.add_argument("--stages", nargs="+", choices=CASES, default=list(CASES), help="which (default: all)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which (default: all)")
    parser.add_argument("--batch_size", type=int, help="images a step (default: as published, 1 on a CPU)")
    parser.add_argument("--crop_size", type=int, help="side in pixels, rounded to 16k + 1 (default: as published)")
    parser.add_argument("--repeats", type=int, help="steps measured after one to warm up (default: 10, 2 on a CPU)")
    parser.flag("device", "auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")
    parser.add_argument("--measure", nargs=4, metavar=("STAGE", "VARIANT", "BATCH", "CROP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, variant, batch_size, crop = args.measure
        measure(name, variant, int(batch_size), int(crop), args.repeats, args.device)
        return 0
    wait_quietly()
    import torch
    device = pick_device(args.device)
    args.on_gpu = device.type == "cuda"
    args.repeats = args.repeats or (10 if args.on_gpu else 2)
    measured = precisions(device)
    if "bf16" not in measured:
        args.variants = [variant for variant in args.variants if variant in ("plain", "fp32")]
        print(f"{device} has no bf16 units: variants {' '.join(args.variants) or 'none'} alone")
    rates = {precision: matrix_rate(device, precision) for precision in measured}
    facts = environment(device)
    print(f"{facts['device_name']}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products: "
          + ", ".join(f"{precision} {rate / 1e12:.2f} TFLOP/s" for precision, rate in rates.items()))
    rows = [row for name in args.stages for row in run_stage(name, args, rates)]
    print()
    table, peaks = Table(), {f"{precision}_tflops": round(rate / 1e12, 3) for precision, rate in rates.items()}
    for row in rows:
        table.add(**row, device=facts["device_name"], **peaks)
    table.finish()
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
