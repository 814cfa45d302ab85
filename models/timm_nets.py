"""Any network of timm, convolutional or transformer, as a backbone: its own weights, names and pixel normalisation.

timm's `features_only` hides depths that a seed reads, and renames tensors. Here the whole network runs and hooks keep
the outputs of its blocks, so that published state dicts load as they are.
"""
from __future__ import annotations

import difflib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from models.grouped import speed_up
from utils.errors import UserError
from utils.transforms import IMAGENET, Normalise

# What models of timm take to keep a grid fine, or to accept images of any size; the first that one takes holds.
WAYS = ({"num_classes": 0, "output_stride": 0}, {"features_only": True, "output_stride": 0},
        {"num_classes": 0, "dynamic_img_size": True}, {"num_classes": 0, "strict_img_size": False}, {"num_classes": 0})
FINEST = 8  # pixels per cell of the finest depth that `depths` names by default
DEPTHS = 3  # at most, by default


class TimmNet(nn.Module):
    """A model of timm by its name, without classifier.

    name: as in `timm.list_models()`.  output_stride: 8 or 16, for models that can be dilated; others keep their own.
    dilated: whether convolutions after a stride that was taken out are dilated.
    stages: the last three feature maps of different stride, which timm names; of a network with one stride, the ends of
    its last three quarters.  depths: see `models.backbone.settle_depths`.
    Raises UserError for a model that gives no feature maps or takes images of one size only.
    """

    def __init__(self, name: str, output_stride: int = 16, dilated: bool = True, normalise: Normalise | None = None):
        super().__init__()
        self.net = _create(name, output_stride)
        if not dilated:
            _undilate(self.net)
        speed_up(self.net)
        listed, single = _listed_stages(self.net, name)
        self._blocks = _blocks(self.net, listed)
        _drop_rest(self.net, self._blocks[-1])
        self._layout = str(getattr(self.net, "output_fmt", "NCHW")).rsplit(".")[-1]
        self._prefix = getattr(self.net, "num_prefix_tokens", 0)
        strided = [conv for conv in self.net.modules() if isinstance(conv, nn.Conv2d) and max(conv.stride) > 1]
        # Even kernels that tile the image put a cell in the middle of its pixels; odd ones centre it on a pixel.
        self._patches = all(conv.kernel_size == conv.stride for conv in strided)
        self._strides, self.channels = self._probe(name)
        self.stride = self._strides[self._blocks[-1]]
        self.stages = tuple(listed[len(listed) * part // 4 - 1] for part in (2, 3, 4)) if single else tuple(listed[-3:])
        self.depths = tuple([block for block in self._blocks[:-1] if self._strides[block] >= FINEST][-DEPTHS:])
        config = self.net.pretrained_cfg
        self.normalise = normalise or Normalise(tuple(config.get("mean", IMAGENET.mean)),
                                                tuple(config.get("std", IMAGENET.std)))
        self._outputs, self._tapped = {}, set()
        self.tap((*self.stages, *self.depths))

    def tap(self, names: Iterable[str]) -> None:
        """Have `forward` return the outputs of these blocks too; names of no block are passed over."""
        for name in names:
            if name in self._blocks and name not in self._tapped:
                self._tapped.add(name)
                self.net.get_submodule(name).register_forward_hook(partial(_keep, self._outputs, name))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: (B, 3, H, W), normalised.  Returns {name: (B, channels, h, w)} of stages, depths and taps.

        Cells lie corners on corners on images of k * stride + 1 pixels. Networks of patches get the image with its edge
        repeated, half a patch on each side, and their finer maps are averaged so that cells meet (to half a pixel).
        """
        size = images.shape[-2:]
        if self._patches:
            whole = [((side - 1) // self.stride + 1) * self.stride for side in size]
            before, (down, right) = self.stride // 2, (new - side for new, side in zip(whole, size))
            images = _pad(images, before, right - before, down - before)
        self._run(images)
        outputs = self._outputs.pop(_thread())
        return {block: self._as_map(outputs[block], block, images.shape[-2:]) for block in self._blocks
                if block in outputs}

    def _run(self, images: torch.Tensor) -> None:
        getattr(self.net, "forward_features", self.net)(images)

    def _as_map(self, output: torch.Tensor, block: str, size: tuple[int, int]) -> torch.Tensor:
        if output.ndim == 3:  # tokens
            h, w = (side // self._strides[block] for side in size)
            output = output[:, self._prefix:].unflatten(1, (h, w)).permute(0, 3, 1, 2)
        elif self._layout == "NHWC":
            output = output.permute(0, 3, 1, 2)
        if self._patches and self._strides[block] < self.stride:
            output = F.avg_pool2d(output, self.stride // self._strides[block], stride=1)
        return output

    def _probe(self, name: str) -> tuple[dict[str, int], dict[str, int]]:
        """(pixels per cell, channels) of each block's output, found by an image without memory behind it."""
        side, outputs = 448, {}
        hooks = [self.net.get_submodule(block).register_forward_hook(partial(_keep, outputs, block))
                 for block in self._blocks]
        tensors = {key: tensor.to("meta") for key, tensor in (*self.net.named_parameters(), *self.net.named_buffers())}
        image, uses = torch.zeros(1, 3, side, 2 * side, device="meta"), _Uses(self.net)
        self.net.eval()
        try:
            with torch.no_grad(), uses:
                torch.func.functional_call(self.net, tensors, image)
        except Exception as error:  # whatever a model raises on a size that it was not made for
            raise UserError(f"timm's {name} does not take images of {side} x {2 * side} pixels ({error}); "
                            "pass another --backbone") from None
        finally:
            self.net.train()
            for hook in (*hooks, *uses.hooks):
                hook.remove()
        self._pairs = uses.pairs()
        strides, channels, outputs = {}, {}, outputs.get(_thread(), {})
        for block in self._blocks:
            output = outputs.get(block)
            if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4):
                raise UserError(f"{block} of timm's {name} gives no feature map; pass another --backbone")
            if output.ndim == 3:
                cells, channels[block] = output.shape[1] - self._prefix, output.shape[2]
                strides[block] = round((2 * side * side / cells) ** 0.5)
            else:
                height, channel = (1, 3) if self._layout == "NHWC" else (2, 1)
                strides[block], channels[block] = round(side / output.shape[height]), output.shape[channel]
            if side % strides[block]:
                raise UserError(f"{block} of timm's {name} has no regular grid of cells; pass another --backbone")
        return strides, channels

    def blocks(self) -> list[list[nn.Module]]:
        """Modules in order of depth: the stem, then each block with what leads to it."""
        groups, depth = [[] for _ in range(len(self._blocks) + 1)], 0
        bare = nn.ParameterList(self.net.parameters(recurse=False))  # class tokens, positions
        groups[0].extend([bare] if len(bare) else [])
        for name, module in self.net.named_modules():
            inside = [i for i, block in enumerate(self._blocks, 1) if f"{name}.".startswith(f"{block}.")]
            depth = inside[0] if inside else depth
            if name and any(True for _ in module.parameters(recurse=False)):
                groups[depth if inside or not depth else depth + 1].append(module)
        return [group for group in groups if group]

    def pairs(self) -> Iterator[tuple[nn.Module, str, str]]:
        """See `models.backbone.Backbone.pairs`: found while an image without memory went through the network."""
        for parent, conv, norm in self._pairs:
            yield self.net.get_submodule(parent), conv, norm


class _Uses(TorchDispatchMode):
    """Which convolutions' outputs are taken by one operation alone, and by which batch normalisation.

    Hooks see what modules take; what takes a tensor without being a module, such as a sum, is seen here.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.outputs, self.taken, self.counts = {}, {}, Counter()
        self.hooks = [module.register_forward_hook(partial(self._made, name)) if isinstance(module, nn.Conv2d) else
                      module.register_forward_pre_hook(partial(self._takes, name))
                      for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, _BatchNorm))]

    def _made(self, name: str, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self.outputs[id(output)] = (name, output)  # kept, so that its identity stays its own

    def _takes(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.taken[name] = self.outputs.get(id(inputs[0]), (None,))[0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts.update({id(arg) for arg in (*args, *(kwargs or {}).values())} & self.outputs.keys())
        return function(*args, **(kwargs or {}))

    def pairs(self) -> list[tuple[str, str, str]]:
        """(name of the parent, of the convolution in it, of the normalisation in it)."""
        alone = {name for key, (name, _) in self.outputs.items() if self.counts[key] == 1}
        split = [(*conv.rpartition(".")[::2], *norm.rpartition(".")[::2]) for norm, conv in self.taken.items()
                 if conv in alone]
        return [(parent, conv, norm) for parent, conv, other, norm in split if parent == other]


def is_known(name: str) -> bool:
    """Whether timm has a model of this name, with or without the tag of its weights."""
    return timm.is_model(name)


def similar(name: str) -> list[str]:
    """Names of timm's models that are spelled nearly so."""
    return difflib.get_close_matches(name, timm.list_models(), n=3)


def imagenet_weights(name: str) -> tuple[str, dict[str, torch.Tensor]] | None:
    """(address, state dict under timm's names) of a model's pretrained weights, downloaded or found in the cache.

    Raises UserError, with what to do instead, if they cannot be had.
    """
    config = timm.get_pretrained_cfg(name)
    address = f"{config.hf_hub_id or config.url} ({name}.{config.tag})"
    try:
        return address, timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the network, the hub or the disk, by many names
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot download the pretrained weights of {name} ({reason}); fetch {address} elsewhere and "
                        "pass --pretrained PATH, or pass --pretrained none") from None


