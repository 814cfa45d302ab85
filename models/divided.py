"""Networks whose batch is computed in parts, in several processes or one after the other, to the result of the whole.

Two kinds of layer look at more than one image: dropout, whose draws for a batch are one stream of random numbers, and
batch normalisation that learns, whose statistics are of the whole batch.
"""
import torch
from torch import nn

from utils import distributed


class Place:
    """Where a part stands in its batch.  start: of its first image.  images: in the whole batch."""

    def __init__(self):
        self.start, self.images = 0, 0


class PartDropout(nn.Module):
    """Dropout that draws for the whole batch and keeps what falls to its part, so that the parts add up to the batch.

    dropout: the layer it stands for.  place: a `Place`, shared by all layers and moved by the training loop, which also
    seeds torch's generator anew for every part.
    """

    def __init__(self, dropout, place):
        super().__init__()
        self.dropout, self.place = dropout, place

    @torch.compiler.disable  # the place would be compiled in as a constant, again for every part
    def forward(self, x):
        """x: (B, ...) of the part.  Returns the same shape and dtype."""
        if not self.training or not self.dropout.p:
            return x
        order = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) \
            else torch.contiguous_format
        ones = torch.ones((self.place.images, *x.shape[1:]), dtype=x.dtype, device=x.device)
        drawn = self.dropout(ones.contiguous(memory_format=order))
        return x * drawn[self.place.start:self.place.start + len(x)]


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient, as each process's loss depends on every summand."""

    @staticmethod
    def forward(ctx, tensor):
        return distributed.total(tensor)

    @staticmethod
    def backward(ctx, grad):
        return distributed.total(grad)


class SyncNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes' images, on any device.

    PyTorch's own SyncBatchNorm, which is faster, runs on GPUs only: this one is for CPUs.
    """

    def forward(self, x):
        """x: (B, C, H, W) of this process.  Returns the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        pixels = values.new_full((1,), len(x) * x.shape[2] * x.shape[3])
        found = SumOverProcesses.apply(torch.cat([values.sum(dim=(0, 2, 3)), pixels]))
        count = found[-1].detach()
        mean = found[:-1] / count
        values = values - mean[:, None, None]
        variance = SumOverProcesses.apply((values ** 2).sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked += 1
        scale = (variance + self.eps).rsqrt() * self.weight
        return (values * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def divide_dropout(network, place):
    """Replace every dropout of a network, in place, by one that knows its part of the batch."""
    for module, name, layer in _layers(network, (nn.Dropout, nn.Dropout2d)):
        setattr(module, name, PartDropout(layer, place))


def synchronise_norms(network, device):
    """Replace, in place, batch normalisation that learns by one whose statistics are those of all processes.

    The network is in training mode: frozen layers, which stay as they are, are in eval mode.  Their names and tensors
    do not change.  Returns how many were replaced.
    """
    learning = [found for found in _layers(network, (nn.BatchNorm2d,)) if found[2].training]
    for module, name, layer in learning:
        synced = SyncNorm(layer.num_features, layer.eps, layer.momentum)
        if device.type == "cuda":
            synced = nn.SyncBatchNorm(layer.num_features, layer.eps, layer.momentum)
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(synced, part, getattr(layer, part))
        setattr(module, name, synced)
    return len(learning)


def _layers(network, kinds):
    """(module, name, layer) of every layer of some kinds and the module that holds it."""
    return [(module, name, layer) for module in network.modules() for name, layer in module.named_children()
            if isinstance(layer, kinds)]
