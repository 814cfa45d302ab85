"""Networks as plain records, so that a checkpoint can say what it holds and be built again without its flags."""
from models.affinitynet import AffinityNet
from models.classifier import Classifier
from models.deeplab import DeepLab
from models.trunk import build_trunk

KINDS = ("classifier", "affinity", "deeplab")


def build_network(kind, backbone, width=1.0, output_stride=16, classes=0):
    """A network with random weights.

    kind: one of KINDS.  classes: foreground classes K (DeepLab adds the background itself).  See `build_trunk`.
    """
    trunk = build_trunk(backbone, output_stride, width)
    if kind == "classifier":
        return Classifier(trunk, classes)
    if kind == "affinity":
        return AffinityNet(trunk)
    if kind == "deeplab":
        # 12 cells of 8 pixels are the published field of view; on a coarser grid fewer cells see as far.
        return DeepLab(trunk, classes + 1, dilation=12 * 8 // trunk.stride)
    raise ValueError(f"unknown kind of network {kind!r}; choose from {', '.join(KINDS)}")


def pack(kind, network, backbone, width, output_stride, classes):
    """The record of a network: how to build it, and its weights on the CPU."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    return {"kind": kind, "backbone": backbone, "width": width, "output_stride": output_stride, "classes": classes,
            "state": state}


def unpack(record):
    """Build the network of a record from `pack`, in eval mode."""
    network = build_network(**{name: value for name, value in record.items() if name != "state"})
    network.load_state_dict(record["state"], strict=True)
    return network.eval()
