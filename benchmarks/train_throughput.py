"""Images a second of a training step of each stage at its published size, ours beside the published way of writing it.

    python -m benchmarks.train_throughput [--stages cam affinity deeplab] [--variants plain fp32 bf16 compile]
                                          [--batch_size N] [--repeats N] [--crop_size N] [--device auto]

Stages: cam, ResNet-50 at 512 (IRN); affinity, AffinityNet on ResNet38 at 448 (PSA); deeplab, DeepLabV1-ResNet38 at 448.
Variants: plain, the loop as published code has it (float32, tensors in PyTorch's default order, memory from glibc's
defaults, momentum SGD, the loss read at every step); fp32, bf16 and compile (bf16 and torch.compile), our training step
with channels-last tensors, whatever the stage's loss and layers are.  Images are random and lie ready, so that reading
them does not count: benchmarks.loader says how fast that is.  Each runs in a process of its own; the least of the
repeats counts, after one to warm up.

Utilisation is the share of the device's rate of matrix products that the step reaches: floating-point operations of the
network's products, counted by torch.utils.flop_counter (forward and backward; recomputation does not count), against a
large product of two matrices in the same precision, measured here (float32 with TF32 on GPUs, which PyTorch's
convolutions use there too).  Prints a table, then a JSON line for each case,
with the hours for the published epochs of VOC (10,582 images) and COCO (82,081).
"""
import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Table
from utils.runtime import keep_memory, wait_quietly

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("plain", "fp32", "bf16", "compile")
SPLITS = {"voc": 10_582, "coco": 82_081}


@dataclass(frozen=True)
class Case:
    """A stage at its published size.  how: for `build_network`.  freeze: blocks, and the policy for normalisation."""
    title: str
    how: dict
    crop: int
    batch: int
    epochs: int
    freeze: tuple


CASES = {
    "cam": Case("ResNet-50 CAM", {"kind": "classifier", "backbone": "resnet50", "classes": 20}, 512, 16, 5,
                (0, "frozen")),
    "affinity": Case("AffinityNet on ResNet38", {"kind": "affinity", "backbone": "resnet38"}, 448, 8, 8, (2, "frozen")),
    "deeplab": Case("DeepLabV1-ResNet38", {"kind": "deeplab", "backbone": "resnet38", "classes": 20}, 448, 10, 20,
                    (0, "train")),
}


def side(crop):
    """The crop that the training really takes: 16k + 1 pixels."""
    from utils.maps import snapped_size
    return snapped_size((crop, crop), 16)[0]


def build(name):
    """The network of a stage, as its training step has it."""
    import torch

    from models.build import build_network
    torch.manual_seed(0)
    case = CASES[name]
    return build_network(**case.how).freeze(*case.freeze).train()


def random_batch(case, batch_size, crop):
    """A batch as the loader gives it."""
    import torch
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 21, (batch_size, crop // 64 + 1, crop // 64 + 1), generator=generator)
    target = target.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :crop, :crop].contiguous()
    return {"image": torch.randn(batch_size, 3, crop, crop, generator=generator), "index": torch.arange(batch_size),
            "labels": torch.randint(0, 2, (batch_size, 20), generator=generator), "target": target}


def losses(name):
    """(loss, totals) of a stage, as its training has them."""
    from models.deeplab import labelled_pixels
    from src import segment, train
    from src.task import no_totals
    from utils.random_walk import half_disc
    offsets = half_disc(5)
    return {"cam": (train._classifier_loss(0.0), no_totals),
            "affinity": (train._affinity_loss(offsets), train._pair_totals(offsets)),
            "deeplab": (segment._loss, lambda batch: labelled_pixels(batch["target"]))}[name]


def our_step(name, variant, batch, device):
    """Function () -> nothing: our training step."""
    from src.stepper import Stepper
    from src.task import Task
    case, (loss, totals) = CASES[name], losses(name)
    images = len(batch["image"])
    options = {"lr": 1e-3, "head_lr": 10.0, "momentum": 0.9, "weight_decay": 5e-4, "seed": 0, "accumulate": 1,
               "clip_grad": 0.0, "compile": variant == "compile", "precision": "fp32" if variant == "fp32" else "bf16"}
    task = Task(case.title, build(name), loss, None, images, None, None, totals)
    stepper = Stepper(task, options, device)
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return lambda: stepper.step(batch, (0, images, images), 0, 0.0)


