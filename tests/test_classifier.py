"""The CAM classifier: the map's mean is the logit, the loss is what it says, and networks come back from records."""
import math

import pytest
import torch
from torch import nn

from models.backbone import build_backbone
from models.classifier import Classifier, classification_loss
from models.weights import build_network, pack, unpack
from utils.errors import UserError


def images(count=2, size=(65, 97)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def gap(found, expected):
    """Largest difference, relative to the largest magnitude of what is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    network = Classifier(build_backbone("resnet18", 16), 5)
    nn.init.normal_(network.head.weight)  # logits far enough apart to be compared
    return network.eval()


@torch.no_grad()
def test_the_mean_of_the_map_is_the_logit(classifier):
    logits, features = classifier(images()), classifier.backbone(images())
    cam = classifier.cam(features)
    assert logits.shape == (2, 5) and cam.shape == (2, 5, 5, 7), (logits.shape, cam.shape)
    assert cam.dtype == torch.float32, cam.dtype
    for name, other in (("the map's mean", cam.mean(dim=(2, 3))), ("classify", classifier.classify(features))):
        assert gap(other, logits) < 1e-5, f"{name} is off by {gap(other, logits):.1e} of the largest logit"
    assert logits.std() > 0.1 and cam.std() > 0.1, "the example is flat"


@torch.no_grad()
def test_the_map_equals_a_loop_over_cells(classifier):
    features = classifier.backbone(images(1))
    last = features[classifier.backbone.stages[-1]]
    weight = classifier.head.weight[:, :, 0, 0]
    expected = torch.stack([torch.stack([weight @ last[0, :, y, x] for x in range(7)], dim=1) for y in range(5)], dim=1)
    found = classifier.cam(features)[0]
    assert gap(found, expected) < 1e-5, f"off by {gap(found, expected):.1e} of the largest value"


@torch.no_grad()
def test_an_image_alone_equals_it_in_a_batch(classifier):
    logits, cam = classifier(images()), classifier.cam(classifier.backbone(images()))
    for index in range(2):
        one = images()[index:index + 1]
        gaps = gap(classifier(one)[0], logits[index]), gap(classifier.cam(classifier.backbone(one))[0], cam[index])
        assert max(gaps) < 1e-5, f"logits and map differ by {gaps} of their largest values"


@torch.no_grad()
def test_dropout_is_there_in_training_alone(classifier):
    try:
        first, second = (classifier.train()(images()) for _ in range(2))
    finally:
        classifier.eval()
    assert not torch.equal(first, second), "two training passes gave the same logits"
    assert torch.equal(classifier(images()), classifier(images()))


def test_fresh_logits_are_near_zero_so_that_training_starts_undecided():
    torch.manual_seed(0)
    network = Classifier(build_backbone("resnet18"), 20).eval()
    with torch.no_grad():
        loss = classification_loss(network(images()), torch.zeros(2, 20)).item()
    assert abs(loss - math.log(2)) < 0.2, f"first loss {loss:.3f}, not about log 2 = {math.log(2):.3f}"


def test_the_loss_is_the_mean_logistic_loss_over_classes():
    logits = torch.tensor([[2.0, -1.0, 0.0], [0.5, 30.0, -30.0]])
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    terms = [math.log1p(math.exp(-value if label else value))
             for row, marks in zip(logits.tolist(), labels.tolist()) for value, label in zip(row, marks)]
    found = classification_loss(logits, labels.to(torch.uint8))
    assert found.item() == pytest.approx(sum(terms) / 6, rel=1e-6), f"{found.item():.6f}, not {sum(terms) / 6:.6f}"
    assert found.dtype == torch.float32 and classification_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_the_gradient_of_the_loss_is_sigmoid_minus_label():
    logits, labels = torch.tensor([[2.0, -1.0], [0.3, 0.0]], requires_grad=True), torch.tensor([[1, 0], [0, 1]])
    classification_loss(logits, labels).backward()
    expected = (torch.sigmoid(logits.detach()) - labels) / 4
    assert gap(logits.grad, expected) < 1e-6, f"{logits.grad.tolist()}, not {expected.tolist()}"


# --- records -------------------------------------------------------------------------------------------------------

SHAPE = {"backbone": "resnet18", "width": 1.0, "output_stride": 8, "classes": 3}


@pytest.mark.parametrize("kind", ["classifier", "affinity", "deeplab"])
def test_a_network_comes_back_from_its_record(kind):
    network = build_network(kind, **SHAPE).eval()
    record = pack(network, kind=kind, **SHAPE)
    again = unpack(record)
    assert not again.training and again.backbone.stride == 8
    with torch.no_grad():
        assert torch.equal(network(images(1, (33, 33))), again(images(1, (33, 33))))
        network.backbone.conv1.weight.zero_()
    assert record["state"]["backbone.conv1.weight"].any(), "the record changes with the network"


@pytest.fixture
def record():
    return pack(build_network("affinity", **SHAPE), kind="affinity", **SHAPE)


@pytest.mark.parametrize("name, tensor, words", [
    ("fuse.weight", None, "missing or unknown tensors (1, such as fuse.weight)"),
    ("extra.weight", torch.zeros(2), "missing or unknown tensors (1, such as extra.weight)"),
    ("fuse.weight", torch.zeros(3, 448, 1, 1), "fuse.weight is (3, 448, 1, 1), but the network has (448, 448, 1, 1)"),
])
def test_a_record_whose_tensors_do_not_fit_is_refused(record, name, tensor, words):
    record["state"][name] = tensor
    if tensor is None:
        del record["state"][name]
    with pytest.raises(UserError) as caught:
        unpack(record)
    assert words in str(caught.value), f"{caught.value}"


@pytest.mark.parametrize("name, value", [("backbone", "vgg5"), ("kind", "unet"), ("width", "wide"), ("extra", 1)])
def test_a_record_that_makes_no_network_is_refused(record, name, value):
    with pytest.raises(UserError, match="makes no network"):
        unpack({**record, "backbone": "resnet38", name: value})


def test_a_record_that_claims_a_trillion_classes_takes_no_memory():
    record = pack(build_network("classifier", **SHAPE), kind="classifier", **SHAPE)
    with pytest.raises(UserError, match="head.weight is .3, 512, 1, 1., but the network has .1000000000000, 512"):
        unpack({**record, "classes": 10 ** 12})


def test_an_unknown_kind_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'unet'; choose from classifier, affinity, deeplab"):
        build_network("unet", "resnet18")
