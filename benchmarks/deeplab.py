"""Full-width DeepLabV1-ResNet38: one training step and one inference, ours beside a plain network of the same layout.

    python -m benchmarks.deeplab [--crop_size 448] [--repeats 3]

The plain one is the published layout written down: its logits enlarged to the image inside the network, every
normalisation and ReLU a step of its own, tensors in PyTorch's default order, memory from glibc's defaults.  Both have
the same weights, see the same image and are measured in turn, each in a process of its own; batch normalisation uses
the batch's statistics in the training step, as published.  Prints seconds (the least of the repeats), peak memory, the
ratio, and the largest difference of outputs and gradients, relative to the largest value.  Gradients are compared where
the backward pass begins: further down both drift from float64 by as much as from each other.
"""
import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Callable

from benchmarks.measure import Parser, Table, in_process, timed
from utils.runtime import keep_memory, wait_quietly

CLASSES = 20


def plain(network) -> Callable:
    """The published layout of the seamv1 DeepLab on a ResNet38, with the weights of ours: function images -> logits.

    Dropout is left out, as its draws would differ between the two memory formats: see `without_dropout`.
    """
    from torch.nn import functional as F
    backbone, head = network.backbone, network.head

    def block(module, x):
        activated = F.relu(module.bn_branch2a(x))
        branch = module.conv_branch2a(activated)
        branch = module.conv_branch2b1(F.relu(module.bn_branch2b1(branch)))
        if hasattr(module, "bn_branch2b2"):
            branch = module.conv_branch2b2(F.relu(module.bn_branch2b2(branch)))
        return branch + (module.conv_branch1(activated) if hasattr(module, "conv_branch1") else x)

    def forward(images):
        x = backbone.conv1a(images)
        for name, module in backbone.named_children():
            if name.startswith("b") and name != "bn7":
                x = block(module, x)
        x = F.relu(backbone.bn7(x))
        x = F.relu(head.bn_fov(head.conv_fov(x)))
        x = F.relu(head.bn_fov2(head.conv_fov2(x)))
        x = head.cls_conv(x)
        return F.interpolate(x, images.shape[-2:], mode="bilinear", align_corners=True)
    return forward


def without_dropout(network):
    """A network whose dropout keeps everything."""
    for name, module in network.named_modules():
        if "dropout" in name:
            module.p = 0.0
    return network


def measure(ours: bool, training: bool, crop_size: int, repeats: int, out: str) -> None:
    """Run one side in this process; writes its outputs to `out` and prints {"seconds", "megabytes"}."""
    if ours:
        wait_quietly()
        keep_memory()
    import torch
    from torch.nn import functional as F

    from models.backbone import for_inference, training_format
    from models.deeplab import segmentation_loss
    from models.weights import build_network
    torch.manual_seed(0)
    network = without_dropout(build_network("deeplab", "resnet38", classes=CLASSES))
    images = torch.randn(1, 3, crop_size, crop_size)
    target = torch.randint(0, CLASSES + 1, (1, crop_size, crop_size))
    if ours:
        order = training_format(network, images.device, "fp32") if training else torch.channels_last
        network, images = network.to(memory_format=order), images.contiguous(memory_format=order)
    network = network.train() if training else network.eval()
    network = for_inference(network) if ours and not training else network
    forward = network if ours else plain(network)
    if training:
        # At a rate of 0 every repeat is the first step.
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits = forward(images)
        loss = segmentation_loss(logits, target) if ours else F.cross_entropy(logits, target, ignore_index=255)
        loss.backward()
        optimizer.step()
        return [loss.detach(), network.head.cls_conv.weight.grad]

    with torch.inference_mode(not training):
        seconds, result = timed(step if training else lambda: [forward(images)], repeats)
        if ours and not training:
            result = [F.interpolate(result[0], images.shape[-2:], mode="bilinear", align_corners=True)]
    torch.save([tensor.contiguous() for tensor in result], out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "megabytes": peak}))


def main() -> int:
    parser = Parser("benchmarks.deeplab", __doc__)
    parser.flag("crop_size", 448, "side of the image in pixels")
    parser.flag("repeats", 3, "how often each is run", like="limit")
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "WHAT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, what, out = args.measure
        measure(side == "ours", what == "training", args.crop_size, args.repeats, out)
        return 0
    import torch
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        for what in ("training", "inference"):
            row = {side: in_process("benchmarks.deeplab", "--crop_size", args.crop_size, "--repeats", args.repeats,
                                    "--measure", side, what, f"{folder}/{side}.pt") for side in ("plain", "ours")}
            one, other = (torch.load(f"{folder}/{side}.pt", weights_only=True) for side in row)
            gaps = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other)]
            table.add(f"deeplab_{what}_{args.crop_size}", row["ours"]["seconds"], row["plain"]["seconds"], None,
                      max(gaps), **{f"{side}_peak_mb": round(cell["megabytes"]) for side, cell in row.items()})
    table.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
