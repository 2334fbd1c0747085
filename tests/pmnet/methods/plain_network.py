"""PMNet's head written with PyTorch's ready operations, formula after formula: what speed and memory are compared with.

Takes no care of memory layout, keeps every intermediate result, and convolves as the paper words it: Conv3d whose depth
axis is the other image's pixels. Unlike `plain.py` it is no loop over pixels, so that it runs at 384x384.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Features
from pmnet.methods.pmnet.affinity import position_code

HEADS = 4


def plain_network_head(head: Any, query_feats: Features, support_feats: Features, support_masks: Tensor) -> Tensor:
    """Logits (B, 2, H, W) of a `PMNetHead` (default variant) in its own mode; arguments as those of its `forward`."""
    masks = support_masks.to(query_feats["layer1"][0].dtype)
    coarse = {}
    for layer in ("layer3", "layer4"):
        dropout = head.affinity[layer].dropout
        over_shots, mask_over_shots = [], []
        for k in range(masks.shape[1]):
            S = torch.stack(
                [
                    affinity(query, support[:, k], dropout)
                    for query, support in zip(query_feats[layer], support_feats[layer], strict=True)
                ],
                dim=2,
            )  # (B, A, L, hq, wq, hs, ws)
            (B, A), (hs, ws) = S.shape[:2], S.shape[-2:]
            S = S.flatten(0, 1)
            for b3dconv in head.hsfm[layer].b3dconvs:
                S = enhance(b3dconv, S)
            over_shots.append(S.flatten(4).unflatten(0, (B, A)))
            mask = F.interpolate(masks[:, k, None], (hs, ws), mode="bilinear", align_corners=True)
            mask_over_shots.append(mask.flatten(1))
        weights = torch.cat(over_shots, dim=-1).softmax(dim=-1)  # (B, A, C, hq, wq, K*hs*ws)
        mask = torch.cat(mask_over_shots, dim=-1)
        coarse[layer] = (weights * mask[:, None, None, None, None]).sum(dim=-1).mean(dim=1)
    low = query_feats["layer1"][-1], query_feats["layer2"][-1]
    return decode(head.decoder, coarse["layer3"], coarse["layer4"], *low)


def affinity(query: Tensor, support: Tensor, dropout: nn.Module) -> Tensor:
    """(B, C, hq, wq) and (B, C, hs, ws) -> (B, A, hq, wq, hs, ws)."""
    tokens = []
    for feature in (query, support):
        token = feature.flatten(2).transpose(1, 2)
        token = dropout(token + position_code(token.shape[1], token.shape[2], token))
        tokens.append(token.unflatten(2, (HEADS, -1)))
    S = torch.einsum("bqac,bsac->baqs", *tokens)
    return S.unflatten(3, support.shape[-2:]).unflatten(2, query.shape[-2:])


def enhance(b3dconv: Any, S: Tensor) -> Tensor:
    """(N, C, hq, wq, hs, ws) -> (N, C', hq, wq, hs, ws): eq. 2, each convolution over 3 axes of an own layout."""
    N, _, hq, wq, hs, ws = S.shape
    query, support = b3dconv.query_conv, b3dconv.support_conv
    pad = query.kernel_size[0] // 2
    over_query = F.conv3d(  # depth: support pixels; plane: query
        S.permute(0, 1, 4, 5, 2, 3).reshape(N, -1, hs * ws, hq, wq),
        query.weight.permute(0, 1, 4, 2, 3),
        query.bias,
        padding=(0, pad, pad),
    )
    over_query = over_query.unflatten(2, (hs, ws)).permute(0, 1, 4, 5, 2, 3)
    over_support = F.conv3d(  # depth: query pixels; plane: support
        S.reshape(N, -1, hq * wq, hs, ws), support.weight, support.bias, padding=(0, pad, pad)
    )
    enhanced = over_query + over_support.unflatten(2, (hq, wq))
    return F.relu(b3dconv.norm(enhanced.flatten(2, 3).contiguous())).unflatten(2, (hq, wq))


def decode(decoder: Any, coarse3: Tensor, coarse4: Tensor, layer1: Tensor, layer2: Tensor) -> Tensor:
    m = decoder.conv2_a(up2(decoder.conv1_4(coarse4)) + decoder.conv1_3(coarse3))
    m = decoder.conv2_b(up2(m))
    m = torch.cat([up2(torch.cat([m, layer2], dim=1)), layer1], dim=1)
    for mixer in (decoder.mixer1, decoder.mixer2, decoder.mixer3):
        for conv in (mixer[0], mixer[2]):
            m = F.conv2d(m, conv.weight, conv.bias, padding=1)
            if conv.out_channels != 2:
                m = F.relu(m)
        m = m if mixer is decoder.mixer3 else up2(m)
    return m


def up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
