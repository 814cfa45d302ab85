"""A training step of DeepLabV1 on EfficientNet-Lite2 on the CPU, beside one with PyTorch's gradients of depthwise
convolutions.

    python -m benchmarks.depthwise [--batch_size 8] [--crop_size 256]

Output stride 16, random images. The error is the largest difference of the gradients of the first convolution over the
largest such gradient. bf16 only where the processor has units for it.
"""
from unittest import mock

import torch

from benchmarks.measure import Parser, Table, precisions, timed
from models import timm_nets
from models.backbone import Network
from models.weights import build_network
from utils.grids import snapped_size
from utils.runtime import keep_memory, run_main

BACKBONE = "efficientnet_lite2"


def main() -> None:
    parser = Parser("benchmarks.depthwise", __doc__)
    parser.flag("batch_size", 8, "images")
    parser.flag("crop_size", 256, "pixels a side")
    args = parser.parse_args()
    keep_memory()
    ours = build_network("deeplab", BACKBONE, classes=20).eval().to(memory_format=torch.channels_last)
    with mock.patch.object(timm_nets, "speed_up", lambda network: None):
        plain = build_network("deeplab", BACKBONE, classes=20).eval().to(memory_format=torch.channels_last)
    plain.load_state_dict(ours.state_dict())
    side = snapped_size((args.crop_size, args.crop_size), ours.backbone.stride)[0]
    images = torch.randn(args.batch_size, 3, side, side).contiguous(memory_format=torch.channels_last)

    def step(network: Network, half: bool) -> torch.Tensor:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = network(images)
        logits.float().square().mean().backward()
        return next(network.parameters()).grad

    table = Table()
    for name in precisions(torch.device("cpu")):
        step(ours, name == "bf16"), step(plain, name == "bf16")
        seconds, gradient = timed(lambda: step(ours, name == "bf16"))
        reference, expected = timed(lambda: step(plain, name == "bf16"))
        table.add(f"depthwise_deeplab_lite2_{name}", seconds, reference,
                  error=((gradient - expected).abs().max() / expected.abs().max()).item())
    table.finish()


if __name__ == "__main__":
    run_main(main)
