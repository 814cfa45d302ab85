"""CutMix: one rectangle of the image before, and labels by its area."""
import pytest
import torch

from src.seeds.cam import cutmix


def numbered_batch(height=20, width=30):
    """Three images, each of its own number everywhere, and one class each."""
    return torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, height, width), torch.eye(3)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_puts_one_rectangle_of_the_image_before_and_mixes_the_labels_by_area(seed):
    torch.manual_seed(seed)
    images, labels = numbered_batch()
    mixed, found = cutmix(images, labels)
    foreign = mixed[:, 0] != images[:, 0]
    for index in range(3):
        seen = set(mixed[index][:, foreign[index]].unique().tolist())
        assert seen <= {(index - 1) % 3}, f"image {index} holds parts of {seen}"
        rows, columns = foreign[index].any(1).sum(), foreign[index].any(0).sum()
        assert foreign[index].sum() == rows * columns, f"{foreign[index].sum()} pixels, not {rows} x {columns}"
        ratio = foreign[index].float().mean()
        expected = torch.zeros(3).index_add(0, torch.tensor([index, (index - 1) % 3]), torch.stack([1 - ratio, ratio]))
        assert torch.allclose(found[index], expected, atol=1e-6), f"labels {found[index]}, pixels {expected}"
    assert torch.equal(images, numbered_batch()[0]), "cutmix changed its input"


def test_cutmix_draws_areas_evenly_from_torchs_generator():
    images, labels = numbered_batch(64, 64)
    torch.manual_seed(0)
    found = torch.stack([cutmix(images, labels)[1][0, 2] for _ in range(400)])
    assert abs(found.mean() - 0.5) < 0.06 and found.min() < 0.05 and found.max() > 0.95, f"{found.mean():.3f}"
    torch.manual_seed(7)
    first = cutmix(images, labels)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, cutmix(images, labels))), "one seed gave two results"


def test_cutmix_leaves_a_single_image_as_it_is():
    images, labels = torch.rand(1, 3, 9, 9), torch.tensor([[0.0, 1.0]])
    mixed, found = cutmix(images, labels)
    assert torch.equal(mixed, images) and torch.allclose(found, labels), f"labels became {found}"
