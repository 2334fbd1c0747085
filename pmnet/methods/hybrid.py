"""Hybrid masking of supports (Moon et al., "HM: Hybrid Masking for Few-Shot Segmentation", ECCV 2022).

Published program: github.com/moonsh/HM-Hybrid-Masking-ECCV-2022 at f73e323, without a licence: this code was written
from a description of it. A support passes through the backbone twice: as it is, with its features masked, and as an
image whose background is the mean colour. Each element is the first's where that is positive, and else the second's.
"""

import torch
from torch import Tensor

from pmnet.backbones import Features
from pmnet.errors import SettingError
from pmnet.methods.base import Method, pick
from pmnet.methods.correlation import masked


def hybrid(support_feats: Features, support_masks: Tensor) -> Features:
    """Support features (B, K, C, h, w) of every layer that has a masked pass.

    Args:
        support_feats: "layer3" and the like -> features of the whole images; "layer3_masked" (or "masked_layer3") ->
            those of the masked images.
        support_masks: (B, K, H, W), 0 or 1.

    Raises:
        SettingError: no layer has a masked pass.
    """
    second = {name.replace("masked", "").strip("_"): f for name, f in support_feats.items() if "masked" in name}
    if not second:
        raise SettingError(
            "Hybrid masking also needs the features of the masked support images: support_feats['layer3_masked'] and "
            f"so on, beside {', '.join(support_feats)}."
        )
    chosen: Features = {}
    for layer, of_masked_image in second.items():
        whole = [masked(feature, support_masks) for feature in support_feats[layer]]
        chosen[layer] = [torch.where(f > 0, f, i) for f, i in zip(whole, of_masked_image, strict=True)]
    return chosen


def masked_pass(method: Method, support: Tensor, support_masks: Tensor) -> Features:
    """Features of the masked support images: "layer3_masked" and so on -> list of (B, K, C, h, w).

    Args:
        method: whose `of_supports` adds them to its supports' features; it reads `support_reads`.
        support: (B, K, 3, H, W), uint8 or normalised.
        support_masks: (B, K, H, W), 0 or 1.
    """
    images, backbone = support.flatten(0, 1), method.backbone
    if images.dtype == torch.uint8:
        images = ((images / 255 - backbone.mean) / backbone.std).to(backbone.mean.dtype)
    images = images * support_masks.flatten(0, 1)[:, None].to(images.dtype)  # 0 is the mean colour
    passed = pick(method.backbone_pass(images, method.support_reads), method.support_reads)
    return {f"{layer}_masked": [f.unflatten(0, support.shape[:2]) for f in blocks] for layer, blocks in passed.items()}
