"""Weights from files: what a file is, its tensors in our names, and ours in published names."""
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from models.backbone import BackbonePlug, build_backbone, find_backbone
from models.weights.mxnet import is_params, read_params
from models.weights.published import LAYOUTS, Layout, from_mxnet, identify
from models.weights.records import Record, build_network, check_networks, check_shapes, outline, pack, unpack, upgrade
from utils import distributed
from utils.checkpoint import check_parts, check_step, is_checkpoint, read_tensors
from utils.errors import UserError
from utils.log import say

__all__ = ["Weights", "as_checkpoint", "build_network", "check_pretrained", "class_names", "describe", "export",
           "load_model", "load_pretrained", "open_weights", "pack", "summary", "translate", "unpack"]
STEPS = {"classifier": "stage1", "affinity": "stage2", "deeplab": "deeplab"}  # which step writes a kind of network
BUILT = {"dilated": True, "head": "seamv1", "output_stride": 16}  # what a record without these names was built with
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training code often puts the weights
COUNTER = "num_batches_tracked"  # of batch normalisation: old files lack it, and nothing reads it
State = dict[str, torch.Tensor]


@dataclass
class Weights:
    """What a file holds.

    title: what the file is, in words.  networks: kind -> record as in `models.weights.records`, in our names; without a
    head its kind is "backbone".  ignored: names of tensors that have no place in our network.  payload: the whole
    checkpoint if it is one of this project.
    """
    path: str
    title: str
    networks: dict[str, Record]
    ignored: list[str] = field(default_factory=list)
    payload: dict[str, object] | None = None


def open_weights(path: str | Path, backbone: str | None = None) -> Weights:
    """Read a file of weights of any known kind: see `models.weights.published.LAYOUTS`, MXNet's `.params`, and our own.

    backbone: name of one that no layout knows; a state dict with all of its tensors, by its own names, is read as its.
    Raises UserError for a file that is missing, damaged, none of these, or that holds more than tensors.
    """
    path = str(path)
    if Path(path).is_file() and is_params(path):
        state = {from_mxnet(name): torch.from_numpy(array) for name, array in read_params(path).items()}
        return translate(state, path, ", as MXNet .params")
    value = read_tensors(path)
    if is_checkpoint(value):
        check_parts(value, ("step", "networks"), path)
        check_networks(value, path)
        payload = upgrade(value)
        return Weights(path, f"checkpoint of this project, {payload['step']}", payload["networks"], payload=payload)
    state = _state_dict(value, path)
    if backbone not in (None, *(layout.backbone for layout in LAYOUTS)):
        own = find_backbone(backbone).own_names(state)
        if not _missing(_outline(backbone), own):
            return _bare(own, path, f"state dict of {backbone}", backbone)
    return translate(state, path)


def _state_dict(value: object, path: str) -> State:
    """The dict name -> tensor of a foreign file, unwrapped, without the prefix that DataParallel puts before names."""
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                                              for name, tensor in value.items()):
        raise UserError(f"{path} is not a dict of tensors; pass a state dict or a checkpoint of this project")
    return {name.removeprefix("module."): tensor for name, tensor in value.items()}


def _bare(state: State, path: str, title: str, backbone: str) -> Weights:
    """`Weights` of a state dict under a backbone's own names."""
    record = {"kind": "backbone", "backbone": backbone, "classes": 0,
              "state": {f"backbone.{name}": tensor for name, tensor in state.items()}}
    return Weights(path, title, {"backbone": record})


def translate(state: State, path: str, note: str = "") -> Weights:
    """`Weights` of a state dict under published names; UserError if they are of no known layout."""
    layout = identify(state)
    if layout is None:
        raise UserError(f"{path} is none of the known files of weights ({len(state)} tensors, such as "
                        f"{next(iter(state), 'none')}); pass one of these: "
                        f"{', '.join(layout.title for layout in LAYOUTS)}, MXNet's .params, one of this project")
    record, ignored = {"kind": layout.kind, "backbone": layout.backbone, **dict(layout.options), "state": {}}, []
    for name, tensor in state.items():
        ours = layout.ours(name)
        if ours is None:
            ignored.append(name)
        else:
            record["state"].setdefault(ours, tensor)
    if layout.backbone == "resnet38":
        record.update(output_stride=8, width=_rows(record, "backbone.bn7.weight", 4096) / 4096)
    if layout.background:
        record["state"]["head.weight"] = record["state"]["head.weight"][1:]
    if layout.kind == "classifier":
        record["seed"] = {"name": "cam"}
    last, above = {"classifier": ("head.weight", 0), "deeplab": ("head.cls_conv.weight", 1)}.get(layout.kind, (None, 0))
    record["classes"] = _rows(record, last, 0) - above
    return Weights(path, layout.title + note, {layout.kind: record}, ignored)


