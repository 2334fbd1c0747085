"""Masked average pooling beside the formula written out."""

import pytest
import torch
import torch.nn.functional as F

from pmnet.methods.pooling import masked_mean, mean_at_mask_size, only


def example(h=5, w=7, H=33, W=47):
    random = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 3, h, w, generator=random, dtype=torch.float64)
    return feature, (torch.rand(2, H, W, generator=random) < 0.3).double()


def test_masked_mean_is_the_sum_over_positions():
    feature, _ = example()
    weight = torch.rand(2, 5, 7, dtype=torch.float64)
    for n in range(2):
        total = sum(weight[n, i, j] * feature[n, :, i, j] for i in range(5) for j in range(7))
        expected = total / (weight[n].sum() + 0.25)
        torch.testing.assert_close(masked_mean(feature, weight, 0.25)[n], expected)


@pytest.mark.parametrize("size", [(33, 47), (40, 56), (3, 6), (5, 7)], ids=str)
def test_mean_at_mask_size_is_that_of_the_resized_features(size):
    feature, mask = example(H=size[0], W=size[1])
    resized = F.interpolate(feature, size, mode="bilinear", align_corners=False)
    expected = (resized * mask[:, None]).sum((2, 3)) / (mask.sum((1, 2))[:, None] + 1e-5)
    torch.testing.assert_close(mean_at_mask_size(feature, mask, 1e-5), expected)
    torch.testing.assert_close(mean_at_mask_size(feature, mask.bool(), 1e-5), expected)


@pytest.mark.parametrize("form", [masked_mean, mean_at_mask_size])
def test_empty_mask_gives_zeros(form):
    feature, _ = example()
    assert torch.equal(form(feature, torch.zeros(2, 5, 7), 1e-5), torch.zeros(2, 3, dtype=torch.float64))


def test_only_is_the_last_block_of_the_one_stage():
    assert only({"layer3": [torch.zeros(1), torch.ones(1)]}) == 1
    with pytest.raises(ValueError, match="unpack"):
        only({"layer3": [torch.zeros(1)], "layer4": [torch.zeros(1)]})
