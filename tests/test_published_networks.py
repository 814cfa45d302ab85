"""Our networks give what the published ones give, from the same weights under the published names.

The expected values were computed once by the published code itself, filled by published_weights.py: PSA's and SEAM's
network/*.py, IRN's net/resnet50_cam.py, SEAM's segmentation code (lib/net/deeplabv1.py) and MCTformer's
seg/network/resnet38_seg.py, each as of its newest public commit, with torch 2.15 on a CPU.
"""
import numpy as np
import pytest
import torch
from published_weights import image, weight
from torch.nn import functional as F

from models.affinitynet import affinity_stencil
from models.weights import as_checkpoint, translate
from models.weights.published import LAYOUTS
from models.weights.records import outline, unpack
from utils.random_walk import half_disc

RELATIVE = 1e-4  # of the largest expected value


def published(title, classes=0):
    """The published file of a layout, as a dict of its own names, and our network loaded from it."""
    layout = next(layout for layout in LAYOUTS if title in layout.title)
    how = {"output_stride": 8, **dict(layout.options), "kind": layout.kind, "backbone": layout.backbone}
    shapes = {name: tensor.shape for name, tensor in outline({**how, "classes": classes}).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        for theirs in layout.theirs(name)[:1]:
            state[theirs] = weight(theirs, _published_shape(layout, name, shape))
    for name in layout.signature:  # SEAM's own heads, which have no place in our network
        state.setdefault(name, torch.zeros(1))
    (record,) = as_checkpoint(translate(state, "published.pth"))["networks"].values()
    return unpack(record)


def _published_shape(layout, name, shape):
    return (shape[0] + 1, *shape[1:]) if layout.background and name == "head.weight" else shape


def sample(tensor, count=8):
    flat = tensor.flatten()
    return [flat[int(i)].item() for i in np.linspace(0, len(flat) - 1, count)]


def assert_close(found, expected, what):
    gap = np.abs(np.array(found) - np.array(expected)).max() / np.abs(expected).max()
    assert gap < RELATIVE, f"{what}: {gap:.1e} off relative to the largest; found {found}, published {expected}"


@torch.no_grad()
def test_the_resnet38_classifier_gives_psas_features_logits_and_cam():
    network, x = published("PSA ResNet38 classifier", 20), image(65, 97)
    maps = network.backbone(x)
    for stage, mean, expected in (
            ("conv4", 0.1753310393682241, [0, 0.2485814, 0, 0, 0.1520267, 0.4634733, 0, 0]),
            ("conv5", 0.1357840701696527, [0.1810803, 0, 0.3022289, 0, 0, 0, 0.5024295, 0]),
            ("conv6", 0.10070763318582897, [0.4053265, 0.1034969, 0, 0, 0, 0, 0.1990511, 0])):
        assert_close(sample(maps[stage]), expected, stage)
        assert_close([maps[stage].double().mean().item()], [mean], f"mean of {stage}")
    cam = network.cam(maps)
    assert_close(sample(network(x)), [0.009433154, -0.07693525, -0.05078115, 0.1078342, -0.006855601, -0.1894766,
                                      0.115081, 0.0784101], "logits")
    assert_close(sample(cam.relu()), [0, 0, 0, 0.09039998, 0.1134247, 0, 0, 0.1171685], "CAM")
    assert_close(cam.mean(dim=(2, 3)).tolist(), network(x).tolist(), "the CAM's mean")


@torch.no_grad()
def test_a_seam_classifier_gives_its_foreground_cams():
    network = published("SEAM", 20)
    cam = network.cam(network.backbone(image(65, 97)))
    with_background = torch.cat([cam[:, :1], cam], dim=1)  # the first row, the background's, is not in our network
    expected = [-0.05682149, -0.03705265, 0.09004443, 0.1388073, -0.1693146, -0.1194119, 0.1130718]
    assert_close(sample(with_background)[1:], expected, "CAM")


@torch.no_grad()
def test_the_affinitynet_gives_psas_affinities_at_stride_8():
    network = published("AffinityNet")
    offsets = half_disc(5)
    stencil = affinity_stencil(network(image(97, 121))[0], offsets)
    expected = {((0, 4), (0, 5)): 0.9805754, ((2, 5), (5, 3)): 0.9652935, ((3, 8), (7, 8)): 0.9692588,
                ((1, 6), (3, 9)): 0.9676979, ((6, 7), (6, 11)): 0.9689848, ((4, 10), (5, 6)): 0.9697732}
    found = [stencil[offsets.index((y2 - y, x2 - x)), y, x] for (y, x), (y2, x2) in expected]
    distance = [-np.log(float(value)) for value in found]
    assert_close(distance, -np.log(list(expected.values())), "feature distances")


@torch.no_grad()
def test_the_resnet50_classifier_gives_irns_logits_and_cam():
    network, x = published("IRN", 20), image(97, 129)
    assert_close(sample(network(x)), [0.2703875, 0.1885179, 0.1862112, 0.1937154, 0.3610232, -0.1852713, 0.05743771,
                                      -0.01099742], "logits")
    both = network.cam(network.backbone(torch.cat([x, x.flip(-1)]))).relu()
    assert_close(sample(both[0] + both[1].flip(-1)),
                 [0.4067773, 0.4316775, 0.4792922, 0.4010365, 0.9805014, 0.07324764, 0.1236904, 0], "CAM")


@torch.no_grad()
@pytest.mark.parametrize("title, upsampled, expected", [
    ("seamv1", True, [-0.1925656, -0.1569181, 0.2241887, 0.03522685, 0.1304932, -0.07130006, 0.156287, -0.1144337]),
    ("MCTformer", False, [-0.08105855, -0.09338996, -0.131806, -0.1976769, 0.1624753, 0.0140222, -0.2184346,
                          0.1924551]),
])
def test_deeplab_gives_the_published_logits_with_either_head(title, upsampled, expected):
    logits = published(f"DeepLabV1-ResNet38 with {'the ' if upsampled else ''}{title}", 20)(image(97, 129))
    if upsampled:  # as the published network does
        logits = F.interpolate(logits, size=(97, 129), mode="bilinear", align_corners=True)
    assert_close(sample(logits), expected, f"{title} logits")
