"""Decoder (paper 3.4; Conv1, Conv2 and the classifier head as in the authors' program)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.methods.base import resize

FEW = 4  # coarse channels for each output channel; below, nine small products take longer than one large convolution


def C(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution with bias, GroupNorm(4), ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2),
        nn.GroupNorm(4, out_channels),
        nn.ReLU(inplace=True),
    )


class Conv1(nn.Module):
    """Processes the coarse mask of a stage at several receptive fields: (B, C, h, w) -> (B, 64, h, w).

    Args:
        in_channels: channels of the coarse mask.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.a = C(in_channels, 16, 3)
        self.b_wide, self.b_point = C(16, 16, 3), C(16, 16, 1)
        self.c_wide, self.c_point = C(32, 32, 3), C(32, 32, 1)
        self.out = C(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([self.b_wide(x), self.b_point(x)], dim=1)
        x = torch.cat([self.c_wide(x), self.c_point(x)], dim=1)
        return self.out(x)


class Conv2(nn.Module):
    """Fuses features at one scale, (B, 64, h, w) -> (B, 64, h, w), in separate groups of 32, 16 and 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.x1, self.x2 = C(32, 32, 1), C(32, 32, 3)
        self.y1, self.y2 = C(16, 16, 1), nn.Sequential(C(16, 16, 3), C(16, 16, 3))
        self.out = C(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        y1, y2 = self.x2(x2).chunk(2, dim=1)
        return self.out(torch.cat([self.x1(x1), self.y1(y1), self.y2(y2)], dim=1))


def mixer(*channels: int, last: bool = False) -> nn.Sequential:
    """Two 3x3 convolutions of the classifier head, each with a ReLU, except after the last one of the network.

    Args:
        channels: of the input, between the convolutions, of the output.
        last: leave out the second ReLU.
    """
    i, m, o = channels
    layers = [nn.Conv2d(i, m, 3, padding=1), nn.ReLU(), nn.Conv2d(m, o, 3, padding=1)]
    return nn.Sequential(*layers) if last else nn.Sequential(*layers, nn.ReLU())


class Decoder(nn.Module):
    """Turns the coarse masks of layer3 and layer4 and the query's low-level features into logits.

    Args:
        coarse3: channels of the coarse mask of layer3.
        coarse4: channels of the coarse mask of layer4.
        channels: feature channels of "layer1" and "layer2".

    Example:
        >>> decoder = Decoder(16, 16, {"layer1": 24, "layer2": 48})
        >>> coarse3, coarse4 = torch.rand(1, 16, 4, 6), torch.rand(1, 16, 2, 3)
        >>> decoder(coarse3, coarse4, torch.rand(1, 24, 16, 24), torch.rand(1, 48, 8, 12)).shape
        torch.Size([1, 2, 64, 96])
    """

    def __init__(self, coarse3: int, coarse4: int, channels: dict[str, int]) -> None:
        super().__init__()
        self.conv1_3, self.conv1_4 = Conv1(coarse3), Conv1(coarse4)
        self.conv2_a, self.conv2_b = Conv2(), Conv2()
        self.mixer1 = mixer(64 + channels["layer2"] + channels["layer1"], 64, 32)
        self.mixer2 = mixer(32, 32, 16)
        self.mixer3 = mixer(16, 16, 2, last=True)

    def forward(self, coarse3: Tensor, coarse4: Tensor, layer1: Tensor, layer2: Tensor) -> Tensor:
        """Computes the logits of B images of H x W pixels.

        Args:
            coarse3: (B, C, H/16, W/16), values in [0, 1].
            coarse4: (B, C, H/32, W/32), values in [0, 1].
            layer1: the query's features (B, C, H/4, W/4).
            layer2: the query's features (B, C, H/8, W/8).

        Returns:
            Logits (B, 2, H, W): background, foreground.
        """
        m = self.conv2_a(up2(self.conv1_4(coarse4)) + self.conv1_3(coarse3))
        m = self.conv2_b(up2(m))
        first: Any = self.mixer1[0]
        m = self.mixer1[1:](fused(first, torch.cat([m, layer2], dim=1), layer1))
        return self.mixer3(up2(self.mixer2(up2(m))))


def fused(conv: nn.Conv2d, coarse: Tensor, fine: Tensor) -> Tensor:
    """Computes conv(cat[up2(coarse), fine]) of a 3x3 convolution; with many coarse channels, in about half the time.

    A product over channels commutes with resizing. Each of the kernel's nine products is computed on the small map,
    resized, and added at its offset.

    Args:
        conv: 3x3 convolution with padding 1.
        coarse: (B, C, h, w).
        fine: (B, C', 2h, 2w).

    Returns:
        (B, C'', 2h, 2w).
    """
    if coarse.shape[1] < FEW * conv.out_channels:
        return conv(torch.cat([up2(coarse), fine], dim=1))
    of_coarse, of_fine = conv.weight.split([coarse.shape[1], fine.shape[1]], dim=1)
    nine = of_coarse.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)[..., None, None]
    resized = up2(F.conv2d(coarse, nine)).flatten(2)
    added = F.fold(resized, (fine.shape[2], fine.shape[3]), kernel_size=3, padding=1)
    return added + F.conv2d(fine, of_fine, conv.bias, padding=1)


def up2(x: Tensor) -> Tensor:
    """Doubles the size: (B, C, h, w) -> (B, C, 2h, 2w)."""
    return resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))
