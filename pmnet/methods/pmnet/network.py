"""PMNet (paper 3.2): frozen backbone, affinity, HSFM and decoder."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.errors import SettingError
from pmnet.memory import keep_freed_memory
from pmnet.methods.base import Head, Method, Support, resize, size_of
from pmnet.methods.nearest import NearestHead
from pmnet.methods.pmnet.affinity import HEADS, Affinity
from pmnet.methods.pmnet.decoder import Decoder
from pmnet.methods.pmnet.hsfm import HSFM, Evidence, Norm, coarse_mask
from pmnet.methods.pmnet.parts import in_parts, pairs_at_a_time
from pmnet.methods.prototype import PrototypeHead

MATCHED = ("layer3", "layer4")  # stages in which every block yields an affinity
FLOORS: dict[str, type[Head]] = {"prototype": PrototypeHead, "nearest": NearestHead}


class PMNetHead(Head):
    """The trained part of PMNet: 675,362 parameters on a ResNet-50.

    Args:
        channels: feature channels of "layer1" to "layer4"; those of layer3 and layer4 are multiples of 8.
        blocks: number of blocks of "layer3" and "layer4".
        norm: normalisation of the B3DConvs, "batch" (paper) or "group" (the authors' program).
        linear_heads: apply a linear layer to the query tokens and one to the support tokens (the authors' DAM model).
        b3dconvs: False is table 6's "w/o B3DConvs".
        support_background: False is table 6's "w/o Background": support features are multiplied by the resized support
            mask before the affinity.
        dropout: dropout rate of the matched features in training.
        evidence: training-free methods, of "prototype" and "nearest", whose logits on layer3 and layer4 are further
            coarse masks. The sum of those on layer4 is added to the decoder's logits, which start at zero: so the head
            starts as good as that sum, and learns what to change. Not in the paper; none by default.

    Raises:
        SettingError: unknown norm or evidence, or channels that cannot be split into heads.

    Example:
        >>> from pmnet import PMNetHead
        >>> channels = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
        >>> head = PMNetHead(channels, {"layer3": 6, "layer4": 3})
        >>> sum(parameter.numel() for parameter in head.parameters())
        675362
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
        evidence: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if unknown := set(evidence) - FLOORS.keys():
            raise SettingError(f"model.evidence={sorted(unknown)[0]} is not one of {', '.join(FLOORS)}.")
        if any(channels[layer] % (2 * HEADS) for layer in MATCHED):
            raise SettingError(
                f"PMNet needs a backbone whose layer3 and layer4 have a multiple of {2 * HEADS} channels, not "
                f"{channels['layer3']} and {channels['layer4']}: choose another, such as backbone=resnet50."
            )
        self.support_background = support_background
        self.affinity = nn.ModuleDict({m: Affinity(channels[m], linear_heads, dropout) for m in MATCHED})
        hsfm = {m: HSFM(blocks[m], norm, b3dconvs) for m in MATCHED}
        self.hsfm = nn.ModuleDict(hsfm)
        coarse3, coarse4 = (hsfm[m].out_channels + len(evidence) for m in MATCHED)
        self.decoder = Decoder(coarse3, coarse4, channels)
        self.floors = {m: [FLOORS[name](m) for name in evidence] for m in MATCHED}  # a plain dict: nothing to save
        if evidence:
            last = cast(nn.Conv2d, self.decoder.mixer3[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast(Tensor, last.bias))

    def segment(self, query_feats: Features, seen: Support, size: tuple[int, int]) -> Tensor:
        """Segments queries, given what `see` returned.

        Args:
            query_feats: "layer1" to "layer4" -> list of (B, C, h, w); only the last of layer1 and of layer2 is used.
            seen: features of "layer3" and "layer4" -> list of (B, K, C, h, w), and masks (B, K, H, W).
            size: H, W of the query.

        Returns:
            Logits (B, 2, H, W): background, foreground.
        """
        masks = seen.masks.to(query_feats["layer1"][-1].dtype)
        coarse = {m: self.match(m, query_feats[m], seen.features[m], masks) for m in MATCHED}
        low = query_feats["layer1"][-1], query_feats["layer2"][-1]
        floors = {m: self.evidence(m, query_feats, seen) for m in MATCHED}
        masks34 = (torch.cat([coarse[m], *(x[:, 1:] - x[:, :1] for x in floors[m])], dim=1) for m in MATCHED)
        return sum((resize(x, size) for x in floors["layer4"]), self.decoder(*masks34, *low))

    def evidence(self, layer: str, query_feats: Features, seen: Support) -> list[Tensor]:
        """The logits (B, 2, hq, wq) of each training-free method on one stage."""
        size = size_of(query_feats[layer][-1])
        return [floor.segment(query_feats, floor.see(*seen), size) for floor in self.floors[layer]]

    def match(self, layer: str, query: list[Tensor], support: list[Tensor], support_masks: Tensor) -> Tensor:
        """Computes the coarse masks of one stage.

        Args:
            layer: "layer3" or "layer4".
            query: L tensors (B, C, hq, wq).
            support: L tensors (B, K, C, hs, ws).
            support_masks: (B, K, H, W), 0 or 1, in the features' dtype.

        Returns:
            (B, 16, hq, wq), values in [0, 1]; L channels without B3DConvs.
        """
        B, K = support_masks.shape[:2]
        hq, wq, hs, ws = (*query[0].shape[-2:], *support[0].shape[-2:])
        mask_N1HW = resize(support_masks, (hs, ws)).flatten(0, 1)[:, None]
        supports = [feature.flatten(0, 1) for feature in support]
        if not self.support_background:
            supports = [feature * mask_N1HW for feature in supports]
        affinity, hsfm = cast(Affinity, self.affinity[layer]), cast(HSFM, self.hsfm[layer])
        query_tokens, support_tokens = affinity.query_tokens(query), affinity.support_tokens(supports)

        def evidence(pairs: slice) -> Evidence:
            episodes = torch.arange(B * K, device=device)[pairs] // K
            queries, shots = [q[episodes] for q in query_tokens], [s[pairs] for s in support_tokens]
            mask_NS = mask_N1HW[pairs].flatten(1)

            def of(heads: slice, rows: slice) -> Evidence:
                Q = slice(rows.start * wq, rows.stop * wq)
                S = affinity([q[:, heads, Q] for q in queries], [s[:, heads] for s in shots])
                return hsfm(S, mask_NS, (rows.stop - rows.start, wq), (hs, ws))

            everything = slice(0, HEADS), slice(0, hq)
            return of(*everything) if together else in_parts(of, (hq, wq), hs * ws, hsfm.halo, device)

        device = mask_N1HW.device
        together = any(module.training for module in hsfm.modules())  # batch statistics need all pairs
        at_once = B * K if together else pairs_at_a_time(hq * wq * hs * ws, device)
        parts = [evidence(slice(i, i + at_once)) for i in range(0, B * K, at_once)]
        found = Evidence(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return coarse_mask(found, K).unflatten(2, (hq, wq))


class PMNet(Method):
    """The whole network. Takes any batch size, any number of shots, and image sides that are multiples of 32.

    Args:
        backbone: any backbone; PMNet freezes it: no gradients, always in eval mode.
        head: options of `PMNetHead`: norm, linear_heads, b3dconvs, support_background, dropout, evidence.

    Example:
        >>> import torch
        >>> from pmnet import PMNet, ResNetBackbone
        >>> network = PMNet(ResNetBackbone("resnet18", weights="none")).eval()
        >>> query, support = torch.rand(1, 3, 64, 64), torch.rand(1, 5, 3, 64, 64)
        >>> network(query, support, torch.ones(1, 5, 64, 64)).shape
        torch.Size([1, 2, 64, 64])
        >>> seen = network.see(support, torch.ones(1, 5, 64, 64))  # once, for many queries
        >>> network.segment(torch.rand(8, 3, 64, 64), seen).shape
        torch.Size([8, 2, 64, 64])
    """

    protocol = "hsnet"
    query_reads = {"layer1": "last", "layer2": "last", "layer3": "all", "layer4": "all"}
    support_reads = {"layer3": "all", "layer4": "all"}
    strides = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}

    def __init__(self, backbone: Backbone, **head: Any) -> None:
        keep_freed_memory()
        super().__init__(backbone, PMNetHead(backbone.channels, backbone.blocks, **head))
