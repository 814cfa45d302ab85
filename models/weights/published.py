"""What published checkpoints look like: how to tell one from another, and which of our tensors each of theirs is."""
import re
from collections.abc import Collection
from dataclasses import dataclass

TORCHVISION_DEPTHS = {  # (blocks of layer3, whether they are bottlenecks) -> name
    (2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}


def _irn_prefixes() -> tuple[tuple[str, str], ...]:
    """IRN's CAM network holds its backbone three times: as resnet50, as four stages, and in a list of these."""
    stages = [("0.", "conv1."), ("1.", "bn1."), ("4.", "layer1.")], *([("0.", f"layer{n}.")] for n in (2, 3, 4))
    copies = [(f"{stage}{theirs}", f"backbone.{ours}") for number, parts in enumerate(stages) for theirs, ours in parts
              for stage in (f"stage{number + 1}.", f"backbone.{number}.")]
    return ("resnet50.", "backbone."), ("classifier.", "head."), *copies, ("newly_added.0.", "head.")


@dataclass(frozen=True)
class Layout:
    """A published way of naming a network's tensors.

    title: what a reader would call such a file.  family: its name for --export.  kind: as in `models.weights.records`,
    or "backbone", without a head.  backbone: as in `models.backbone`.  signature: tensors that tell such a file; of
    LAYOUTS, the first that fits is taken.  prefixes: (theirs, ours); the first that fits a name of theirs is taken, all
    that fit a name of ours are written; ours is None for what has no place in our network.  options: how our network
    must be built besides.  background: whether the classifier's first row is the background, which ours does not have.
    """
    title: str
    family: str
    kind: str
    backbone: str
    signature: tuple[str, ...]
    prefixes: tuple[tuple[str, str | None], ...]
    options: tuple[tuple[str, object], ...] = ()
    background: bool = False

    def ours(self, name: str) -> str | None:
        """Our name of one of their tensors, or None if our network has no such tensor."""
        theirs, ours = next(pair for pair in (*self.prefixes, ("", None)) if name.startswith(pair[0]))
        return None if ours is None else ours + name[len(theirs):]

    def theirs(self, name: str) -> list[str]:
        """Their names, if any, of one of our tensors."""
        return [theirs + name[len(ours):] for theirs, ours in self.prefixes if ours and name.startswith(ours)]


RESNET38 = ("", "backbone.")
LAYOUTS = (
    Layout("IRN ResNet-50 CAM classifier", "irn", "classifier", "resnet50",
           ("resnet50.conv1.weight", "classifier.weight"), _irn_prefixes(),
           (("output_stride", 16), ("dilated", False))),
    Layout("DeepLabV1-ResNet38 with the seamv1 head", "seamv1", "deeplab", "resnet38",
           ("backbone.conv1a.weight", "conv_fov.weight", "cls_conv.weight"),
           (("backbone.", "backbone."), ("conv_fov", "head.conv_fov"), ("bn_fov", "head.bn_fov"),
            ("cls_conv", "head.cls_conv")), (("head", "seamv1"),)),
    Layout("DeepLabV1-ResNet38 with MCTformer's head", "mctformer", "deeplab", "resnet38",
           ("conv1a.weight", "fc8_seg_conv1.weight", "fc8_seg_conv2.weight"),
           (("fc8_seg_conv1", "head.conv_fov"), ("fc8_seg_conv2", "head.cls_conv"), RESNET38),
           (("head", "mctformer"),)),
    Layout("SEAM ResNet38 classifier", "seam", "classifier", "resnet38",
           ("conv1a.weight", "fc8.weight", "f9.weight"),
           (("fc8.", "head."), ("f8_", None), ("f9.", None), RESNET38), background=True),
    Layout("PSA ResNet38 AffinityNet", "psa", "affinity", "resnet38",
           ("conv1a.weight", "f8_3.weight", "f8_4.weight", "f8_5.weight", "f9.weight"),
           (("f8_3.", "heads.0."), ("f8_4.", "heads.1."), ("f8_5.", "heads.2."), ("f9.", "fuse."), RESNET38)),
    Layout("PSA ResNet38 classifier", "psa", "classifier", "resnet38",
           ("conv1a.weight", "fc8.weight"), (("fc8.", "head."), RESNET38)),
    Layout("Wide-ResNet38 without a head", "psa", "backbone", "resnet38", ("conv1a.weight",),
           (("linear1000_", None), RESNET38)),
    *(Layout(f"torchvision ResNet-{name[6:]}", "torchvision", "backbone", name,
             ("conv1.weight", "layer1.0.conv1.weight"), (("fc.", None), ("", "backbone.")))
      for name in TORCHVISION_DEPTHS.values()),
)
EXPORTS = tuple(dict.fromkeys(layout.family for layout in LAYOUTS if not layout.background))


def identify(state: Collection[str]) -> Layout | None:
    """The `Layout` whose names these are (a state dict, or its names), or None if it is none of them."""
    depth = _torchvision_depth(state)
    for layout in LAYOUTS:
        fits = layout.family != "torchvision" or layout.backbone == depth
        if fits and all(name in state for name in layout.signature):
            return layout
    return None


def _torchvision_depth(state: Collection[str]) -> str | None:
    """Name of the ResNet with torchvision's tensors, by its blocks; None without a whole layer3."""
    blocks = {match[1] for match in (re.match(r"layer3\.(\d+)\.", name) for name in state) if match}
    return TORCHVISION_DEPTHS.get((len(blocks), "layer1.0.conv3.weight" in state))


MXNET_NAME = re.compile(r"(?P<kind>res|bn)(?P<stage>[2-7])(?:a|b(?P<block>\d))_(?P<branch>branch(?:1|2a|2b\d))"
                        r"_(?P<tensor>\w+)")
MXNET_TENSORS = {"weight": "weight", "beta": "bias", "gamma": "weight", "moving_mean": "running_mean",
                 "moving_var": "running_var"}


def from_mxnet(name: str) -> str:
    """PSA's name for a tensor of ilsvrc-cls_rna-a1_cls1000_ep-0001.params, the Wide-ResNet38 of Wu et al. (2016).

    "arg:res4b3_branch2a_weight" is b4_3.conv_branch2a.weight; "aux:bn2a_branch2a_moving_var" is
    b2.bn_branch2a.running_var.  Others, such as the classifier's, only lose "arg:" or "aux:".
    """
    name = name.removeprefix("arg:").removeprefix("aux:")
    for module in ("conv1a", "bn7"):
        if name.startswith(f"{module}_") and name[len(module) + 1:] in MXNET_TENSORS:
            return f"{module}.{MXNET_TENSORS[name[len(module) + 1:]]}"
    match = MXNET_NAME.fullmatch(name)
    if not match or match["tensor"] not in MXNET_TENSORS:
        return name
    block = f"b{match['stage']}" + (f"_{match['block']}" if match["block"] else "")
    layer = "conv" if match["kind"] == "res" else "bn"
    return f"{block}.{layer}_{match['branch']}.{MXNET_TENSORS[match['tensor']]}"
