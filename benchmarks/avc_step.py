"""What a training step of AVC costs beside one of the plain CAM classifier: ResNet-50, the same images, our own step.

    python -m benchmarks.avc_step [--crop_size 257] [--batch_size 16] [--precision bf16] [--repeats 3]

An AVC step sees two views of each image, one of them smaller, and computes all four terms. It freezes the backbone up
to the features, as --method avc does with pretrained weights; `cam` is measured with that, and as it is by default. AVC
is measured without colours and with them.
Processor seconds of all threads (on a GPU the clock's), the least of the repeats after one to warm up; three classes,
random images. The ratio is the reference's time divided by AVC's: 0.5 means that AVC takes twice as long.
"""
import argparse
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.measure import Parser, Table, timed, training_step
from utils.config import Machine
from utils.grids import snapped_size
from utils.options import pick_device
from utils.runtime import keep_memory, run_main, wait_quietly


def step_of(method: str, freeze: int, args: argparse.Namespace, machine: Machine, colour: float = 0.0) -> Callable:
    """A training step of a method, as a function without arguments.  colour: AVC's --avc_colour."""
    import torch

    from models.weights import build_network
    from src.seeds import attach, seed_class
    torch.manual_seed(0)
    seed, count = seed_class(method), args.batch_size
    settings = seed.Settings.of({"avc_consistency": 1.0, "avc_colour": colour})
    network = build_network("classifier", "resnet50", classes=3)
    attach(network, seed.record(settings))

    def loss(network, batch, micro):  # AVC's terms have their full weight at the end of a training
        return network.seed.loss(network, batch, replace(micro, progress=1.0), settings)
    batch = {"image": torch.randn(count, 3, args.crop_size, args.crop_size), "index": torch.arange(count),
             "labels": torch.nn.functional.one_hot(torch.arange(count) % 3, 3)}
    return training_step(network.freeze(freeze, "frozen").train(), loss, batch, machine)


def main() -> None:
    parser = Parser("benchmarks.avc_step", __doc__)
    parser.flag("crop_size", 257, "pixels")
    parser.flag("batch_size", 16, "images")
    parser.flag("precision", "bf16", "arithmetic")
    parser.flag("repeats", 3, "steps measured", like="limit")
    parser.flag("device", "auto", "cpu, cuda or cuda:N")
    args = parser.parse_args()
    args.crop_size = snapped_size((args.crop_size,) * 2, 16)[0]
    wait_quietly()
    keep_memory()
    machine = Machine(pick_device(args.device), args.precision)
    clock = time.perf_counter if machine.device.type == "cuda" else time.process_time

    def measure(step):
        step()  # to warm up
        return timed(step, args.repeats, clock)[0]
    table = Table()
    plain = {freeze: measure(step_of("cam", freeze, args, machine)) for freeze in (2, 4)}
    for colour in (0.0, 0.5):
        seconds = measure(step_of("avc", 4, args, machine, colour))
        for freeze, reference in plain.items():
            table.add(f"--avc_colour {colour:g} / cam --freeze {freeze}", seconds, reference,
                      avc_over_cam=round(seconds / reference, 2))
    table.finish()


if __name__ == "__main__":
    run_main(main)
