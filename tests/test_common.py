"""The common-object head on descriptors whose object side is known."""
import pytest
import torch

from models.common import CommonObject
from src.cams import SHARPNESS, normalised_cam
from utils.errors import UserError


def descriptors(count=600, channels=12, seed=0):
    """Two classes whose objects differ a little, before backgrounds that differ a lot along another axis.

    Returns features (N, D), classes (N,), a CAM that fires on a tenth of the object, and which rows are object.
    """
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(count, channels, generator=rng)
    is_object = torch.rand(count, generator=rng) < 0.35
    classes = torch.randint(0, 2, (count,), generator=rng)
    features[:, 0] += torch.where(is_object, 5.0, -2.0)
    features[:, 1] += classes * is_object * 1.5
    cam = (is_object & (torch.rand(count, generator=rng) < 0.1)).float()
    return features, classes, cam, is_object


def agreement(head, features, is_object):
    odds = head(features.T[None, :, :, None])[0, :, 0]
    return ((odds > 0) == is_object).float().mean().item()


def test_the_head_finds_the_whole_object_from_a_cam_that_fires_on_a_tenth_of_it():
    features, classes, cam, is_object = descriptors()
    head = CommonObject(12)
    share = head.fit(features, classes, cam)
    found = agreement(head, features, is_object)
    assert found > 0.98, f"{found:.3f} of the descriptors are on the right side"
    truth = is_object.float().mean().item()
    assert abs(share - truth) < 0.02, f"share {share:.3f}, truth {truth:.3f}"


def test_the_sign_follows_the_cam():
    features, classes, cam, is_object = descriptors()
    head = CommonObject(12)
    head.fit(features, classes, 1 - is_object.float())
    found = agreement(head, features, ~is_object)
    assert found > 0.98, f"{found:.3f} of the descriptors follow a CAM that fires on the background"


def test_the_log_odds_are_a_linear_function_of_the_features():
    features, classes, cam, _ = descriptors()
    head = CommonObject(12)
    head.fit(features, classes, cam)
    maps = torch.randn(2, 12, 3, 5)
    expected = torch.stack([maps[b, :, y, x] @ head.weight + head.bias
                            for b in range(2) for y in range(3) for x in range(5)]).view(2, 3, 5)
    error = (head(maps) - expected).abs().max().item()
    assert error < 1e-4, f"largest difference {error}"


def test_a_new_head_is_not_fitted_and_a_fitted_one_survives_its_state_dict():
    head, other = CommonObject(12), CommonObject(12)
    assert not head.fitted
    head.fit(*descriptors()[:3])
    other.load_state_dict(head.state_dict())
    assert other.fitted and torch.equal(other.weight, head.weight) and torch.equal(other.bias, head.bias)


def test_features_without_two_sides_are_refused_with_the_remedy():
    with pytest.raises(UserError, match="--method cam"):
        CommonObject(4).fit(torch.zeros(50, 4), torch.zeros(50, dtype=torch.long), torch.zeros(50))


def test_one_class_takes_its_map_from_the_object_alone_whatever_its_cam():
    odds = torch.linspace(-4, 4, 12).view(3, 4).numpy()
    blank, full = torch.zeros(1, 3, 4).numpy(), torch.rand(1, 3, 4).numpy()
    expected = torch.sigmoid(torch.from_numpy(odds)).numpy() ** SHARPNESS
    for cam in (blank, full):
        found = normalised_cam(cam[:1], odds)[0]
        assert abs(found - expected / expected.max()).max() < 1e-5, f"{found} is not {expected / expected.max()}"


def test_several_classes_share_the_object_out_by_their_cams():
    odds = torch.full((1, 2), 3.0).numpy()
    cam = torch.tensor([[[1.0, 0.25]], [[0.5, 1.0]]]).numpy()
    maps = normalised_cam(cam, odds)
    assert abs(maps - [[[1, 0.25]], [[0.5, 1]]]).max() < 1e-4, f"maps {maps.tolist()}"
