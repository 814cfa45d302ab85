"""The affinity loss, forward and backward, beside the published way of it: both pixels of every pair gathered by index.

    python -m benchmarks.affinity_loss [--batch_size 8]

Crop 448 (a 56x56 grid), 448 channels, radius 5. The gathered pairs of a batch of 8 take 8 to 9 GB. The
error is the largest difference of the gradients over the largest gradient.
"""
import torch

from benchmarks.measure import Parser, Table, extra_mb, timed
from models.affinitynet import EPS, WEIGHTS, Offset, affinity_loss
from utils.labels import IGNORE
from utils.random_walk import half_disc
from utils.runtime import run_main

GRID, CHANNELS, RADIUS = 56, 448, 5


def case(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, labels) of a batch: regions of background, two classes and ignored cells."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch_size, CHANNELS, GRID, GRID, generator=generator)
    kinds = torch.tensor([0, 0, 1, 2, IGNORE])
    regions = kinds[torch.randint(len(kinds), (batch_size, 7, 7), generator=generator)]
    return features, regions.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


def gather_loss(features: torch.Tensor, labels: torch.Tensor, offsets: list[Offset]) -> torch.Tensor:
    """The loss in the form of PSA's published code: index_select both ends of all pairs, then one mean a kind."""
    height, width = features.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    first, second = [], []
    for dy, dx in offsets:
        inside = (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        first.append((y * width + x)[inside])
        second.append(((y + dy) * width + x + dx)[inside])
    first, second = torch.cat(first), torch.cat(second)
    flat, marks = features.flatten(2), labels.flatten(1)
    affinity = torch.exp(-(flat.index_select(2, first) - flat.index_select(2, second)).abs().mean(dim=1))  # (B, pairs)
    one, other = marks[:, first], marks[:, second]
    valid, same = (one != IGNORE) & (other != IGNORE), one == other
    positive, negative = -torch.log(affinity + EPS), -torch.log(1 + EPS - affinity)
    kinds = (valid & same & (one == 0), positive), (valid & same & (one != 0), positive), (valid & ~same, negative)
    return sum(weight * (mask * value).sum() / mask.sum().clamp(min=1)
               for weight, (mask, value) in zip(WEIGHTS, kinds))


def main() -> None:
    parser = Parser("benchmarks.affinity_loss", __doc__)
    parser.flag("batch_size", 8, "images")
    args = parser.parse_args()
    features, labels = case(args.batch_size)
    offsets = half_disc(RADIUS)

    def step(loss):
        leaf = features.clone().requires_grad_()
        loss(leaf).backward()
        return leaf.grad

    def ours():
        return step(lambda leaf: affinity_loss(leaf, labels, offsets)[0])

    def plain():
        return step(lambda leaf: gather_loss(leaf, labels, offsets))

    seconds, gradient = timed(ours)
    memory, plain_memory = extra_mb(ours), extra_mb(plain)
    reference_seconds, expected = timed(plain)
    table = Table()
    table.add(f"affinity_loss_batch{args.batch_size}", seconds, reference_seconds, memory,
              (gradient - expected).abs().max() / expected.abs().max(), reference_extra_mb=plain_memory)
    table.finish()


if __name__ == "__main__":
    run_main(main)
