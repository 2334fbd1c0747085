"""Masked average pooling: one vector that stands for what a mask covers, in the forms of the methods that use it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pmnet.backbones import Features
from pmnet.methods.base import size_of


def only(feats: Features) -> Tensor:
    """The feature map of the one block that a method reads."""
    (blocks,) = feats.values()
    return blocks[-1]


def masked_mean(feature_NChw: Tensor, weight_Nhw: Tensor, eps: float) -> Tensor:
    """The weighted mean of each map over its positions, (N, C).

    Args:
        weight_Nhw: 0 or more, for instance a mask resized to the features' size.
        eps: added to the sum of the weights, so that an empty mask gives zeros.
    """
    weight_Nhw = weight_Nhw.to(feature_NChw.dtype)
    total_NC = torch.einsum("nchw,nhw->nc", feature_NChw, weight_Nhw)
    return total_NC / (weight_Nhw.sum((1, 2)) + eps)[:, None]


def mean_at_mask_size(feature_NChw: Tensor, mask_NHW: Tensor, eps: float) -> Tensor:
    """`masked_mean` of the features after they are resized to the mask's size, (N, C).

    The resizing (bilinear, corners not aligned) is linear in the features, so its transpose brings the mask to the
    features' size instead, where the sum is the same: no map of the image's size is made.
    """
    (h, w), (H, W) = size_of(feature_NChw), size_of(mask_NHW)
    mask_NHW = mask_NHW.to(feature_NChw.dtype)
    weight_Nhw = enlargement(h, H, feature_NChw) @ mask_NHW @ enlargement(w, W, feature_NChw).T
    total_NC = torch.einsum("nchw,nhw->nc", feature_NChw, weight_Nhw)
    return total_NC / (mask_NHW.sum((1, 2)) + eps)[:, None]


def enlargement(h: int, H: int, like: Tensor) -> Tensor:
    """(h, H): what each of h positions adds to each of the H that they are resized to."""
    positions = torch.eye(h, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(positions, H, mode="linear", align_corners=False)[0]
