"""Support-query affinity (paper 3.2, eq. 1).

Axes, as used in the names of tensors here and in `hsfm.py`:

    B batch    K shots    N pairs of query and support (B*K)    A attention heads    L blocks of one backbone stage
    C channels    P pixels: Q of the query (hq*wq), S of the support (hs*ws)

Affinities are kept with their channels last in memory, (N*A, hq, wq, hs, ws, L): both convolutions of the HSFM then
read them without a permutation.
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


class Dropout(nn.Dropout):
    """As torch's; on a CPU, where a generator draws one number after the other, each draw decides on four entries."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        lowest = torch.iinfo(torch.int64).min
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(lowest, None).view(torch.int16)
        kept = draws[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept / (1 - self.p)


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
        self.dropout = Dropout(dropout)
        self.query_linear = nn.Linear(channels, channels) if linear_heads else nn.Identity()
        self.support_linear = nn.Linear(channels, channels) if linear_heads else nn.Identity()

    def query_tokens(self, features: list[Tensor]) -> list[Tensor]:
        """L tensors (B, C, hq, wq) -> L tensors (B, A, Q, C/A)."""
        return self.tokens(features, self.query_linear)

    def support_tokens(self, features: list[Tensor]) -> list[Tensor]:
        """L tensors (N, C, hs, ws) -> L tensors (N, A, S, C/A)."""
        return self.tokens(features, self.support_linear)

    def tokens(self, features: list[Tensor], linear: nn.Module) -> list[Tensor]:
        code_PC = position_code(features[0][0, 0].numel(), features[0].shape[1], features[0])
        coded_BPC = (feature.flatten(2).transpose(1, 2) + code_PC for feature in features)
        return [linear(self.dropout(x)).unflatten(2, (HEADS, -1)).transpose(1, 2) for x in coded_BPC]

    def forward(self, query_tokens: list[Tensor], support_tokens: list[Tensor]) -> Tensor:
        """Affinities of N pairs.

        Args:
            query_tokens: L tensors (N, A, Q, C/A).
            support_tokens: L tensors (N, A, S, C/A).

        Returns:
            (N*A, Q, S, L).
        """
        blocks = [q @ s.transpose(2, 3) for q, s in zip(query_tokens, support_tokens, strict=True)]
        return torch.stack(blocks, dim=-1).flatten(0, 1)
