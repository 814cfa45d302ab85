"""Initial weights of a trunk: torchvision's ImageNet weights, a file of the same names, or one of our checkpoints."""
import torchvision
from torch.hub import load_state_dict_from_url

from utils.checkpoint import FORMAT, read_tensors
from utils.errors import UserError


def load_pretrained(trunk, backbone, source):
    """Load weights into a trunk.

    source: "none", "imagenet" (downloaded by torchvision, or found in its cache), or the path of a checkpoint with
    torchvision's names or of one of ours.  Parts may be missing, as `layer4` in a file that stops at `layer3`; they
    keep their random weights.
    Returns (names of the trunk's modules that were loaded, one line that tells what was loaded and what was not).
    Raises UserError for a file without any fitting tensor, or with one of another shape.
    """
    if source == "none":
        return set(), f"{backbone} starts from random weights"
    state = _imagenet(backbone) if source == "imagenet" else _state_of(read_tensors(source), source)
    own = trunk.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    if not fitting:
        raise UserError(f"{source} holds no tensor of {backbone} ({len(state)} others, such as "
                        f"{next(iter(state), 'none')}); pass another --pretrained or --backbone")
    for name, tensor in fitting.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: {name} is {tuple(tensor.shape)}, but {backbone} has {tuple(own[name].shape)}; "
                            "pass the weights of this backbone and width")
    trunk.load_state_dict(fitting, strict=False)
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    line = f"{backbone}: {len(fitting)} tensors from {source}"
    if missing:
        line += f"; {len(missing)} stay random: {_summary(missing)}"
    ignored = [name for name in state if name not in own]
    if ignored:
        line += f"; {len(ignored)} ignored: {_summary(ignored)}"
    return {name.rsplit(".", 1)[0] for name in fitting}, line


def _imagenet(backbone):
    if backbone == "resnet38":
        raise UserError("torchvision has no ImageNet weights of resnet38; pass --pretrained PATH or --pretrained none")
    weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    try:
        return load_state_dict_from_url(weights.url, progress=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download the ImageNet weights of {backbone} ({error}); fetch {weights.url} elsewhere "
                        "and pass --pretrained PATH, or pass --pretrained none") from None


def _state_of(payload, source):
    """Name -> tensor of a trunk, from either kind of file."""
    if isinstance(payload, dict) and payload.get("format") == FORMAT:
        record = next(iter(payload["networks"].values()))
        payload = {name.removeprefix("trunk."): tensor for name, tensor in record["state"].items()
                   if name.startswith("trunk.")}
    if not isinstance(payload, dict) or not all(hasattr(value, "shape") for value in payload.values()):
        raise UserError(f"{source} is not a dict of tensors; pass a state dict with torchvision's names")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in payload.items()}


def _summary(names, shown=3):
    groups = sorted({name.split(".")[0] for name in names})
    return ", ".join(groups[:shown]) + (", ..." if len(groups) > shown else "")
