"""What a device makes of inference: CAMs, DeepLab, random walk and CRF beside the device's own rates.

    python -m benchmarks.device [--device auto] [--count 16] [--small] [--show]

Random weights and images of 500x375; reading and writing files do not count.  The reference of a network is its
floating-point operations, counted by torch.utils.flop_counter, at the rate of a large product of matrices in the same
precision; that of the walk and the CRF is the bytes of their sparse matrices, once for each product, at the rate of a
large copy.  Both are measured here.  So the ratio is the share of the device's rate that is used.  With --show the
operations that take the most time of each case follow, by torch.profiler.
"""
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Parser, Table, timed, waited
from benchmarks.random_walk import BETA, RADIUS, STEPS
from benchmarks.random_walk import case as walk_case
from benchmarks.train_throughput import matrix_rate
from models.weights import build_network, pack
from src.pipeline import DeepLabPipeline, Pipeline
from src.seeds import attach
from src.split_map import TOGETHER
from utils.config import Machine, MapConfig, WalkConfig
from utils.crf import PRESETS
from utils.crf.mean_field import bilateral, mean_field
from utils.crf.permutohedral import Lattice
from utils.options import pick_device
from utils.precision import settle_precision
from utils.random_walk import chebyshev, half_disc, random_walks, transition
from utils.runtime import run_main

SIZE, SMALL = (375, 500), (96, 128)


def photos(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Smooth noise, uint8 (H, W, 3): as many different colours as photos have."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, size[0] // 24, size[1] // 24)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255)
    noise = torch.from_numpy(rng.normal(0, 6, (count, 3, *size)).astype(np.float32))
    return list((smooth + noise).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(waited(lambda: target.copy_(source), device), 10)[0]


def cam_case(method: str, images: list[np.ndarray], machine: Machine) -> tuple[Callable, int]:
    """(CAMs of all images, four scales and flips, images)."""
    torch.manual_seed(0)
    how = {"kind": "classifier", "backbone": "resnet50", "classes": 20}
    network = build_network(**how)
    attach(network, {"name": method})
    payload = {"networks": {"classifier": pack(network, **how, seed={"name": method})}, "classes": list(range(20))}
    pipeline = Pipeline(payload, MapConfig((0.5, 1.0, 1.5, 2.0)), WalkConfig(), machine)
    views = [pipeline.cam_views()(image) for image in images]
    keys, at_once = [np.array([3])] * len(images), TOGETHER[machine.device.type]

    def run() -> None:
        for first in range(0, len(images), at_once):
            part = slice(first, first + at_once)
            pipeline.cams(views[part], [image.shape[:2] for image in images[part]], keys[part])
    return run, len(images)


def deeplab_case(images: list[np.ndarray], machine: Machine) -> tuple[Callable, int]:
    """(DeepLabV1-ResNet38's maps of a few images, five scales and flips, images)."""
    torch.manual_seed(0)
    how = {"kind": "deeplab", "backbone": "resnet38", "classes": 20}
    payload = {"networks": {"deeplab": pack(build_network(**how), **how)}, "classes": list(range(20))}
    pipeline = DeepLabPipeline(payload, MapConfig((0.5, 0.75, 1.0, 1.25, 1.5)), "mean", machine)
    few = images[:4 if machine.device.type == "cuda" else 1]
    views = [pipeline.views()(image) for image in few]
    grid = tuple(-(-side // 8) for side in few[0].shape[:2])
    return lambda: [pipeline.merged(own, grid) for own in views], len(few)


def operations(call: Callable) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def walk(count: int, size: tuple[int, int], device: torch.device) -> tuple[Callable, int]:
    """(walks of so many images at once, bytes of their matrices over all products)."""
    scores, stencil, offsets = walk_case(*(side // 8 for side in size))
    scores, stencil = [scores.to(device)] * count, [stencil.to(device)] * count
    matrix = transition(stencil[0], offsets, BETA)
    once = matrix.values().nbytes + matrix.col_indices().nbytes
    return (lambda: random_walks(scores, stencil, half_disc(RADIUS), BETA, STEPS),
            once * count * (len(chebyshev(STEPS, 1e-3)) - 1))


def crf(images: list[np.ndarray], device: torch.device, at_once: int) -> tuple[Callable, int]:
    """(mean fields of all images, `at_once` at a time, with two classes; bytes of the bilateral lattices over all
    iterations)."""
    params = PRESETS["irn"]
    rng = np.random.default_rng(0)
    scores = [rng.random((2, *image.shape[:2]), np.float32) + 0.1 for image in images]
    energies = [-np.log(one / one.sum(axis=0))[None] for one in scores]
    shape = params.bilateral_sxy, params.bilateral_srgb, params.bilateral_compat
    total = sum(lattice_bytes(bilateral([image], *shape, str(device)).lattice) for image in images)

    def run() -> None:
        for first in range(0, len(images), at_once):
            part = slice(first, first + at_once)
            mean_field(images[part], energies[part], params, str(device))
    return run, total * (params.iterations + 2)  # the normalisation filters twice


def lattice_bytes(lattice: Lattice) -> int:
    """Bytes of the matrices and neighbours that one filtering reads."""
    matrices = [one.tensor for one in (lattice.splat, lattice.slice)]
    return sum(one.values().nbytes + one.col_indices().nbytes for one in matrices) \
        + sum(one.nbytes for one in lattice.neighbours)


def slowest(call: Callable, device: torch.device) -> str:
    """A table of the operations that take the most time of a call."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        call()
    return profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=8)


def main() -> None:
    parser = Parser("benchmarks.device", __doc__)
    parser.flag("device", "auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")
    parser.add_argument("--count", type=int, help="images (default: 64, 2 on a CPU)")
    parser.add_argument("--small", action="store_true", help="images of 128x96")
    parser.add_argument("--show", action="store_true", help="the slowest operations of each case too")
    args = parser.parse_args()
    device = pick_device(args.device)
    machine = Machine(device, settle_precision("auto", device))
    images = photos(args.count or (64 if device.type == "cuda" else 2), SMALL if args.small else SIZE)
    flops, bandwidth = matrix_rate(device, machine.precision), copy_rate(device)
    print(f"{device}, {machine.precision}: {flops / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    table = Table()

    def add(name: str, call: Callable, count: int, least: float) -> None:
        call = waited(call, device)
        call()  # to warm up
        seconds, _ = timed(call, 3)
        table.add(name, seconds, least, images_per_second=round(count / seconds, 2), device=str(device),
                  precision=machine.precision)
        if args.show:
            print(slowest(call, device))
    for name, (call, count) in {"cam_resnet50": cam_case("cam", images, machine),
                                "mixture_resnet50": cam_case("mixture", images, machine),
                                "deeplab_resnet38": deeplab_case(images, machine)}.items():
        add(name, call, count, operations(call) / flops)
    call, moved = walk(len(images), images[0].shape[:2], device)
    add("walk", call, len(images), moved / bandwidth)
    for at_once in (1, 8):
        call, moved = crf(images, device, at_once)
        add(f"crf_{at_once}_at_once", call, len(images), moved / bandwidth)
    table.finish()


if __name__ == "__main__":
    run_main(main)
