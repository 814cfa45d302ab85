"""Weights from files: what a file is, its tensors in our names, and ours in published names.

    python -m models.weights FILE                       say what it is
    python -m models.weights FILE --export psa OUT      write it under published names
"""
import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch.hub import load_state_dict_from_url

from models.build import check_shapes, outline
from models.published import EXPORTS, LAYOUTS, from_mxnet, identify
from models.trunk import build_trunk
from utils.checkpoint import check_step, is_checkpoint, read_tensors, save_tensors
from utils.errors import UserError
from utils.mxnet_params import is_params, read_params
from utils.runtime import run_main

STEPS = {"classifier": "stage1", "affinity": "stage2", "deeplab": "deeplab"}  # which step writes a kind of network
BUILT = {"dilated": True, "head": "seamv1", "output_stride": 16}  # what a record without these names was built with
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training code often puts the weights


@dataclass
class Weights:
    """What a file holds.

    title: what the file is, in words.  networks: kind -> record as in `models.build`, names in ours; a published trunk
    without a head is a record of kind "trunk".  ignored: names of tensors that have no place in our network.
    payload: the whole checkpoint if it is one of this project.
    """
    path: str
    title: str
    networks: dict
    ignored: list = field(default_factory=list)
    payload: dict = None


def open_weights(path):
    """Read a file of weights of any known kind: see `models.published.LAYOUTS`, MXNet's `.params`, and our own.

    Raises UserError for a file that is missing, damaged, none of these, or that holds more than tensors.
    """
    if Path(path).is_file() and is_params(path):
        state = {from_mxnet(name): torch.from_numpy(array) for name, array in read_params(path).items()}
        return translate(state, path, ", as MXNet .params")
    value = read_tensors(path)
    if is_checkpoint(value):
        return Weights(path, f"checkpoint of this project, {value['step']}", value["networks"], payload=value)
    return translate(_state_dict(value, path), path)


def _state_dict(value, path):
    """The dict name -> tensor of a foreign file, unwrapped, without the prefix that DataParallel puts before names."""
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                                              for name, tensor in value.items()):
        raise UserError(f"{path} is not a dict of tensors; pass a state dict or a checkpoint of this project")
    return {name.removeprefix("module."): tensor for name, tensor in value.items()}


def translate(state, path, note=""):
    """`Weights` of a published state dict."""
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
        record.update(output_stride=8, width=_rows(record, "trunk.bn7.weight", 4096) / 4096)
    if layout.background:
        record["state"]["head.weight"] = record["state"]["head.weight"][1:]
    last, above = {"classifier": ("head.weight", 0), "deeplab": ("head.cls_conv.weight", 1)}.get(layout.kind, (None, 0))
    record["classes"] = _rows(record, last, 0) - above
    return Weights(path, layout.title + note, {layout.kind: record}, ignored)


def _rows(record, name, otherwise):
    """Length of a tensor of a record's state, or `otherwise` if it is not there."""
    tensor = record["state"].get(name)
    return otherwise if tensor is None or not tensor.ndim else len(tensor)


def load_pretrained(trunk, backbone, source):
    """Load weights into a trunk.

    source: "none", "imagenet" (downloaded by torchvision, or found in its cache), or a file that `open_weights` knows;
    of a network with a head, its trunk is taken.  Parts may be missing, as `layer4` in a file that stops at `layer3`;
    they keep their random weights.
    Returns (names of the trunk's modules that were loaded, a table of what was loaded, missing and ignored).
    Raises UserError for the weights of another backbone or shape.
    """
    if source == "none":
        return set(), f"{backbone} starts from random weights"
    weights = _imagenet(backbone) if source == "imagenet" else open_weights(source)
    fitting, table = _match(weights, trunk.state_dict(), backbone)
    trunk.load_state_dict(fitting, strict=False)
    return {name.rsplit(".", 1)[0] for name in fitting}, table


def check_pretrained(source, backbone, width=1.0):
    """UserError if `load_pretrained` would refuse this file, found out before any work; downloads are not tried."""
    if source not in (None, "none", "imagenet"):
        with torch.device("meta"):
            own = build_trunk(backbone, width=width).state_dict()
        _match(open_weights(source), own, backbone)


def _match(weights, own, backbone):
    """(tensors of a file's trunk that a trunk with the tensors `own` has, table of loaded, missing and ignored)."""
    record = next(iter(weights.networks.values()))
    if record["backbone"] != backbone:
        raise UserError(f"{weights.path} holds weights of {record['backbone']} ({weights.title}), but the backbone is "
                        f"{backbone}; pass --backbone {record['backbone']} or another --pretrained")
    state = {name.removeprefix("trunk."): tensor for name, tensor in record["state"].items()
             if name.startswith("trunk.")}
    unknown = [name for name in state if name not in own]
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    check_shapes(own, fitting, weights.path)
    ignored = unknown + [name for name in record["state"] if not name.startswith("trunk.")] + weights.ignored
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    return fitting, _table(f"{weights.path}: {weights.title}, into {backbone}", fitting, missing, ignored)


