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


def occupied(masks_NHW: Tensor, size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns outside of which features of some size, masked by any of these masks, are zero."""
    soft_hw = resize(masks_NHW[:, None].float(), size).amax(dim=(0, 1))
    rows, columns = (soft_hw.amax(dim=i).nonzero().flatten().tolist() or [0] for i in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def unit(feature_NChw: Tensor) -> Tensor:
    """Each position's vector divided by its length + 1e-5; the channels are axis -3."""
    return feature_NChw / (torch.linalg.vector_norm(feature_NChw, dim=-3, keepdim=True) + EPS)


def correlation(query: list[Tensor], support: list[Tensor]) -> Tensor:
    """The correlations of one stage, (N, L, hq, wq, hs, ws): inner products of unit vectors, negative ones set to 0.

    In memory the blocks come after the query positions, where the convolutions over the support plane want them.

    Args:
        query: what `unit` makes of the L blocks of the stage, each (N, C, hq, wq).
        support: likewise, each (N, C, hs, ws).
    """
    pairs = [(q.flatten(2).transpose(1, 2), s.flatten(2)) for q, s in zip(query, support, strict=True)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*query, *support)):
        alike_NQLS = torch.stack([q @ s for q, s in pairs], dim=2)
    else:
        (N, Q, _), S = pairs[0][0].shape, pairs[0][1].shape[2]
        alike_NQLS = query[0].new_empty(N, Q, len(pairs), S)
        for block, (q, s) in enumerate(pairs):
            torch.bmm(q, s, out=alike_NQLS[:, :, block])
    alike = alike_NQLS.relu_().unflatten(3, size_of(support[0])).unflatten(1, size_of(query[0]))
    return alike.permute(0, 3, 1, 2, 4, 5)
