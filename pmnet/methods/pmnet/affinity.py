"""Support-query affinity (paper 3.2, eq. 1).

Suffixes of tensor names, here, in `hsfm.py` and in `lean.py`:

    B batch    K shots    N pairs of query and support (B*K)    A attention heads    L blocks of one backbone stage
    C channels    P pixels: Q of the query (hq*wq), S of the support (hs*ws)

For the convolutions of the HSFM, affinities have their channels last in memory, (N*A, hq, wq, hs, ws, L), so that both
read them without a permutation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

HEADS = 4  # the authors' program splits the channels into 4 heads


def position_code(tokens: int, channels: int, like: Tensor) -> Tensor:
    """Fixed 1-D sinusoidal code over the token index: base 10000, sine on even channels, cosine on odd ones.

    Args:
        tokens: number of tokens.
        channels: number of channels, even.
        like: a tensor with the dtype and device of the result.

    Returns:
        (tokens, channels), values in [-1, 1].
    """
    position_S1 = torch.arange(tokens, device=like.device, dtype=torch.float32)[:, None]
    even_C = torch.arange(0, channels, 2, device=like.device, dtype=torch.float32)
    angle_SC = position_S1 * torch.exp(even_C * (-torch.log(torch.tensor(10000.0)) / channels))
    return torch.stack([angle_SC.sin(), angle_SC.cos()], dim=-1).flatten(1).to(like.dtype)


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on a CPU: each random 64-bit number decides on four entries.

    A CPU's generator produces one number at a time, which takes longer than the rest of a dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        lowest = torch.iinfo(torch.int64).min
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(lowest, None).view(torch.int16)
        kept = draws[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept / (1 - self.p)


class Affinity(nn.Module):
    """Inner products between every query pixel and every support pixel, per block and per head.

    They are neither scaled nor normalised, and the support's background is included (paper eq. 1). As in the authors'
    program, a position code is added to the tokens first, followed by dropout in training.

    Args:
        channels: feature channels of the stage, a multiple of 2 * HEADS.
        linear_heads: apply one linear layer to the query tokens and one to the support tokens (the DAM model).
        dropout: dropout rate after the position code; 0.5 in the authors' program.

    Example:
        >>> affinity = Affinity(channels=32).eval()
        >>> query = affinity.query_tokens([torch.rand(1, 32, 4, 6) for block in range(3)])
        >>> support = affinity.support_tokens([torch.rand(1, 32, 2, 5) for block in range(3)])
        >>> [S.shape for S in affinity(query, support)][0]  # (N, A, Q, S)
        torch.Size([1, 4, 24, 10])
    """

    def __init__(self, channels: int, linear_heads: bool = False, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.query_linear = nn.Linear(channels, channels) if linear_heads else nn.Identity()
        self.support_linear = nn.Linear(channels, channels) if linear_heads else nn.Identity()

    def query_tokens(self, features: list[Tensor]) -> list[Tensor]:
        """Tokens of the queries: L tensors (B, C, hq, wq) -> L tensors (B, A, Q, C/A)."""
        return self.tokens(features, self.query_linear)

    def support_tokens(self, features: list[Tensor]) -> list[Tensor]:
        """Tokens of the supports: L tensors (N, C, hs, ws) -> L tensors (N, A, S, C/A)."""
        return self.tokens(features, self.support_linear)

    def tokens(self, features: list[Tensor], linear: nn.Module) -> list[Tensor]:
        code_PC = position_code(features[0][0, 0].numel(), features[0].shape[1], features[0])
        coded_BPC = (feature.flatten(2).transpose(1, 2) + code_PC for feature in features)
        return [linear(self.dropout(x)).unflatten(2, (HEADS, -1)).transpose(1, 2) for x in coded_BPC]

    def forward(self, query_tokens: list[Tensor], support_tokens: list[Tensor]) -> Iterator[Tensor]:
        """Computes the affinities of N pairs, block by block.

        Args:
            query_tokens: L tensors (N, A, Q, C/A).
            support_tokens: L tensors (N, A, S, C/A).

        Returns:
            L tensors (N, A, Q, S), of any sign and size, which are computed as they are asked for, once.
        """
        return (q @ s.transpose(2, 3) for q, s in zip(query_tokens, support_tokens, strict=True))
