"""HSNet: hypercorrelations, squeezed by centre-pivot 4D convolutions.

Min, Kang, Cho, "Hypercorrelation Squeeze for Few-Shot Segmentation", ICCV 2021. Published program:
github.com/juhongm999/hsnet at 6b1bc12, without a licence: this code was written from a description of it.

Every block of three stages says how alike each query position is to each position of the masked support. 4D
convolutions squeeze the support plane of each stage to a few positions, and merge the stages from deep to shallow. The
mean over the support positions that are left is decoded to a mask. Several shots vote.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.errors import SettingError
from pmnet.memory import keep_freed_memory
from pmnet.methods.base import Method, resize, size_of
from pmnet.methods.conv4d import CenterPivotConv4d, building_steps
from pmnet.methods.correlation import correlation, masked, occupied, unit
from pmnet.methods.release import filled, inputs
from pmnet.methods.votes import VotingHead

STAGES = ("layer4", "layer3", "layer2")  # from deep to shallow
WIDTHS = (16, 64, 128)  # channels after each step of a squeeze
SQUEEZES = {  # stage -> kernels and support strides of its steps
    "layer4": ((3, 3, 3), (2, 2, 2)),
    "layer3": ((5, 3, 3), (4, 2, 2)),
    "layer2": ((5, 5, 3), (4, 4, 2)),
}


class Seen(NamedTuple):
    """What is remembered of B episodes' supports.

    Attributes:
        units: stage -> list of (B, K, C, h, w), the blocks' unit vectors.
        masks: (B, K, H, W), where the units may be other than zero.
    """

    units: Features
    masks: Tensor


class HSNetHead(VotingHead):
    """All that is learned: 2,573,794 parameters on a ResNet-50. The modules have the names of the authors' program.

    Args:
        blocks: number of blocks of "layer2", "layer3" and "layer4".
    """

    def __init__(self, blocks: Mapping[str, int]) -> None:
        keep_freed_memory()
        super().__init__()
        for stage, (kernels, strides) in SQUEEZES.items():
            self.add_module(f"encoder_{stage}", building_steps((blocks[stage], *WIDTHS), kernels, strides))
        self.encoder_layer4to3, self.encoder_layer3to2 = (
            building_steps((128,) * 4, kernels=(3, 3, 3), strides=(1, 1, 1)) for _ in range(2)
        )
        self.decoder1 = nn.Sequential(conv3(128, 128), nn.ReLU(), conv3(128, 64), nn.ReLU())
        self.decoder2 = nn.Sequential(conv3(64, 64), nn.ReLU(), conv3(64, 2))

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Arguments as those of `Head.see`."""
        units = {m: [unit(masked(f, support_masks)) for f in support_feats[m]] for m in STAGES}
        return Seen(units, support_masks)

    def see_query(self, query_feats: Features) -> Features:
        return {m: [unit(f) for f in query_feats[m]] for m in STAGES}

    def pairs(self, query: Features, support: Seen, size: tuple[int, int]) -> Tensor:
        s4, s3, s2 = (self.squeezed(m, query[m], support.units[m], support.masks) for m in STAGES)
        if len({s.shape[4:] for s in (s4, s3, s2)}) > 1:
            raise SettingError(
                f"{type(self).__name__.removesuffix('Head')} needs a backbone whose layer2, layer3 and layer4 have "
                "strides of 8, 16 and 32: choose another, such as backbone=resnet50."
            )
        x = self.encoder_layer4to3(resized(s4, size_of(query["layer3"][0])) + s3)
        x = self.encoder_layer3to2(resized(x, size_of(query["layer2"][0])) + s2)
        x = self.decoder1(x.mean(dim=(4, 5)))
        h, w = size_of(x)
        return resize(self.decoder2(resize(x, (2 * h, 2 * w))), size)

    def squeezed(self, stage: str, query: list[Tensor], support: list[Tensor], masks_NHW: Tensor) -> Tensor:
        """(N, 128, hq, wq, hs', ws'), a few support positions of each stage."""
        steps, size = cast(nn.Sequential, self.get_submodule(f"encoder_{stage}")), size_of(support[0])
        first = cast(CenterPivotConv4d, steps[0])
        rows, columns = first.box(occupied(masks_NHW, size), size)
        x = first(correlation(query, [s[..., rows, columns] for s in support]))
        return steps[1:](first.whole(x, (rows, columns), size))

    def positions(self, query: Features) -> int:
        return sum(len(blocks) * (blocks[0].shape[-2] * blocks[0].shape[-1]) ** 2 for blocks in query.values())


class HSNet(Method):
    """Takes any number of shots and any image sides.

    Args:
        backbone: with layer2, layer3 and layer4 at strides of 8, 16 and 32.

    Example:
        >>> import torch
        >>> from pmnet.backbones import ResNetBackbone
        >>> from pmnet.methods.hsnet import HSNet
        >>> method = HSNet(ResNetBackbone("resnet18", weights="none")).eval()
        >>> method.predict(torch.rand(1, 3, 72, 80), torch.rand(1, 5, 3, 72, 80), torch.ones(1, 5, 72, 80)).shape
        torch.Size([1, 72, 80])
    """

    protocol = "hsnet"
    query_reads = support_reads = {"layer2": "all", "layer3": "all", "layer4": "all"}
    strides = {"layer2": 8, "layer3": 16, "layer4": 32}
    side_multiple = 1
    ignored = "background"
    head_class: type[HSNetHead] = HSNetHead

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, self.head_class(backbone.blocks))


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, hq, wq, hs, ws), the query plane resized at each support position."""
    N, _, _, _, hs, ws = x.shape
    planes = resize(x.permute(0, 4, 5, 1, 2, 3).flatten(0, 2), size)
    return planes.unflatten(0, (N, hs, ws)).permute(0, 3, 4, 5, 1, 2)


def from_release(state_dict: Mapping[str, Tensor], kind: type[HSNetHead] = HSNetHead) -> HSNetHead:
    """The head, in eval mode, from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored.
        kind: of the head.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = of_head(state_dict)
    return filled(kind({m: inputs(state, f"encoder_{m}.0.conv1.weight") for m in STAGES}), state)


def of_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are none of the backbone's, without their prefixes."""
    state = {re.sub(r"^(module\.|model\.|hpn_learner\.)*", "", k): torch.as_tensor(v) for k, v in state_dict.items()}
    return {name: value for name, value in state.items() if not name.startswith("backbone.")}
