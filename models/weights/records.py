"""Networks as plain records, so that a checkpoint says what it holds and is built again without its flags."""
from collections.abc import Callable, Mapping

import torch
from torch import nn

from models.affinitynet import AffinityNet
from models.backbone import build_backbone
from models.classifier import Classifier
from models.deeplab import DeepLab
from utils.checkpoint import FORMAT
from utils.errors import UserError

KINDS = ("classifier", "affinity", "deeplab")
Record = dict[str, object]  # the arguments of `build_network`, "state", and perhaps "seed"
Attach = Callable[[nn.Module, dict], None]  # adds to a classifier the seed that record["seed"] describes


def build_network(kind: str, backbone: str, classes: int = 0, head: str = "seamv1", bias: bool = False,
                  last: str | None = None, **built: object) -> nn.Module:
    """A network with random weights.

    kind: one of KINDS.  classes: foreground classes K (DeepLab adds the background itself).  head: DeepLab's, one of
    `models.deeplab.HEADS`.  bias: of the classifier's head.  last: the stage that it reads.  built: how the backbone is
    built, see `models.backbone.build_backbone`.
    """
    features = build_backbone(backbone, **built)
    if kind == "classifier":
        return Classifier(features, classes, bias=bias, last=last)
    if kind == "affinity":
        return AffinityNet(features)
    if kind == "deeplab":
        # 12 cells of 8 pixels are the published field of view; on a coarser grid fewer cells see as far.
        return DeepLab(features, classes + 1, head, dilation=12 * 8 // features.stride)
    raise ValueError(f"unknown kind of network {kind!r}; choose from {', '.join(KINDS)}")


def pack(network: nn.Module, **how: object) -> Record:
    """The record of a network: `how` to build it, and its weights on the CPU.

    how: the arguments of `build_network`, and for a classifier with a seed "seed", plain values that describe it.
    """
    return {**how, "state": {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}}


def unpack(record: Record, attach: Attach | None = None) -> nn.Module:
    """Build the network of a record from `pack`, in eval mode.

    attach: called with the network and record["seed"], if there is one, to add the modules of the seed.
    Raises UserError, before any memory is taken, if the record's weights are not those of its network.
    """
    network, state = outline(record, attach), record["state"]
    own = network.state_dict()
    wrong = [name for name in own if name not in state] + [name for name in state if name not in own]
    if wrong:
        raise UserError(f"the checkpoint's {record['kind']} has missing or unknown tensors ({len(wrong)}, such as "
                        f"{wrong[0]}); it is damaged or of another version: make it again")
    check_shapes(own, state, f"the checkpoint's {record['kind']}")
    if any(name not in own for name, _ in network.named_buffers(remove_duplicate=False)):
        with torch.random.fork_rng(devices=[]):  # such buffers are in no file: only building gives them their values
            network = _build(record, attach)
    else:
        network.to_empty(device="cpu")
    network.load_state_dict(state)
    return network.eval()


def outline(record: Record, attach: Attach | None = None) -> nn.Module:
    """The network of a record without any memory behind its tensors (PyTorch's meta device).  attach: see `unpack`.

    Raises UserError if the record makes no network.
    """
    try:
        with torch.device("meta"):
            return _build(record, attach)
    except (UserError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's record of its {record.get('kind')} makes no network ({error}); register "
                        "what it names, or, if it is damaged, make it again") from None


def _build(record: Record, attach: Attach | None) -> nn.Module:
    network = build_network(**{name: value for name, value in record.items() if name not in ("state", "seed")})
    if attach is not None and "seed" in record:
        attach(network, record["seed"])
    return network


def check_shapes(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], source: str) -> None:
    """UserError with the name of the first tensor of `state` whose shape is not that of the network's `own`."""
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: {name} is {tuple(tensor.shape)}, but the network has {tuple(own[name].shape)}; "
                            "pass weights of this backbone and width, or the --width they were made with")


# What built a classifier's AVC head in records of format 1: the key there -> (the key in record["seed"], its default).
AVC_KEYS = {"affinity_dims": ("dims", 0), "affinity_steps": ("power", 4), "affinity_colour": ("colour", 0.0)}


def upgrade(payload: dict[str, object]) -> dict[str, object]:
    """A checkpoint of any format in the names of the newest; one that has them already is returned as it is.

    Of format 1, the networks are renamed.  Its training state (the optimizer's, the options) stays as it was, which no
    training of today can take up.
    """
    if payload["format"] == FORMAT:
        return payload
    networks = {kind: _upgraded(record) for kind, record in payload["networks"].items()}
    return {**payload, "format": FORMAT, "networks": networks}


def check_networks(payload: Mapping[str, object], path: str) -> None:
    """UserError unless the networks of a checkpoint, of any format, are records with what every record has."""
    networks = payload["networks"]
    for kind, record in networks.items():
        wrong = [name for name, its_type in (("kind", str), ("backbone", str), ("state", dict))
                 if not isinstance(record, dict) or not isinstance(record.get(name), its_type)]
        if wrong or not all(isinstance(tensor, torch.Tensor) for tensor in record["state"].values()):
            raise UserError(f"checkpoint {path} has no valid {', '.join(wrong) or 'tensors'} of its {kind}; it is "
                            "damaged or cut down: make it again, or pass another")
    if not networks:
        raise UserError(f"checkpoint {path} holds no network; it is damaged or cut down: make it again, or pass "
                        "another")


def _upgraded(record: Record) -> Record:
    how = {name: value for name, value in record.items() if name not in AVC_KEYS}
    prefixes = {"trunk.": "backbone."}
    if record["kind"] == "classifier":
        if record.get("affinity_dims"):
            seed = {"name": "avc", **{ours: record.get(key, default) for key, (ours, default) in AVC_KEYS.items()}}
            prefixes |= {"avc.": "seed.head.", "common.": None}
        elif record["state"].get("common.fitted", False):
            seed = {"name": "common"}
            prefixes |= {"common.fitted": None, "common.": "seed."}
        else:
            seed = {"name": "cam"}
            prefixes |= {"common.": None}
        how["seed"] = seed
    return {**how, "state": _renamed(record["state"], prefixes)}


def _renamed(state: Mapping[str, torch.Tensor], prefixes: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
    """Tensors with the first of the prefixes that fits a name replaced, or left out where it becomes None."""
    renamed = {}
    for name, tensor in state.items():
        old, new = next((pair for pair in prefixes.items() if name.startswith(pair[0])), ("", ""))
        if new is not None:
            renamed[new + name[len(old):]] = tensor
    return renamed
