"""Support-query affinity (paper 3.2, eq. 1).

Axes, as used in the names of tensors here and in `hsfm.py`:

    B batch    K shots    A attention heads    L blocks of one backbone stage
    C channels    Q query pixels (hq*wq)    S support pixels (hs*ws)

Affinities are kept with their channels last in memory, (N, hq, wq, hs, ws, L) with N = B*K*A: both
convolutions of the HSFM then read them without a permutation.
"""

import torch
from torch import Tensor, nn

HEADS = 4  # the authors' program splits the channels into 4 heads


def position_code(tokens: int, channels: int, like: Tensor) -> Tensor:
    """Fixed 1-D sinusoidal code over the token index: base 10000, sine on even channels, cosine on odd.

    Returns:
        (tokens, channels), values in [-1, 1], with the dtype and device of `like`.
    """
    position_S1 = torch.arange(tokens, device=like.device, dtype=torch.float32)[:, None]
    even_C = torch.arange(0, channels, 2, device=like.device, dtype=torch.float32)
    angle_SC = position_S1 * torch.exp(even_C * (-torch.log(torch.tensor(10000.0)) / channels))
    return torch.stack([angle_SC.sin(), angle_SC.cos()], dim=-1).flatten(1).to(like.dtype)


class Affinity(nn.Module):
    """Inner products between every query pixel and every support pixel, per block and per head.

    No scaling, no normalisation, and the support background is kept (paper eq. 1). A position code is
    added to the tokens first, followed by dropout while training, as in the authors' program.

    Args:
        channels: feature channels of the stage, a multiple of 2 * HEADS.
        linear_heads: pass query and support tokens through a linear layer each (the DAM model).
        dropout: after the position code, while training; 0.5 in the authors' program.
    """

    def __init__(self, channels: int, linear_heads: bool = False, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.query_linear = nn.Linear(channels, channels) if linear_heads else nn.Identity()
        self.support_linear = nn.Linear(channels, channels) if linear_heads else nn.Identity()

    def forward(self, query_feats: list[Tensor], support_feats: list[Tensor]) -> Tensor:
        """Affinities of one stage.

        Args:
            query_feats: L tensors (B, C, hq, wq).
            support_feats: L tensors (B, K, C, hs, ws).

        Returns:
            (B*K*A, L, hq, wq, hs, ws), channels last in memory.
        """
        B, C, hq, wq = query_feats[0].shape
        K, hs, ws = support_feats[0].shape[1], *support_feats[0].shape[-2:]
        query_code_QC = position_code(hq * wq, C, query_feats[0])
        support_code_SC = position_code(hs * ws, C, query_feats[0])

        blocks = []
        for query_BCHW, support_BKCHW in zip(query_feats, support_feats, strict=True):
            query_BQC = query_BCHW.flatten(2).transpose(1, 2) + query_code_QC
            support_BKSC = support_BKCHW.flatten(3).transpose(2, 3) + support_code_SC
            query_BQC = self.query_linear(self.dropout(query_BQC))
            support_BKSC = self.support_linear(self.dropout(support_BKSC))
            query_B1AQC = query_BQC.unflatten(-1, (HEADS, -1)).transpose(1, 2)[:, None]
            support_BKACS = support_BKSC.unflatten(-1, (HEADS, -1)).permute(0, 1, 3, 4, 2)
            blocks.append(query_B1AQC @ support_BKACS)
        S_BKAQSL = torch.stack(blocks, dim=-1)
        return S_BKAQSL.reshape(B * K * HEADS, hq, wq, hs, ws, -1).movedim(-1, 1)
