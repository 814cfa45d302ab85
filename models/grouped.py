"""Convolutions in groups whose gradients PyTorch's CPU kernels compute slowly, or in bfloat16 wrongly.

Depthwise ones take most of the time of training an EfficientNet-Lite on a CPU. Forward they are fast, and with float32
in channels last the gradient of the weights is, so both gradients are put in these forms (benchmarks/depthwise.py).
"""
from functools import cache

import torch
from timm.layers import Conv2dSame, pad_same
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

Pair = tuple[int, int]


def speed_up(network: nn.Module) -> None:
    """Have the grouped convolutions of a network, depthwise ones among them, train by `_Convolution` on CPUs.

    Outputs, names and weights stay what they are.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            plain = type(module) in (nn.Conv2d, Conv2dSame) and module.padding_mode == "zeros"
            if plain and not isinstance(module.padding, str):
                module.__class__ = _derived(_Grouped, type(module))
            elif max(module.dilation) > 1:
                module.__class__ = _derived(_Float32, type(module))


@cache
def _derived(mixin: type, kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    return type(kind.__name__, (mixin, kind), {})


class _Grouped:
    """A grouped convolution with the gradients of `_Convolution`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        if isinstance(self, Conv2dSame):
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (None if part is None else part.to(torch.get_autocast_dtype("cpu"))
                               for part in (x, weight, bias))
        return _Convolution.apply(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _Convolution(torch.autograd.Function):
    """F.conv2d of a grouped convolution, with other formulas for the same gradients.

    - Of the input: the gradient of the output, convolved with the turned kernel, where no stride skips cells.
    - Of the weights: in float32 and channels last. oneDNN's bfloat16 gradient of the weights of a dilated grouped
      convolution is wrong by more than its own size for channels-last tensors (torch 2.14, AVX512-BF16 units).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Pair,
                padding: Pair, dilation: Pair, groups: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation, groups
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.geometry
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        margins = [step * (side - 1) - edge for step, side, edge in zip(dilation, weight.shape[2:], padding)]
        turned, grads = for_x and max(stride) == 1 and min(margins) >= 0, [None] * 3
        asked = (for_x and not turned, for_weight, for_bias)
        if any(asked):
            wide = [part.float().contiguous(memory_format=torch.channels_last) for part in (grad, x)]
            found = torch.ops.aten.convolution_backward(
                *wide, weight.float(), weight.shape[:1], stride, padding, dilation, False, (0, 0), groups, asked)
            grads = [None if part is None else part.to(x.dtype) for part in found]
        if turned:
            kernel = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            grads[0] = F.conv2d(grad, kernel, padding=margins, dilation=dilation, groups=groups)
        return (*grads, None, None, None, None)


class _Float32:
    """A convolution that trains in float32 on CPUs, whatever autocast says: for kinds that `_Convolution` cannot be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())
