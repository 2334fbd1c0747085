"""Correlations: how alike every query position is to every support position, block by block.

What HSNet and the methods that descend from it have in common. Axis letters: see `base.py`.
"""

import torch
from torch import Tensor

from pmnet.methods.base import resize, size_of

EPS = 1e-5  # added to a vector's length, so that a masked position stays exactly zero


def masked(feature_BKChw: Tensor, masks_BKHW: Tensor) -> Tensor:
    """Support features times their masks, which are resized bilinearly to soft values in [0, 1]."""
    soft_BKhw = resize(masks_BKHW.to(feature_BKChw.dtype), size_of(feature_BKChw))
    return feature_BKChw * soft_BKhw.unsqueeze(-3)


def unit(feature_NChw: Tensor) -> Tensor:
    """Each position's vector divided by its length + 1e-5; the channels are axis -3."""
    return feature_NChw / (torch.linalg.vector_norm(feature_NChw, dim=-3, keepdim=True) + EPS)


def correlation(query: list[Tensor], support: list[Tensor]) -> Tensor:
    """The correlations of one stage, (N, L, hq, wq, hs, ws): inner products of unit vectors, negative ones set to 0.

    Args:
        query: what `unit` makes of the L blocks of the stage, each (N, C, hq, wq).
        support: likewise, each (N, C, hs, ws).
    """
    query_NLCQ, support_NLCS = (torch.stack(side, dim=1).flatten(3) for side in (query, support))
    alike_NLQS = (query_NLCQ.transpose(2, 3) @ support_NLCS).relu_()
    return alike_NLQS.unflatten(3, size_of(support[0])).unflatten(2, size_of(query[0]))