def has_weights(name: str) -> bool:
    """Whether timm knows where pretrained weights of a model are."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.has_weights


def own_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under timm's names in those of `TimmNet`."""
    return {f"net.{name}": tensor for name, tensor in state.items()}


def _keep(outputs: dict[int, dict[str, torch.Tensor]], name: str, module: nn.Module, inputs: object,
          output: torch.Tensor) -> None:
    outputs.setdefault(_thread(), {})[name] = output


def _thread() -> int:
    """What tells the calling thread from others that run the network at the same time."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _create(name: str, output_stride: int) -> nn.Module:
    for way in WAYS:
        how = {key: output_stride if key == "output_stride" else value for key, value in way.items()}
        try:
            return timm.create_model(name, pretrained=False, **how)
        except (TypeError, AssertionError, NotImplementedError, AttributeError):
            continue
        except RuntimeError as error:
            raise UserError(f"timm cannot build {name}: {error}") from None
    raise UserError(f"timm's {name} cannot be built without its classifier; pass another --backbone")


def _listed_stages(net: nn.Module, name: str) -> tuple[list[str], bool]:
    """Names of the modules that timm lists as feature maps, shallow to deep, and whether all have one stride."""
    info = getattr(net, "feature_info", None)
    info = getattr(info, "info", info) or []
    listed, modules = [one["module"] for one in info], dict(net.named_modules())
    if len(listed) < 3 or not all(module in modules for module in listed[-3:]):
        raise UserError(f"timm's {name} names no three feature maps; pass another --backbone")
    return listed, len({one["reduction"] for one in info}) == 1


def _blocks(net: nn.Module, listed: list[str]) -> list[str]:
    """The last three listed modules, and all named like the last but for its number: blocks.0, blocks.1, ..."""
    pattern = re.compile(re.escape(listed[-1].rstrip("0123456789")) + r"\d+")
    return [name for name, _ in net.named_modules() if name in listed[-3:] or pattern.fullmatch(name)]


def _pad(images: torch.Tensor, before: int, right: int, down: int) -> torch.Tensor:
    """Repeat the edge: `before` pixels above and to the left, and cut or repeat on the other sides."""
    return F.pad(images, (before, right, before, down), mode="replicate")


def _drop_rest(net: nn.Module, last: str) -> None:
    """Let what comes after the last block do nothing: nobody reads it."""
    names = [name for name, _ in net.named_children()]
    for name in names[names.index(last.split(".")[0]) + 1:]:
        setattr(net, name, nn.Identity())


def _undilate(net: nn.Module) -> None:
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and max(conv.dilation) > 1:
            if not isinstance(conv.padding, str) and any(conv.padding):
                conv.padding = tuple(side // 2 for side in conv.kernel_size)
            conv.dilation = (1, 1)
