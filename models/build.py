"""Networks as plain records, so that a checkpoint can say what it holds and be built again without its flags."""
import torch

from models.affinitynet import AffinityNet
from models.classifier import Classifier
from models.deeplab import DeepLab
from models.trunk import build_trunk
from utils.errors import UserError

KINDS = ("classifier", "affinity", "deeplab")


def build_network(kind, backbone, width=1.0, output_stride=16, dilated=True, classes=0, head="seamv1",
                  affinity_dims=0, affinity_steps=4, affinity_colour=0.0):
    """A network with random weights.

    kind: one of KINDS.  classes: foreground classes K (DeepLab adds the background itself).  head: DeepLab's, one of
    `models.deeplab.HEADS`.  affinity_*: of a classifier with AVC.  The rest: see `build_trunk`.
    """
    trunk = build_trunk(backbone, output_stride, width, dilated)
    if kind == "classifier":
        return Classifier(trunk, classes, affinity_dims=affinity_dims, affinity_steps=affinity_steps,
                          affinity_colour=affinity_colour)
    if kind == "affinity":
        return AffinityNet(trunk)
    if kind == "deeplab":
        # 12 cells of 8 pixels are the published field of view; on a coarser grid fewer cells see as far.
        return DeepLab(trunk, classes + 1, head, dilation=12 * 8 // trunk.stride)
    raise ValueError(f"unknown kind of network {kind!r}; choose from {', '.join(KINDS)}")


def pack(network, **how):
    """The record of a network: `how` to build it (the arguments of `build_network`), and its weights on the CPU."""
    return {**how, "state": {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}}


def unpack(record):
    """Build the network of a record from `pack`, in eval mode.

    Raises UserError, before any memory is taken, if the record's weights are not those of its network.
    """
    network, state = outline(record), record["state"]
    own = network.state_dict()
    wrong = [name for name in own if name not in state] + [name for name in state if name not in own]
    if wrong:
        raise UserError(f"the checkpoint's {record['kind']} has missing or unknown tensors ({len(wrong)}, such as "
                        f"{wrong[0]}); it is damaged or of another version: make it again")
    check_shapes(own, state, f"the checkpoint's {record['kind']}")
    network.to_empty(device="cpu").load_state_dict(state)
    return network.eval()


def outline(record):
    """The network of a record without any memory behind its tensors (PyTorch's meta device)."""
    try:
        with torch.device("meta"):
            return build_network(**{name: value for name, value in record.items() if name != "state"})
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the checkpoint's record of its {record.get('kind')} makes no network ({error}); it is "
                        "damaged: make it again") from None


def check_shapes(own, state, source):
    """UserError with the name of the first tensor of `state` whose shape is not that of the network's `own`."""
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: {name} is {tuple(tensor.shape)}, but the network has {tuple(own[name].shape)}; "
                            "pass weights of this backbone and width, or the --width they were made with")
