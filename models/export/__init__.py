"""ONNX of a DeepLab, or of a classifier with its CAM and, where its seed has them for one view, its class maps."""
from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from models.classifier import Classifier
from models.deeplab import DeepLab
from utils.errors import UserError
from utils.grids import Size, snapped_size

OPSET = 17
TOLERANCE = 1e-4  # of the range of an output, between PyTorch and onnxruntime
# Images of free size are traced at the first, whose grids are finer than any that a seed caps, and compared at both.
SIZES = ((561, 593), (257, 321))
PACKAGES = ("onnx", "onnxruntime")


class DeepLabGraph(nn.Module):
    """image (B, 3, H, W), normalised -> logits (B, K + 1, h, w), background first."""
    inputs, outputs = ("image",), ("logits",)

    def __init__(self, network: DeepLab):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network(image),)


class ClassifierGraph(nn.Module):
    """image (B, 3, H, W), normalised -> logits (B, K), and cam (B, K, h, w) before ReLU, of which they are the mean.

    With a seed that has `view_maps`, unless `maps` is False, also labels (B, K), 1 for each class that an image shows
    -> maps (B, K, h, w) in [0, 1], 0 for other classes.  A row of zeros stands for the classes that the logits predict:
    those above 0, the highest at least.
    """

    def __init__(self, network: Classifier, maps: bool = True):
        super().__init__()
        self.network = network
        self.mapped = maps and hasattr(getattr(network, "seed", None), "view_maps")
        self.inputs = ("image", "labels") if self.mapped else ("image",)
        self.outputs = ("logits", "cam", "maps") if self.mapped else ("logits", "cam")

    def forward(self, image: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        features = self.network.backbone(image)
        cam = self.network.cam(features)
        logits = cam.mean(dim=(2, 3))
        if not self.mapped:
            return logits, cam
        predicted = (logits > 0) | (logits == logits.amax(dim=1, keepdim=True))
        known = labels.sum(dim=1, keepdim=True) > 0
        shown = (known & (labels > 0)) | (~known & predicted)  # onnxruntime has no torch.where of truth values
        return logits, cam, self.network.seed.view_maps(self.network, features, cam, image, shown)


Graph = DeepLabGraph | ClassifierGraph


def graph_of(network: nn.Module, maps: bool = True) -> Graph:
    """The graph of a network, ready for inference.  maps: whether a seed's maps are among its outputs."""
    return (DeepLabGraph(network) if isinstance(network, DeepLab) else ClassifierGraph(network, maps)).eval()


def packages() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime; UserError with the command that installs them if they are not there."""
    try:
        return tuple(importlib.import_module(name) for name in PACKAGES)
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs {' and '.join(PACKAGES)} ({error}); run: pip install "
                        f"{' '.join(PACKAGES)}") from None


def write_onnx(path: Path, graph: Graph, size: Size | None) -> None:
    """Trace a graph into an ONNX file.

    size: (H, W) of its images; None: any size, and any number of images at once.
    Raises UserError for a network that ONNX has no operations for.
    """
    axes = None if size else {name: {0: "batch"} for name in (*graph.inputs, *graph.outputs)}
    if axes:
        axes["image"].update({2: "height", 3: "width"})
        for name in graph.outputs:
            if name in ("cam", "maps") or isinstance(graph, DeepLabGraph):
                axes[name].update({2: "rows", 3: "columns"})
    count = 1 if size else 2
    # The exporter by tracing: it takes one second where the one by torch.export takes a quarter of a minute, needs one
    # package less, and runs the hooks by which networks of timm hand out their maps.
    try:
        with torch.no_grad(), warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            torch.onnx.export(graph, sample(graph, count, size or SIZES[0]), str(path), opset_version=OPSET,
                              input_names=list(graph.inputs), output_names=list(graph.outputs), dynamic_axes=axes,
                              dynamo=False)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the network cannot be exported to ONNX ({str(error).splitlines()[0]}); export one of another "
                        "backbone") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Print nothing to the terminal: of a network that it cannot export, PyTorch's C++ prints every operation."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def sample(graph: Graph, count: int, size: Size) -> tuple[torch.Tensor, ...]:
    """Random inputs of a graph, always the same; the first image is given its labels."""
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
    if len(graph.inputs) == 1:
        return (images,)
    labels = torch.zeros(count, graph.network.head.out_channels)
    labels[0, ::2] = 1
    return images, labels


@torch.no_grad()
def largest_gap(path: Path, graph: Graph, size: Size, count: int = 2) -> float:
    """The largest difference between onnxruntime and PyTorch, as a part of the range of the output it is in.

    UserError if onnxruntime cannot run the file.
    """
    _, runtime = packages()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    values = sample(graph, count, size)
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run(list(graph.outputs), {name: value.numpy() for name, value in zip(graph.inputs, values)})
    except Exception as error:  # its errors have no common class
        raise UserError(f"onnxruntime {runtime.__version__} cannot run the exported network ({error}); export one of "
                        "another backbone") from None
    expected = [output.numpy() for output in graph(*values)]
    return max(float(np.abs(ours - theirs).max() / max(np.ptp(ours), 1e-12)) for ours, theirs in zip(expected, found))


def compared_sizes(size: Size | None, stride: int) -> Sequence[Size]:
    """At which sizes of images an exported file is compared with PyTorch."""
    return (size,) if size else tuple(snapped_size(one, stride) for one in SIZES)