def _imagenet(backbone):
    if backbone == "resnet38":
        raise UserError("torchvision has no ImageNet weights of resnet38; pass --pretrained PATH (published as "
                        "ilsvrc-cls_rna-a1_cls1000_ep-0001.params) or --pretrained none")
    weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    try:
        state = load_state_dict_from_url(weights.url, progress=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download the ImageNet weights of {backbone} ({error}); fetch {weights.url} elsewhere "
                        "and pass --pretrained PATH, or pass --pretrained none") from None
    return translate(state, weights.url)


def _table(title, loaded, missing, ignored):
    rows = [("loaded", loaded), ("missing, stay random", missing), ("ignored", ignored)]
    lines = [f"  {len(names):>4} {what}: {_summary(names)}" for what, names in rows if names]
    return "\n".join([title, *lines])


def _summary(names, shown=6):
    groups = sorted({name.split(".")[0] for name in names})
    return ", ".join(groups[:shown]) + (f", ... ({len(groups)} in all)" if len(groups) > shown else "")


def load_model(path, steps):
    """A checkpoint of one of `steps` for --model_path: one of this project, or a published one, see `as_checkpoint`."""
    weights = open_weights(path)
    payload = as_checkpoint(weights)
    check_step(payload, steps, path if weights.payload else f"{path} ({weights.title})")
    return payload


def as_checkpoint(weights):
    """The checkpoint in `weights`, or a published network made to look like one.

    A published one has "options" {} and "classes" None, as its file names none; its network has all of ours' tensors,
    in float32.  What it is is printed.  Raises UserError if tensors are missing or of another shape.
    """
    if weights.payload is not None:
        return weights.payload
    (kind, record), = weights.networks.items()
    if kind == "trunk":
        raise UserError(f"{weights.path} is a {weights.title}, no trained network; pass it as --pretrained")
    complete = {**record, "state": _complete(record, weights)}
    return {"step": STEPS[kind], "options": {}, "classes": None, "networks": {kind: complete}}


def _complete(record, weights):
    """Every tensor of a record's network, in float32; counters and the unfitted common object start at 0."""
    own, path = outline(record).state_dict(), weights.path
    state = {name: tensor for name, tensor in record["state"].items() if name in own}
    missing = [name for name in own if name not in state]
    needed = [name for name in missing if not name.startswith("common.") and not name.endswith("num_batches_tracked")]
    if needed:
        raise UserError(f"{path} lacks {len(needed)} tensors of its network, such as {needed[0]}; it is incomplete: "
                        "fetch it again, or pass it as --pretrained")
    check_shapes(own, state, path)
    unknown = [name.removeprefix("trunk.") for name in record["state"] if name not in own]
    print(_table(f"{path}: {weights.title}", state, [], unknown + weights.ignored), file=sys.stderr)
    return {name: state[name].to(own[name].dtype) if name in state else torch.zeros_like(own[name], device="cpu")
            for name in own}


def describe(weights):
    """What a file holds, in a few lines."""
    lines = [f"{weights.path}: {weights.title}"]
    for kind, record in weights.networks.items():
        learned = [tensor for name, tensor in record["state"].items() if tensor.is_floating_point()
                   and not name.endswith(("running_mean", "running_var"))]
        width = f", width {record['width']:g}" if record.get("width", 1.0) != 1.0 else ""
        classes = f", {record['classes']} classes" if record["classes"] else ""
        lines.append(f"  {kind} on {record['backbone']}{width}{classes}: {len(record['state'])} tensors, "
                     f"{sum(tensor.numel() for tensor in learned) / 1e6:.1f} M parameters")
    if weights.payload is not None:
        lines.append(f"  classes: {', '.join(weights.payload['classes'])}")
    if weights.ignored:
        lines.append(f"  {len(weights.ignored)} tensors without a place in our networks: {_summary(weights.ignored)}")
    return "\n".join(lines)


def export(weights, family, kind=None):
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


def _same_network(layout, record):
    """Whether a layout names the network of a record, or at least its trunk (torchvision has nothing else)."""
    if layout.background or layout.backbone != record["backbone"]:
        return False
    return layout.family == "torchvision" or (layout.kind == record["kind"] and all(
        record.get(name, BUILT[name]) == value for name, value in layout.options))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m models.weights", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="any file of weights")
    parser.add_argument("--export", nargs=2, metavar=("FAMILY", "OUT"),
                        help=f"write it to OUT under the names of {', '.join(EXPORTS)}")
    parser.add_argument("--network", choices=tuple(STEPS),
                        help="which network of the file to export (default: the one its step trained)")
    args = parser.parse_args(argv)
    if args.export and args.export[0] not in EXPORTS:
        parser.error(f"--export {args.export[0]}: choose from {', '.join(EXPORTS)}")
    weights = open_weights(args.file)
    print(describe(weights))
    if args.export:
        family, out = args.export
        if Path(out).exists():
            raise UserError(f"{out} is there already; pass another path, or delete it")
        state, left = export(weights, family, args.network)
        save_tensors(out, state)
        print(f"Wrote {out}: {len(state)} tensors under {family}'s names"
              + (f"; {len(left)} have none there: {_summary(left)}" if left else ""))
    return 0


if __name__ == "__main__":
    run_main(main)