def plain_step(name, batch, device):
    """Function () -> nothing: the step as published code has it.  The pairs of PSA's loss are gathered at once there;
    that needs 9 GB for a batch of 8, so that ours, which gives the same numbers, stands for it.
    """
    import torch
    from torch.nn import functional as F

    from src.task import Part
    network = build(name).to(device)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    loss_of, totals = losses(name)
    images = len(batch["image"])

    def step():
        here = {key: value.to(device) for key, value in batch.items()}
        if name == "deeplab":
            size = here["image"].shape[-2:]
            logits = F.interpolate(network(here["image"]), size, mode="bilinear", align_corners=True)
            loss = F.cross_entropy(logits, here["target"], ignore_index=255)
        else:
            loss, _ = loss_of(network, here, Part(0, images, images, totals(here)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return step


def measure(name, variant, batch_size, crop, repeats, device_name):
    """One variant in this process; prints {"seconds", "processor_seconds" (of all threads), "gigabytes"}."""
    if variant != "plain":
        wait_quietly()
        keep_memory()
    import torch

    from utils.log import memory_gb
    from utils.options import pick_device
    device = pick_device(device_name)
    batch = random_batch(CASES[name], batch_size, crop)
    step = plain_step(name, batch, device) if variant == "plain" else our_step(name, variant, batch, device)
    seconds, processor = [], []
    for _ in range(repeats + 1):
        started, worked = time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - worked)
    print(json.dumps({"seconds": min(seconds[1:]), "processor_seconds": round(min(processor[1:]), 3),
                      "gigabytes": round(memory_gb(device), 2)}))


def count_operations(name, crop):
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


def matrix_rate(device_name, precision):
    """Operations a second of a product of two large matrices: what utilisation is relative to."""
    import torch

    from benchmarks.measure import timed
    from utils.options import pick_device
    device = pick_device(device_name)
    torch.backends.cuda.matmul.allow_tf32 = True
    size = 8192 if device.type == "cuda" else 2048
    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    one, two = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))

    def product():
        result = one @ two
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result
    product()
    return 2 * size ** 3 / timed(product, 10)[0]


def run_case(name, variant, args, batch_size, crop):
    command = [sys.executable, "-m", "benchmarks.train_throughput", "--device", args.device, "--repeats",
               str(args.repeats), "--measure", name, variant, str(batch_size), str(crop)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} {variant}: failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_stage(name, args, rates):
    """Measure the variants of a stage, print a table row for each, and return the JSON rows' figures."""
    case = CASES[name]
    crop, batch_size = side(args.crop_size or case.crop), args.batch_size or (case.batch if args.on_gpu else 1)
    operations = count_operations(name, crop)
    print(f"\n{case.title}, {crop} x {crop}, batch {batch_size}: {operations / 1e9:.0f} GFLOP an image and step")
    print(f"{'':<10}{'s a step':>10}{'img/s':>9}{'ratio':>8}{'GB':>7}{'use':>7}{'VOC h':>8}{'COCO h':>8}")
    rows, plain = [], None
    for variant in args.variants:
        found = run_case(name, variant, args, batch_size, crop)
        if found is None:
            continue
        plain = found["seconds"] if variant == "plain" else plain
        pace = batch_size / found["seconds"]
        hours = {split: images * case.epochs / pace / 3600 for split, images in SPLITS.items()}
        use = operations * pace / rates["fp32" if variant in ("plain", "fp32") else "bf16"]
        ratio = f"{plain / found['seconds']:.2f}" if plain else "-"
        print(f"{variant:<10}{found['seconds']:>10.3f}{pace:>9.2f}{ratio:>8}{found['gigabytes']:>7.1f}{use:>7.0%}"
              f"{hours['voc']:>8.1f}{hours['coco']:>8.1f}", flush=True)
        rows.append((f"{name} {variant}", found, plain, {
            "images_per_second": round(pace, 3), "processor_seconds": found["processor_seconds"],
            "utilisation": round(use, 3), "epochs": case.epochs,
            "hours_voc": round(hours["voc"], 2), "hours_coco": round(hours["coco"], 2)}))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=CASES, default=list(CASES), help="which (default: all)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which (default: all)")
    parser.add_argument("--batch_size", type=int, help="images a step (default: as published, 1 on a CPU)")
    parser.add_argument("--crop_size", type=int, help="side in pixels, rounded to 16k + 1 (default: as published)")
    parser.add_argument("--repeats", type=int, help="steps measured after one to warm up (default: 10, 2 on a CPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: auto, a GPU if there is one)")
    parser.add_argument("--measure", nargs=4, metavar=("STAGE", "VARIANT", "BATCH", "CROP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, variant, batch_size, crop = args.measure
        return measure(name, variant, int(batch_size), int(crop), args.repeats, args.device)
    wait_quietly()
    import torch

    from utils.log import environment
    from utils.options import pick_device
    args.on_gpu = pick_device(args.device).type == "cuda"
    args.repeats = args.repeats or (10 if args.on_gpu else 2)
    rates = {precision: matrix_rate(args.device, precision) for precision in ("fp32", "bf16")}
    facts = environment(pick_device(args.device))
    print(f"{facts['device_name']}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products: "
          + ", ".join(f"{precision} {rate / 1e12:.2f} TFLOP/s" for precision, rate in rates.items()))
    rows = [row for name in args.stages for row in run_stage(name, args, rates)]
    print()
    table = Table()
    for case, found, plain, more in rows:
        table.add(case, found["seconds"], plain or found["seconds"], 1000 * found["gigabytes"], None, **more,
                  device=facts["device_name"], **{f"{key}_tflops": round(rate / 1e12, 3) for key, rate in rates.items()})
    table.finish()
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
