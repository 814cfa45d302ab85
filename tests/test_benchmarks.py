"""The plain network that benchmarks.deeplab measures ours against is the same network."""
import pytest
import torch
from torch.nn import functional as F

from benchmarks.deeplab import plain, without_dropout
from models.build import build_network
from models.deeplab import segmentation_loss


@pytest.mark.parametrize("training", [True, False])
def test_the_plain_deeplab_gives_our_loss_and_gradients_in_float64(training):
    torch.manual_seed(0)
    network = build_network("deeplab", "resnet38", width=0.0625, classes=3)
    network = without_dropout(network).double().train(training)
    images, target = torch.randn(2, 3, 65, 97).double(), torch.randint(0, 4, (2, 65, 97))
    results = []
    for loss in (F.cross_entropy(plain(network)(images), target, ignore_index=255),
                 segmentation_loss(network(images), target)):
        network.zero_grad()
        loss.backward()
        results.append([loss.item(), network.trunk.conv1a.weight.grad.clone(), network.head.cls_conv.bias.grad.clone()])
    (one, *gradients), (other, *ours) = results
    assert abs(one - other) < 1e-6, f"losses {one} and {other}"
    for a, b in zip(gradients, ours):
        gap = ((a - b).norm() / a.norm()).item()
        assert gap < 1e-5, f"gradients differ by {gap:.1e}"
