"""PMNet (paper 3.2): frozen backbone, affinity, HSFM, decoder in a row."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.memory import keep_freed_memory
from pmnet.methods.base import Head, Method, Support, resize
from pmnet.methods.pmnet.affinity import HEADS, Affinity
from pmnet.methods.pmnet.decoder import Decoder
from pmnet.methods.pmnet.hsfm import HSFM, Evidence, Norm, coarse_mask
from pmnet.methods.pmnet.lean import pairs_at_a_time

MATCHED = ("layer3", "layer4")  # the stages whose every block gives an affinity


class PMNetHead(Head):
    """All that is learned: 675,362 parameters on a ResNet-50.

    Args:
        channels: feature channels of "layer1".."layer4".
        blocks: number of blocks of "layer3" and "layer4".
        norm: of the B3DConvs, "batch" (paper) or "group" (the authors' program).
        linear_heads: a linear layer each for query and support tokens (the authors' DAM model).
        b3dconvs: False is table 6's "w/o B3DConvs".
        support_background: False is table 6's "w/o Background": support features are multiplied by
            the resized support mask before the affinity.
        dropout: of the matched features, while training.
    """

    def __init__(
        self,
        channels: dict[str, int],
        blocks: dict[str, int],
        norm: Norm = "batch",
        linear_heads: bool = False,
        b3dconvs: bool = True,
        support_background: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if any(channels[layer] % (2 * HEADS) for layer in MATCHED):
            raise ValueError(f"layer3 and layer4 need a multiple of {2 * HEADS} channels: {channels}")
        self.support_background = support_background
        self.affinity = nn.ModuleDict({m: Affinity(channels[m], linear_heads, dropout) for m in MATCHED})
        hsfm = {m: HSFM(blocks[m], norm, b3dconvs) for m in MATCHED}
        self.hsfm = nn.ModuleDict(hsfm)
        self.decoder = Decoder(hsfm["layer3"].out_channels, hsfm["layer4"].out_channels, channels)

    def segment(self, query_feats: Features, seen: Support, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W): background, foreground.

        Args:
            query_feats: "layer1".."layer4" -> lists of (B, C, h, w), one for layer1 and for layer2.
            seen: features of "layer3" and "layer4", and masks.
            size: H, W of the query.
        """
        masks = seen.masks.to(query_feats["layer1"][-1].dtype)
        coarse = {m: self.match(m, query_feats[m], seen.features[m], masks) for m in MATCHED}
        low = query_feats["layer1"][-1], query_feats["layer2"][-1]
        return self.decoder(coarse["layer3"], coarse["layer4"], *low)

    def match(self, layer: str, query: list[Tensor], support: list[Tensor], support_masks: Tensor) -> Tensor:
        """The coarse masks of one stage, (B, C, hq, wq)."""
        B, K = support_masks.shape[:2]
        hq, wq, hs, ws = (*query[0].shape[-2:], *support[0].shape[-2:])
        mask_N1HW = resize(support_masks, (hs, ws)).flatten(0, 1)[:, None]
        supports = [feature.flatten(0, 1) for feature in support]
        if not self.support_background:
            supports = [feature * mask_N1HW for feature in supports]
        affinity, hsfm = cast(Affinity, self.affinity[layer]), self.hsfm[layer]
        query_tokens, support_tokens = affinity.query_tokens(query), affinity.support_tokens(supports)

        def evidence(pairs: slice) -> Evidence:
            episodes = torch.arange(B * K, device=mask_N1HW.device)[pairs] // K
            S = affinity([q[episodes] for q in query_tokens], [s[pairs] for s in support_tokens])
            return hsfm(S, mask_N1HW[pairs].flatten(1), (hq, wq), (hs, ws))

        together = any(module.training for module in hsfm.modules())  # pairs that are normalised by one another
        at_once = B * K if together else pairs_at_a_time(hq * wq * hs * ws, mask_N1HW.device)
        parts = [evidence(slice(i, i + at_once)) for i in range(0, B * K, at_once)]
        found = Evidence(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return coarse_mask(found, K).unflatten(2, (hq, wq))


class PMNet(Method):
    """The whole network. Works on any image size whose sides are multiples of 32, any batch, any shots.

    Args:
        backbone: frozen here: no gradients, always in eval mode.
        head: options of `PMNetHead`: norm, linear_heads, b3dconvs, support_background, dropout.

    Example:
        >>> from pmnet import PMNet, ResNetBackbone
        >>> network = PMNet(ResNetBackbone("resnet18", weights="none")).eval()
        >>> query, support = torch.rand(1, 3, 64, 64), torch.rand(1, 5, 3, 64, 64)
        >>> network(query, support, torch.ones(1, 5, 64, 64)).shape
        torch.Size([1, 2, 64, 64])
        >>> seen = network.see(support, torch.ones(1, 5, 64, 64))  # once, for many queries
        >>> network.segment(torch.rand(8, 3, 64, 64), seen).shape
        torch.Size([8, 2, 64, 64])
    """

    query_reads = {"layer1": "last", "layer2": "last", "layer3": "all", "layer4": "all"}
    support_reads = {"layer3": "all", "layer4": "all"}

    def __init__(self, backbone: Backbone, **head: Any) -> None:
        keep_freed_memory()
        super().__init__(backbone, PMNetHead(backbone.channels, backbone.blocks, **head))
