"""One optimiser step on a batch, however it is divided: over processes, and in parts of --accumulate."""
import contextlib
import math
import warnings

import torch

from models.divided import Place, divide_dropout, synchronise_norms
from src.task import Part
from utils import distributed
from utils.errors import UserError

POLY_POWER = 0.9


class Stepper:
    """The network of a task, its optimiser, and what moves them on by one batch.

    All parts and processes together do what one process does with the whole batch: each loss is divided by what the
    whole batch holds (`Part`), gradients are summed, dropout draws for the whole batch and batch normalisation that
    learns takes the statistics of all processes' images, though those of one part.
    """

    def __init__(self, task, options, device):
        self.task, self.options, self.device = task, options, device
        self.network = task.network.to(device, memory_format=torch.channels_last).train()
        self.place = Place()
        if distributed.world() > 1 or options["accumulate"] > 1:
            divide_dropout(self.network, self.place)
        if distributed.world() > 1:
            synchronise_norms(self.network, device)
        self.optimizer = torch.optim.SGD(parameter_groups(self.network, options), lr=options["lr"],
                                         momentum=options["momentum"])
        if options["compile"]:
            self.network.trunk.compile()
        self.compute = _Loss(self.network, task.loss)
        if distributed.world() > 1:
            self.compute = _parallel(self.compute, task.idle)

    def step(self, batch, bounds, number, progress):
        """Move the weights by one step.

        batch: this process's slice, on the CPU.  bounds: (first, end, images) of it in the whole batch.  number: of the
        step, which decides the draws.  progress: share of the training that is done, which decides the rates.
        Returns {"loss", its terms, "grad_norm"} as numbers, of the whole batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - progress) ** POLY_POWER
        self.optimizer.zero_grad(set_to_none=True)
        rest = {name: value.to(self.device, non_blocking=True) for name, value in batch.items() if name != "image"}
        totals = distributed.total(self.task.totals(rest))
        edges = self._edges(bounds)
        batch = {**rest, "image": batch["image"]}
        found = [self._backward(batch, (low, high), bounds, totals, number, high == edges[-1])
                 for low, high in zip(edges, edges[1:])]
        terms = _added(found)
        if not all(map(math.isfinite, terms.values())):
            raise NotFinite(f"the loss is not finite at step {number} ({terms})")
        norm = self._clip()
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient is not finite at step {number} ({terms})")
        self.optimizer.step()
        return {**terms, "grad_norm": norm}

    def _edges(self, bounds):
        """Where the slice of this process is cut into parts: as many in each process, so that none waits in vain."""
        first, end, images = bounds
        parts = min(self.options["accumulate"], images // distributed.world())
        return [(end - first) * part // parts for part in range(parts + 1)]

    def _backward(self, batch, part, bounds, totals, number, last):
        """Add the gradient of one part; returns (names, values) of its share in the loss and the terms."""
        low, high = part
        self.place.start, self.place.images = bounds[0] + low, bounds[2]
        # Draws depend on (seed, step) alone, so that a resumed run draws the same, and so does every part.
        torch.manual_seed(self.options["seed"] * 1_000_003 + number)
        batch = {name: value[low:high] for name, value in batch.items()}
        image = batch["image"].to(self.device, non_blocking=True)
        batch["image"] = image.contiguous(memory_format=torch.channels_last)
        with contextlib.nullcontext() if last or distributed.world() == 1 else self.compute.no_sync():
            with autocast(self.device, self.options["precision"]):
                loss, terms = self._compiled(batch, Part(bounds[0] + low, high - low, bounds[2], totals))
            # DistributedDataParallel takes the mean over the processes, and the parts are to be summed.
            (loss * distributed.world() if distributed.world() > 1 else loss).backward()
        values = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in terms.values()]
        return ["loss", *terms], torch.stack([loss.detach().double(), *values])

    def _compiled(self, batch, part):
        if not self.options["compile"]:
            return self.compute(batch, part)
        try:
            return self.compute(batch, part)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--compile failed ({reason}); leave it out, or install what it needs, such as a C++ "
                            "compiler") from None

    def _clip(self):
        """The norm of the whole gradient, before it is clipped to --clip_grad (0: never)."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.options["clip_grad"]:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.options["clip_grad"], norm)
        return norm.item()


class NotFinite(Exception):
    """A loss or gradient that is not finite; says at which step and of which terms."""


class _Loss(torch.nn.Module):
    """A network and its loss as one module: DistributedDataParallel needs all uses of the network inside one call."""

    def __init__(self, network, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch, part):
        return self.loss(self.network, batch, part)


def _parallel(module, idle):
    """DistributedDataParallel without its copies of buffers: these are the same in all processes at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name for broadcast_buffers
        return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True,
                                                         find_unused_parameters=idle)


def _added(found):
    """{name: number}: the sum over the parts [(names, values)] of all processes."""
    names = found[0][0]
    values = found[0][1]
    for _, more in found[1:]:
        values = values + more
    return dict(zip(names, distributed.total(values).tolist()))


def parameter_groups(network, options):
    """Every parameter that learns, in exactly one of four groups: trunk or head, decayed weights or the rest.

    Heads learn `head_lr` times as fast; biases and batch normalisation are not decayed.
    """
    groups = []
    for is_head in (False, True):
        for decayed in (True, False):
            chosen = [p for name, p in network.named_parameters() if p.requires_grad
                      and name.startswith("trunk.") != is_head and (p.ndim > 1) == decayed]
            lr = options["lr"] * (options["head_lr"] if is_head else 1)
            groups.append({"params": chosen, "lr": lr, "initial_lr": lr,
                           "weight_decay": options["weight_decay"] if decayed else 0.0})
    return [group for group in groups if group["params"]]


def autocast(device, precision):
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
