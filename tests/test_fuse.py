"""Folding batch normalisation changes nothing but the speed."""
import pytest
import torch
from torch import nn

from models.build import build_network
from models.fuse import for_inference

# (network, normalisations that stay: those that follow a sum)
NETWORKS = [({"kind": kind, "backbone": backbone, "classes": 3, "width": 0.125, "head": head}, stay)
            for kind, backbone, head, stay in (
                ("classifier", "resnet18", "seamv1", 0), ("affinity", "resnet50", "seamv1", 0),
                ("classifier", "resnet38", "seamv1", 18), ("deeplab", "resnet38", "seamv1", 18),
                ("deeplab", "resnet38", "mctformer", 18))]


def random_network(how):
    """A network in eval mode whose normalisations are far from the identity."""
    torch.manual_seed(0)
    network = build_network(**how).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2)):
                nn.init.uniform_(tensor, low, high)
    return network


@pytest.mark.parametrize("how, stay", NETWORKS)
@torch.no_grad()
def test_a_folded_network_gives_the_same_outputs(how, stay):
    network, x = random_network(how), torch.randn(2, 3, 65, 97)
    before = network(x)
    folded = for_inference(network)
    gap = ((folded(x) - before).abs().max() / before.abs().max()).item()
    assert gap < 1e-5, f"differs by {gap:.1e} of the largest output"
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == stay, f"{len(left)} normalisations stay: {left[:3]}"
    assert not [name for name, parameter in folded.named_parameters() if parameter.requires_grad]


def test_a_network_in_training_mode_is_not_folded():
    with pytest.raises(ValueError, match="eval mode"):
        for_inference(build_network("classifier", "resnet18", classes=2))
