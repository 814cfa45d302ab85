"""The measures of benchmarks.affinity against loops."""
import pytest
import torch

from benchmarks.affinity import pair_quality, roc_area, sampled_mask


def test_the_roc_area_equals_a_loop_over_pairs_with_ties_counting_half():
    positive, negative = torch.tensor([0.9, 0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.2])
    expected = sum((p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()) / 12
    assert roc_area(positive, negative) == pytest.approx(expected)
    assert roc_area(torch.ones(3), torch.zeros(5)) == 1 and roc_area(torch.ones(3), torch.ones(5)) == 0.5


def test_pairs_of_a_cell_with_itself_and_of_ignored_cells_do_not_count():
    truth = torch.tensor([1, 1, 0, 0, 255])
    matrix = torch.full((5, 5), 0.1) + torch.eye(5)
    matrix[0, 1] = matrix[1, 0] = 0.8
    matrix[2, 3] = matrix[3, 2] = 0.6
    assert pair_quality(matrix, truth) == pytest.approx((0.8, 0.1, 0.6, 1.0))
    assert pair_quality(matrix, torch.zeros(5, dtype=torch.long)) is None, "an image without an object has no border"


def test_a_mask_is_sampled_corners_on_corners():
    mask = torch.arange(35).reshape(5, 7).to(torch.uint8).numpy()
    assert sampled_mask(mask, (3, 4)).tolist() == [0, 2, 4, 6, 14, 16, 18, 20, 28, 30, 32, 34]