def _rows(record: Record, name: str | None, otherwise: int) -> int:
    """Length of a tensor of a record's state, or `otherwise` if it is not there."""
    tensor = record["state"].get(name)
    return otherwise if tensor is None or not tensor.ndim else len(tensor)


def load_pretrained(backbone: nn.Module, name: str, source: str) -> tuple[set[str], str]:
    """Load weights into a backbone.

    name: see `models.backbone.find_backbone`.  source: "none", "imagenet" (see `models.backbone.BackbonePlug`), or a
    file that `open_weights` knows; of a network with a head, its backbone is taken.  Parts may be missing, as `layer4`
    in a file that stops at `layer3`; they keep their random weights.
    Returns (names of the backbone's modules that were loaded, a table of what was loaded, missing and ignored).
    Raises UserError for the weights of another backbone or shape, and on every rank if one cannot get ImageNet's.
    """
    if source == "none":
        return set(), f"{name} starts from random weights"
    weights = _imagenet(name) if source == "imagenet" else open_weights(source, name)
    fitting, table = _match(weights, backbone.state_dict(), name)
    backbone.load_state_dict(fitting, strict=False)
    return {tensor.rsplit(".", 1)[0] for tensor in fitting}, table


def check_pretrained(source: str | None, backbone: str, width: float = 1.0) -> None:
    """UserError if `load_pretrained` would refuse this source, found out before any work; downloads are not tried."""
    if source == "imagenet":
        _plug(backbone)
    elif source != "none":
        _match(open_weights(source, backbone), _outline(backbone, width), backbone)


def _outline(backbone: str, width: float = 1.0) -> State:
    """The tensors of a backbone, without memory behind them."""
    with torch.device("meta"):
        return build_backbone(backbone, width=width).state_dict()


def _missing(own: Collection[str], found: Collection[str]) -> list[str]:
    """Names of a network's tensors that are not among those found, counters aside."""
    return [name for name in own if name not in found and not name.endswith(COUNTER)]


def _match(weights: Weights, own: Mapping[str, torch.Tensor], backbone: str) -> tuple[State, str]:
    """(tensors of a file's backbone that one with the tensors `own` has, table of loaded, missing and ignored)."""
    record = next(iter(weights.networks.values()))
    if record["backbone"] != backbone:
        raise UserError(f"{weights.path} holds weights of {record['backbone']} ({weights.title}), but the backbone is "
                        f"{backbone}; pass --backbone {record['backbone']} or another --pretrained")
    state = {name.removeprefix("backbone."): tensor for name, tensor in record["state"].items()
             if name.startswith("backbone.")}
    unknown = [name for name in state if name not in own]
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    check_shapes(own, fitting, weights.path)
    ignored = unknown + [name for name in record["state"] if not name.startswith("backbone.")] + weights.ignored
    title = f"{weights.path}: {weights.title}, into {backbone}"
    return fitting, _table(title, fitting, _missing(own, fitting), ignored)


def _imagenet(name: str) -> Weights:
    """The ImageNet weights of a backbone.  Rank 0 fetches them into the cache first; all ranks have them, or none."""
    plug, reason = _plug(name), None
    with distributed.main_first():
        try:
            address, state = plug.imagenet()
        except UserError as error:
            reason = str(error)
    reasons = [one for one in distributed.gather(reason) if one is not None]
    if reasons:
        raise UserError(reasons[0])
    return _bare(plug.own_names(state), address, "ImageNet weights", name)


def _plug(name: str) -> BackbonePlug:
    """A backbone whose ImageNet weights can be fetched; UserError for another."""
    plug = find_backbone(name)
    if plug.imagenet is None:
        raise UserError(f"no ImageNet weights of {name} can be fetched; pass --pretrained PATH{plug.hint} or "
                        "--pretrained none")
    return plug


def _table(title: str, loaded: Collection[str], missing: Collection[str], ignored: Collection[str]) -> str:
    rows = [("loaded", loaded), ("missing, stay random", missing), ("ignored", ignored)]
    lines = [f"  {len(names):>4} {what}: {summary(names)}" for what, names in rows if names]
    return "\n".join([title, *lines])


def summary(names: Collection[str], shown: int = 6) -> str:
    """The parts of a network that its tensors of these names lie in, in a few words."""
    groups = sorted({name.removeprefix("net.").split(".")[0] for name in names})  # net. is before timm's names
    return ", ".join(groups[:shown]) + (f", ... ({len(groups)} in all)" if len(groups) > shown else "")


