"""Masked average pooling: the mean feature of the pixels in a mask, in the variants that the methods use."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Features
from pmnet.methods.base import size_of


def only(feats: Features) -> Tensor:
    """The feature map of a method that reads a single block."""
    (blocks,) = feats.values()
    return blocks[-1]


def masked_mean(feature_NChw: Tensor, weight_Nhw: Tensor, eps: float) -> Tensor:
    """The weighted mean of each feature map over its positions, (N, C).

    Args:
        feature_NChw: feature maps.
        weight_Nhw: 0 or more, for example a mask resized to the features' size.
        eps: added to the sum of the weights, so that an empty mask gives zeros.
    """
    weight_Nhw = weight_Nhw.to(feature_NChw.dtype)
    total_NC = torch.einsum("nchw,nhw->nc", feature_NChw, weight_Nhw)
    return total_NC / (weight_Nhw.sum((1, 2)) + eps)[:, None]


def mean_at_mask_size(feature_NChw: Tensor, mask_NHW: Tensor, eps: float) -> Tensor:
    """The masked mean of feature maps resized to the mask's size (bilinear, corners not aligned), (N, C).

    Resizing is linear, so its transpose, applied to the mask, gives the same sum without feature maps of that size.

    Args:
        feature_NChw: feature maps.
        mask_NHW: 0 or 1.
        eps: added to the mask's area, so that an empty mask gives zeros.
    """
    (h, w), (H, W) = size_of(feature_NChw), size_of(mask_NHW)
    mask_NHW = mask_NHW.to(feature_NChw.dtype)
    weight_Nhw = enlargement(h, H, feature_NChw) @ mask_NHW @ enlargement(w, W, feature_NChw).T
    total_NC = torch.einsum("nchw,nhw->nc", feature_NChw, weight_Nhw)
    return total_NC / (mask_NHW.sum((1, 2)) + eps)[:, None]


def enlargement(h: int, H: int, like: Tensor) -> Tensor:
    """The matrix (h, H) that resizes h positions to H."""
    positions = torch.eye(h, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(positions, H, mode="linear", align_corners=False)[0]
