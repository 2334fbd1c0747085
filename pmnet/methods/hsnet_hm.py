"""HSNet-HM: HSNet with hybrid masking of the supports.

Moon et al., "HM: Hybrid Masking for Few-Shot Segmentation", ECCV 2022. Published program:
github.com/moonsh/HM-Hybrid-Masking-ECCV-2022 at f73e323, without a licence: this code was written from a description of
it. See `hybrid.py` for the masking and `hsnet.py` for the network, which has the same parameters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pmnet.backbones import Features
from pmnet.methods import hsnet
from pmnet.methods.correlation import unit
from pmnet.methods.hsnet import STAGES, HSNet, HSNetHead, Seen
from pmnet.methods.hybrid import hybrid, masked_pass


class HSNetHMHead(HSNetHead):
    """Also takes the features of the masked support images: "layer3_masked" (or "masked_layer3") and so on."""

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        chosen = hybrid(support_feats, support_masks)
        everywhere = torch.ones_like(support_masks)  # a masked image has features in its background too
        return Seen({m: [unit(f) for f in chosen[m]] for m in STAGES}, everywhere)


class HSNetHM(HSNet):
    """Takes any number of shots and any image sides. Supports pass through the backbone twice.

    Args:
        backbone: with layer2, layer3 and layer4 at strides of 8, 16 and 32.

    Example:
        >>> import torch
        >>> from pmnet.backbones import ResNetBackbone
        >>> from pmnet.methods.hsnet_hm import HSNetHM
        >>> method = HSNetHM(ResNetBackbone("resnet18", weights="none")).eval()
        >>> method.predict(torch.rand(1, 3, 72, 80), torch.rand(1, 5, 3, 72, 80), torch.ones(1, 5, 72, 80)).shape
        torch.Size([1, 72, 80])
    """

    head_class = HSNetHMHead
    title = "HSNet-HM"

    def of_supports(self, support_feats: Features, support: Tensor, support_masks: Tensor) -> Features:
        whole = super().of_supports(support_feats, support, support_masks)
        return {**whole, **masked_pass(self, support, support_masks)}


def from_release(state_dict: Mapping[str, Tensor]) -> HSNetHead:
    """The head, in eval mode, from the authors' tensor names; see `hsnet.from_release`."""
    return hsnet.from_release(state_dict, HSNetHMHead)
