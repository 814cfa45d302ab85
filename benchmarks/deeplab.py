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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Table
from utils.runtime import keep_memory, wait_quietly

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 20


def plain(network):
    """The published layout of the seamv1 DeepLab on a ResNet38, with the weights of ours: function images -> logits.

    Dropout is left out, as its draws would differ between the two orders of memory: see `without_dropout`.
    """
    from torch.nn import functional as F
    trunk, head = network.trunk, network.head

    def block(module, x):
        activated = F.relu(module.bn_branch2a(x))
        branch = module.conv_branch2a(activated)
        branch = module.conv_branch2b1(F.relu(module.bn_branch2b1(branch)))
        if hasattr(module, "bn_branch2b2"):
            branch = module.conv_branch2b2(F.relu(module.bn_branch2b2(branch)))
        return branch + (module.conv_branch1(activated) if hasattr(module, "conv_branch1") else x)

    def forward(images):
        x = trunk.conv1a(images)
        for name, module in trunk.named_children():
            if name.startswith("b") and name != "bn7":
                x = block(module, x)
        x = F.relu(trunk.bn7(x))
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


def measure(ours, training, crop_size, repeats, out):
    """Run one side in this process; writes its outputs to `out` and prints {"seconds", "megabytes"}."""
    if ours:
        wait_quietly()
        keep_memory()
    import torch
    from torch.nn import functional as F

    from models.build import build_network
    from models.deeplab import segmentation_loss
    from models.fuse import for_inference
    torch.manual_seed(0)
    network = without_dropout(build_network("deeplab", "resnet38", classes=CLASSES))
    images = torch.randn(1, 3, crop_size, crop_size)
    target = torch.randint(0, CLASSES + 1, (1, crop_size, crop_size))
    if ours:
        order = torch.channels_last
        network, images = network.to(memory_format=order), images.contiguous(memory_format=order)
    seconds = []
    if training:
        forward = network.train() if ours else plain(network.train())
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        for _ in range(repeats):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            logits = forward(images)
            loss = segmentation_loss(logits, target) if ours else F.cross_entropy(logits, target, ignore_index=255)
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
            if len(seconds) == 1:
                result = [loss.detach(), network.head.cls_conv.weight.grad.clone()]
    else:
        network = for_inference(network.eval()) if ours else network.eval()
        forward = network if ours else plain(network)
        with torch.inference_mode():
            for _ in range(repeats):
                started = time.perf_counter()
                logits = forward(images)
                seconds.append(time.perf_counter() - started)
            if ours:
                logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)
        result = [logits]
    torch.save([tensor.contiguous() for tensor in result], out)
    print(json.dumps({"seconds": min(seconds), "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop_size", type=int, default=448, help="side of the image in pixels (default: 448)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is run (default: 3)")
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "WHAT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, what, out = args.measure
        return measure(side == "ours", what == "training", args.crop_size, args.repeats, out)
    import torch
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        for what in ("training", "inference"):
            row = {side: _run(side, what, f"{folder}/{side}.pt", args) for side in ("plain", "ours")}
            one, other = (torch.load(f"{folder}/{side}.pt", weights_only=True) for side in row)
            gaps = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other)]
            table.add(f"deeplab_{what}_{args.crop_size}", row["ours"]["seconds"], row["plain"]["seconds"], None, max(gaps),
                      **{f"{side}_peak_mb": round(cell["megabytes"]) for side, cell in row.items()})
    table.finish()
    return 0


def _run(side, what, out, args):
    command = [sys.executable, "-m", "benchmarks.deeplab", "--crop_size", str(args.crop_size), "--repeats",
               str(args.repeats), "--measure", side, what, out]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
