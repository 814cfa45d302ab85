"""What every trunk shares: building one by name, freezing its first blocks, and the policy for batch normalisation."""
from torch import nn

from models.resnet import DEPTHS, ResNet
from models.resnet38 import ResNet38

BACKBONES = (*DEPTHS, "resnet38")
BN_POLICIES = ("auto", "frozen", "train")


def build_trunk(backbone, output_stride=16, width=1.0, dilated=True):
    """A trunk with random weights.

    backbone: one of BACKBONES.  output_stride: 8 or 16 (ResNet-18..101); resnet38 is published at 8 and stays there.
    width: channel multiplier of resnet38; 1.0 is the published network.  dilated: whether a ResNet's layers that lost
    their stride are dilated instead; IRN's are not.
    The trunk maps images (B, 3, H, W) to a dict of feature maps; `stages` names the last three in order of depth,
    `channels` gives their sizes, `stride` is the output stride, `blocks()` lists the modules in order of depth.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}; choose from {', '.join(BACKBONES)}")
    if backbone == "resnet38":
        return ResNet38(width=width)
    return ResNet(backbone, output_stride, dilated)


class Network(nn.Module):
    """A network around a trunk whose frozen parts stay frozen whatever `train()` is told.

    Frozen batch normalisation uses its stored statistics and gets no gradient; published code that overrides `train()`
    by hand forgets one or the other (recipes.md, trap 9).
    """

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self._frozen_norms = []

    def freeze(self, blocks=0, bn="frozen", loaded=()):
        """Freeze the first `blocks` blocks of the trunk and batch normalisation by policy `bn`.

        bn: "frozen": all of the trunk's; "train": those outside the frozen blocks learn; "auto": a layer is frozen if
        its statistics came from a file (its name, relative to the trunk, is in `loaded`), and learns if it is new.
        """
        if bn not in BN_POLICIES:
            raise ValueError(f"unknown batch-normalisation policy {bn!r}; choose from {', '.join(BN_POLICIES)}")
        frozen = [module for block in self.trunk.blocks()[:blocks] for part in block for module in part.modules()]
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self._frozen_norms = [module for module in frozen if isinstance(module, nn.BatchNorm2d)]
        for name, module in self.trunk.named_modules():
            if isinstance(module, nn.BatchNorm2d) and (bn == "frozen" or bn == "auto" and name in loaded):
                module.requires_grad_(False)
                self._frozen_norms.append(module)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self._frozen_norms:
            module.eval()
        return self
