"""PMNet (paper 3.2): frozen backbone, affinity, HSFM, decoder in a row."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.memory import keep_freed_memory
from pmnet.methods.pmnet.affinity import HEADS, Affinity
from pmnet.methods.pmnet.decoder import Decoder
from pmnet.methods.pmnet.hsfm import HSFM, Evidence, Norm, coarse_mask, resize
from pmnet.methods.pmnet.lean import pairs_at_a_time

MATCHED = ("layer3", "layer4")  # the stages whose every block gives an affinity


class PMNetHead(nn.Module):
    """All that is learned: 675,362 parameters on a ResNet-50.

    Args:
        channels: feature channels of "layer1".."layer4".
        blocks: number of blocks of "layer3" and "layer4".
        norm: of the B3DConvs, "batch" (paper) or "group" (the authors' program).
        linear_heads: a linear layer for query and for support tokens (the authors' DAM model).
        b3dconvs: False is table 6's "w/o B3DConvs".
        support_background: False is table 6's "w/o Background": support features are multiplied by
            the resized support mask before the affinity.
        dropout: of the features that are matched, while training.
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

    def forward(self, query_feats: Features, support_feats: Features, support_masks: Tensor) -> Tensor:
        """
        Args:
            query_feats: "layer1".."layer4" -> lists of (B, C, h, w), one for layer1 and for layer2.
            support_feats: "layer3", "layer4" -> lists of (B, K, C, h, w).
            support_masks: (B, K, H, W), 0 or 1, any dtype.

        Returns:
            Logits (B, 2, H, W): background, foreground.
        """
        support_masks = support_masks.to(query_feats["layer1"][0].dtype)
        coarse = {m: self.match(m, query_feats[m], support_feats[m], support_masks) for m in MATCHED}
        return self.decoder(coarse["layer3"], coarse["layer4"], query_feats["layer1"][-1], query_feats["layer2"][-1])

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


class Support(NamedTuple):
    """What the backbone has seen of B episodes' supports.

    Attributes:
        features: "layer3", "layer4" -> lists of (B, K, C, h, w).
        masks: (B, K, H, W).
    """

    features: Features
    masks: Tensor


class PMNet(nn.Module):
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

    def __init__(self, backbone: Backbone, **head: Any) -> None:
        super().__init__()
        keep_freed_memory()
        self.backbone = backbone.freeze().to(memory_format=torch.channels_last)
        self.head = PMNetHead(backbone.channels, backbone.blocks, **head)

    def forward(self, query: Tensor, support: Tensor, support_masks: Tensor) -> Tensor:
        """
        Args:
            query: (B, 3, H, W): uint8 in 0..255, or float already normalised with ImageNet's mean and std.
            support: (B, K, 3, H, W), likewise.
            support_masks: (B, K, H, W), 0 or 1, any dtype.

        Returns:
            Logits (B, 2, H, W): background, foreground.

        Raises:
            ValueError: a side is no multiple of 32, or the shapes do not belong together.
        """
        B, K = support.shape[:2]
        check_sides(query, support)
        if query.shape[0] != B or support_masks.shape[:2] != (B, K):
            raise ValueError(
                "want query (B,3,H,W), support (B,K,3,H,W), masks (B,K,H,W), got "
                f"{tuple(query.shape)}, {tuple(support.shape)}, {tuple(support_masks.shape)}"
            )
        query_feats, support_feats = self.features(query, support.flatten(0, 1))
        return self.head(query_feats, by_shot(support_feats, B, K), support_masks)

    @torch.no_grad()
    def see(self, support: Tensor, support_masks: Tensor) -> Support:
        """Passes supports through the backbone, for `segment`.

        Args:
            support, support_masks: as those of `forward`.
        """
        B, K = support.shape[:2]
        check_sides(support)
        if support_masks.shape[:2] != (B, K):
            raise ValueError(f"want masks ({B},{K},H,W), got {tuple(support_masks.shape)}")
        return Support(by_shot(self.backbone(support.flatten(0, 1)), B, K), support_masks)

    def segment(self, query: Tensor, support: Support) -> Tensor:
        """As `forward`, with supports that were seen before: those of one episode go with any number of queries.

        Args:
            query: (B, 3, H, W); as many as the supports' episodes, unless that is one.

        Returns:
            Logits (B, 2, H, W): background, foreground.
        """
        check_sides(query)
        B, (episodes, K) = len(query), support.masks.shape[:2]
        if episodes not in (1, B):
            raise ValueError(f"{B} queries do not go with the supports of {episodes} episodes")
        with torch.no_grad():
            query_feats = self.backbone(query)
        seen = {m: [f.expand(B, *f.shape[1:]) for f in blocks] for m, blocks in support.features.items()}
        return self.head(query_feats, seen, support.masks.expand(B, K, -1, -1))

    @torch.no_grad()
    def features(self, query: Tensor, support: Tensor) -> tuple[Features, Features]:
        """The backbone's, of both in one pass where they have the same size."""
        if (query.shape[1:], query.dtype) != (support.shape[1:], support.dtype):
            return self.backbone(query), self.backbone(support)
        both = self.backbone(torch.cat([query, support]))
        split = {layer: [f.split([len(query), len(support)]) for f in blocks] for layer, blocks in both.items()}
        query_feats, support_feats = ({m: [f[i] for f in blocks] for m, blocks in split.items()} for i in (0, 1))
        return query_feats, support_feats


def check_sides(*images: Tensor) -> None:
    sides = tuple(side for image in images for side in image.shape[-2:])
    if any(side % 32 for side in sides):
        raise ValueError(f"image sides must be multiples of 32, not {sides}")


def by_shot(features: Features, B: int, K: int) -> Features:
    """Of B*K supports, what is matched: (B, K, C, h, w)."""
    return {layer: [feature.unflatten(0, (B, K)) for feature in features[layer]] for layer in MATCHED}
