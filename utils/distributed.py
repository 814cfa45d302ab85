"""Several processes of one script, as torchrun starts them: which of them this is, and how they agree.

Alone, a process is rank 0 of 1 and nothing here does anything, or loads torch: CRF workers import this.
"""
import contextlib
import datetime
import os
import sys

PATIENCE = datetime.timedelta(hours=12)  # the longest that one process may work while the others wait for it
_place = {"rank": 0, "world": 1, "local": 0}


def start():
    """Join the other processes if torchrun started this one.  All but rank 0 are silent from then on, errors aside."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return
    import torch
    from torch import distributed
    _place["local"] = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(_place["local"] % torch.cuda.device_count())
    # Numbers and Python objects go by gloo, the gradients of GPUs by nccl.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _place.update(rank=distributed.get_rank(), world=distributed.get_world_size())
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def stop():
    """Leave the group, once all have come here."""
    if world() > 1:
        from torch import distributed
        barrier()
        distributed.destroy_process_group()
        _place.update(rank=0, world=1)


def rank():
    """This process's number, from 0."""
    return _place["rank"]


def world():
    """How many processes there are."""
    return _place["world"]


def is_main():
    """Whether this process writes what there is one of: checkpoints, logs, manifests, tables."""
    return rank() == 0


def local_rank():
    """This process's number on its machine, which is that of its GPU."""
    return _place["local"]


def barrier():
    """Wait until all processes have come here."""
    gather(None)


def gather(value):
    """The values of all processes, in the order of their ranks.  value: anything that can be pickled."""
    if world() == 1:
        return [value]
    from torch import distributed
    values = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def agree(value):
    """Rank 0's value."""
    if world() == 1:
        return value
    from torch import distributed
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def merged(found, order):
    """The union of all processes' dicts.  order: a list of the keys there may be, in their order in the result."""
    if world() == 1:
        return found
    union = {key: value for part in gather(found) for key, value in part.items()}
    return {key: union[key] for key in order if key in union}


def total(tensor):
    """The sum of a tensor over all processes."""
    if world() == 1:
        return tensor
    from torch import distributed
    tensor = tensor.detach().clone()
    distributed.all_reduce(tensor)
    return tensor


def most(number):
    """The largest of all processes' whole numbers."""
    if world() == 1:
        return number
    import torch
    from torch import distributed
    box = torch.tensor(number)
    distributed.all_reduce(box, distributed.ReduceOp.MAX)
    return int(box)


def share(items):
    """The part of a list (anything sliced) that this process works on: every world-th, from its rank on."""
    return items[rank()::world()]


@contextlib.contextmanager
def main_first():
    """Rank 0 runs the block while the others wait, then they do: what it has put into a cache is there for them."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
