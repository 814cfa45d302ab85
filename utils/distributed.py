"""Several processes of one script, as torchrun starts them: this process's rank, and collective operations.

A single process is rank 0 of world size 1; then collectives return their argument, and torch is not imported: CRF
workers import this file. All ranks must call a collective (gather, broadcast, all_reduce, ...) in the same order.
"""
from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(hours=12)  # that a rank waits for the others in a collective: rank 0 may work long alone
_place = {"rank": 0, "world": 1, "local": 0}


def start() -> None:
    """Join the process group if torchrun started this process.  Ranks above 0 print nothing but errors from then on."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return
    import torch
    from torch import distributed
    _place["local"] = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(_place["local"] % torch.cuda.device_count())
    # Numbers and Python objects are exchanged by gloo, gradients on GPUs by NCCL.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    _place.update(rank=distributed.get_rank(), world=distributed.get_world_size())
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def stop() -> None:
    """Leave the process group, after a barrier."""
    if world() > 1:
        from torch import distributed
        barrier()
        distributed.destroy_process_group()
        _place.update(rank=0, world=1)


def rank() -> int:
    """Number of this process, from 0."""
    return _place["rank"]


def world() -> int:
    """World size: the number of processes."""
    return _place["world"]


def is_main() -> bool:
    """Whether this is rank 0, which writes checkpoints, logs, manifests and tables."""
    return rank() == 0


def local_rank() -> int:
    """Number of this process on its machine, and of its GPU."""
    return _place["local"]


def barrier() -> None:
    """Wait until all ranks have called this."""
    gather(None)


def gather(value: Value) -> list[Value]:
    """The values of all ranks, in their order.  value: anything that can be pickled."""
    if world() == 1:
        return [value]
    from torch import distributed
    values = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """Rank 0's value.  value: anything that can be pickled."""
    if world() == 1:
        return value
    from torch import distributed
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_dict(part: dict[str, Value], order: Iterable[str]) -> dict[str, Value]:
    """The union of all ranks' dicts.  order: the keys that may occur, in their order in the result."""
    if world() == 1:
        return part
    union = {key: value for part in gather(part) for key, value in part.items()}
    return {key: union[key] for key in order if key in union}


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, without gradient."""
    if world() == 1:
        return tensor
    from torch import distributed
    tensor = tensor.detach().clone()
    distributed.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' integers."""
    if world() == 1:
        return number
    import torch
    from torch import distributed
    box = torch.tensor(number)
    distributed.all_reduce(box, distributed.ReduceOp.MAX)
    return int(box)


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors, in place, with rank 0's."""
    if world() > 1:
        from torch import distributed
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def shard(items: Sequence[Value]) -> Sequence[Value]:
    """This rank's part of a sequence: every world()-th item, beginning with item rank()."""
    return items[rank()::world()]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait, then they run it: they find what rank 0 put into a cache."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
