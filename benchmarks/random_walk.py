"""The random walk beside the published way of it: the dense N x N matrix, squared log2(t) times.

    python -m benchmarks.random_walk [--grids 47x63 94x125]

T^256, radius 5, three maps; affinities of random smooth features. At 94x125 the dense matrix takes 0.55 GB and the
reference minutes. A case each at the default eps, at 1e-5, and exact (eps 0).
"""
import torch
from torch.nn import functional as F

from benchmarks.measure import Parser, Table, extra_mb, timed
from models.affinitynet import Offset, affinity_stencil
from utils.random_walk import half_disc, random_walk, transition
from utils.runtime import run_main

STEPS, BETA, RADIUS, MAPS = 256, 8.0, 5, 3


def case(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, list[Offset]]:
    """(scores, stencil, offsets) on a grid of stride-8 or stride-4 cells of a photo."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 32, height // 6 + 2, width // 6 + 2, generator=generator)
    features = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
    scores = torch.rand(MAPS, height, width, generator=generator)
    offsets = half_disc(RADIUS)
    return scores / scores.sum(dim=0), affinity_stencil(features, offsets), offsets


def dense_walk(scores: torch.Tensor, stencil: torch.Tensor, offsets: list[Offset]) -> torch.Tensor:
    """T^256 by squaring the dense matrix eight times, as published code does."""
    matrix = transition(stencil, offsets, BETA).to_dense()
    for _ in range(STEPS.bit_length() - 1):
        matrix = matrix @ matrix
    return (matrix @ scores.flatten(1).T).T.reshape(scores.shape)


def main() -> None:
    parser = Parser("benchmarks.random_walk", __doc__)
    parser.add_argument("--grids", nargs="+", default=["47x63", "94x125"], metavar="HxW",
                        help="grids in cells (default: 47x63 94x125)")
    args = parser.parse_args()
    table = Table()
    for grid in args.grids:
        scores, stencil, offsets = case(*map(int, grid.split("x")))
        reference_seconds, expected = timed(lambda: dense_walk(scores, stencil, offsets), repeats=1)
        for eps in (1e-3, 1e-5, 0.0):
            def walk():
                return random_walk(scores, stencil, offsets, BETA, STEPS, eps)
            seconds, walked = timed(walk, repeats=7)
            error = (walked - expected).abs().max()
            table.add(f"random_walk_{grid}_eps{eps:g}", seconds, reference_seconds, extra_mb(walk), error)
    table.finish()


if __name__ == "__main__":
    run_main(main)