def load_model(path: str | Path, steps: Sequence[str] | None) -> dict[str, object]:
    """A checkpoint of one of `steps` for --model_path: one of this project, or a published one, see `as_checkpoint`."""
    weights = open_weights(path)
    payload = as_checkpoint(weights)
    check_parts(payload, ("options", "classes"), path)
    check_step(payload, steps, path if weights.payload else f"{path} ({weights.title})")
    lacking = [kind for kind, step in STEPS.items()
               if steps is not None and step == payload["step"] and kind not in payload["networks"]]
    if lacking:
        raise UserError(f"checkpoint {path} of {payload['step']} holds no {lacking[0]}, but "
                        f"{', '.join(payload['networks'])}; it is damaged or cut down: make it again, or pass another")
    return payload


def as_checkpoint(weights: Weights) -> dict[str, object]:
    """The checkpoint in `weights`, or one made of a published network.

    That one has "options" {} and "classes" None, as its file names none; its network has all of ours' tensors, in
    float32.  What it is is printed.  Raises UserError if tensors are missing or of another shape.
    """
    if weights.payload is not None:
        return weights.payload
    (kind, record), = weights.networks.items()
    if kind == "backbone":
        raise UserError(f"{weights.path} is a {weights.title}, no trained network; pass it as --pretrained")
    complete = {**record, "state": _complete(record, weights)}
    return {"step": STEPS[kind], "options": {}, "classes": None, "networks": {kind: complete}}


def class_names(payload: Mapping[str, object]) -> list[str]:
    """Names of the classes of a checkpoint; of a published one, which has none, class_1, class_2, ..."""
    if payload["classes"] is not None:
        return list(payload["classes"])
    (record,) = payload["networks"].values()
    return [f"class_{number + 1}" for number in range(record["classes"])]


def _complete(record: Record, weights: Weights) -> State:
    """Every tensor of a record's network, in float32; counters that are missing start at 0."""
    own, path = outline(record).state_dict(), weights.path
    state = {name: tensor for name, tensor in record["state"].items() if name in own}
    missing = _missing(own, state)
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors of its network, such as {missing[0]}; it is incomplete: "
                        "fetch it again, or pass it as --pretrained")
    check_shapes(own, state, path)
    unknown = [name.removeprefix("backbone.") for name in record["state"] if name not in own]
    say(_table(f"{path}: {weights.title}", state, [], unknown + weights.ignored))
    return {name: state[name].to(own[name].dtype) if name in state else torch.zeros_like(own[name], device="cpu")
            for name in own}


def describe(weights: Weights) -> str:
    """What a file holds, in a few lines."""
    lines = [f"{weights.path}: {weights.title}"]
    for kind, record in weights.networks.items():
        learned = [tensor for name, tensor in record["state"].items() if tensor.is_floating_point()
                   and not name.endswith(("running_mean", "running_var"))]
        width = f", width {record['width']:g}" if record.get("width", 1.0) != 1.0 else ""
        classes = f", {record['classes']} classes" if record.get("classes") else ""  # AffinityNet's has none
        lines.append(f"  {kind} on {record['backbone']}{width}{classes}: {len(record['state'])} tensors, "
                     f"{sum(tensor.numel() for tensor in learned) / 1e6:.1f} M parameters")
    if weights.payload is not None and weights.payload.get("classes"):
        lines.append(f"  classes: {', '.join(weights.payload['classes'])}")
    if weights.ignored:
        lines.append(f"  {len(weights.ignored)} tensors without a place in our networks: {summary(weights.ignored)}")
    return "\n".join(lines)


def export(weights: Weights, family: str, kind: str | None = None) -> tuple[State, list[str]]:
    """(state dict of one network under the names of a published family, names of our tensors that have none there).

    kind: which network of a checkpoint with several; by default the one its step trained, which comes first.
    Raises UserError if the family has no such network.
    """
    kind = kind or next(iter(weights.networks))
    if kind not in weights.networks:
        raise UserError(f"{weights.path} holds no {kind}; it holds {', '.join(weights.networks)}")
    record = weights.networks[kind]
    fitting = [layout for layout in LAYOUTS if _same_network(layout, record)]
    layout = next((layout for layout in fitting if layout.family == family), None)
    if layout is None:
        raise UserError(f"no file of {family} holds a {kind} on {record['backbone']} built like this one; it can be "
                        f"exported as: {', '.join(dict.fromkeys(layout.family for layout in fitting)) or 'nothing'}")
    names = {name: layout.theirs(name) for name in record["state"]}
    state = {theirs: record["state"][name] for name, several in names.items() for theirs in several}
    return state, [name for name, several in names.items() if not several]


def _same_network(layout: Layout, record: Record) -> bool:
    """Whether a layout names the network of a record, or at least its backbone (torchvision has nothing else)."""
    if layout.background or layout.backbone != record["backbone"]:
        return False
    return layout.family == "torchvision" or (layout.kind == record["kind"] and not record.get("last") and all(
        record.get(name, BUILT[name]) == value for name, value in layout.options))
