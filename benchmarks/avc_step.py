"""What a training step of AVC costs beside one of the plain CAM classifier: ResNet-50, the same images, our own step.

    python -m benchmarks.avc_step [--crop_size 257] [--batch_size 16] [--precision bf16] [--repeats 3]

An AVC step sees two views of each image, one of them smaller, and computes all four terms. It freezes the trunk up to
the features, as --method avc does with pretrained weights; `cam` is measured with that, and as it is by default. AVC is
measured without colours and with them.
Processor seconds of all threads (on a GPU the clock's), the least of the repeats after one to warm up; three classes,
random images. The ratio is the reference's time through AVC's: 0.5 means that AVC takes twice as long.
"""
import argparse
import time

from benchmarks.measure import Table, timed
from utils.runtime import keep_memory, run_main, wait_quietly


def steps_of(method, freeze, args, device, colour=0.0):
    """Function () -> nothing: a training step of a method.  colour: AVC's --avc_colour."""
    import torch

    from models.build import build_network
    from src import train
    from src.avc import TERMS, avc_loss, record_of
    from src.stepper import Stepper
    from src.task import Task, no_totals
    from utils.options import FLAGS
    torch.manual_seed(0)
    count = args.batch_size
    options = {"lr": 1e-3, "head_lr": 10.0, "momentum": 0.9, "weight_decay": 5e-4, "seed": 0, "accumulate": 1,
               "clip_grad": 0.0, "compile": False, "precision": args.precision, "batch_size": count, "epochs": 1,
               "avc_start": 0.0, "avc_colour": colour,
               **{f"avc_{name}": FLAGS[f"avc_{name}"].default or 1.0 for name in TERMS}}
    avc = method == "avc"
    network = build_network("classifier", "resnet50", classes=3, **(record_of(options) if avc else {}))
    network.freeze(freeze, "frozen").train()
    # Of a training of one step, the ramp is at its end from the second on: the first warms up.
    loss = avc_loss(options, count) if avc else train._classifier_loss(0.0)
    stepper = Stepper(Task(method, network, loss, None, count, None, None, no_totals), options, device)
    side = args.crop_size
    batch = {"image": torch.randn(count, 3, side, side), "index": torch.arange(count),
             "labels": torch.nn.functional.one_hot(torch.arange(count) % 3, 3)}
    return lambda: stepper.step(batch, (0, count, count), 0, 0.0)


def measure(step, device, repeats):
    """Least seconds of so many steps, after one to warm up."""
    import torch

    def finished():
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finished()
    return timed(finished, repeats, time.perf_counter if device.type == "cuda" else time.process_time)[0]


def main(argv=None):
    from utils.maps import snapped_size
    from utils.options import FLAGS, pick_device
    parser = argparse.ArgumentParser(prog="python -m benchmarks.avc_step", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop_size", type=FLAGS["crop_size"].type, default=257, help="pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=FLAGS["batch_size"].type, default=16, help="(default: %(default)s)")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"), help="(default: %(default)s)")
    parser.add_argument("--repeats", type=FLAGS["limit"].type, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.crop_size = snapped_size((args.crop_size,) * 2, 16)[0]
    wait_quietly()
    keep_memory()
    device = pick_device(args.device)
    table = Table()
    plain = {freeze: measure(steps_of("cam", freeze, args, device), device, args.repeats) for freeze in (2, 4)}
    for colour in (0.0, 0.5):
        seconds = measure(steps_of("avc", 4, args, device, colour), device, args.repeats)
        for freeze, reference in plain.items():
            table.add(f"--avc_colour {colour:g} / cam --freeze {freeze}", seconds, reference, None, None,
                      avc_over_cam=round(seconds / reference, 2))
    table.finish()


if __name__ == "__main__":
    run_main(main)
