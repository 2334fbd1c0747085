"""PMNet's head, written a second time: slow, literal, one formula after the other.

Shares no code with `pmnet/`: of a `PMNetHead` it reads the tensors and the one option that leaves no tensor.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = 4


def plain_head(head, query_feats, support_feats, support_masks) -> Tensor:
    """Logits (B, 2, H, W) of a head in eval mode; arguments as those of `PMNetHead.forward`. Has gradients."""
    weights = head.state_dict(keep_vars=True)
    masks = support_masks.to(query_feats["layer1"][0].dtype)
    coarse = {"layer3": [], "layer4": []}
    for layer, episodes in coarse.items():
        for b in range(len(masks)):
            shots = []
            for k in range(masks.shape[1]):
                query = [block[b] for block in query_feats[layer]]
                support = [block[b, k] for block in support_feats[layer]]
                if not head.support_background:
                    support = [block * bilinear(masks[b, k][None], block.shape[-2:]) for block in support]
                S = affinity(weights, layer, query, support)
                shots.append([enhance(weights, layer, S_of_head) for S_of_head in S])
            size = support_feats[layer][0].shape[-2:]
            mask = torch.cat([bilinear(m[None], size).flatten() for m in masks[b]])
            heads = [coarse_mask([shot[a] for shot in shots], mask) for a in range(HEADS)]
            episodes.append(sum(heads) / HEADS)
    coarse3, coarse4 = (torch.stack(episodes) for episodes in coarse.values())
    return decode(weights, coarse3, coarse4, query_feats["layer1"][-1], query_feats["layer2"][-1])


def position_code(tokens: int, channels: int) -> Tensor:
    code = [
        [(math.cos if c % 2 else math.sin)(t / 10000 ** (2 * (c // 2) / channels)) for c in range(channels)]
        for t in range(tokens)
    ]
    return torch.tensor(code, dtype=torch.float64)


def tokens_of(feature: Tensor) -> Tensor:
    """(C, h, w) -> (h*w, C), row after row, with the position code."""
    rows = [feature[:, i, j] for i in range(feature.shape[1]) for j in range(feature.shape[2])]
    return torch.stack(rows) + position_code(len(rows), feature.shape[0]).to(feature.dtype)


def affinity(weights, layer: str, query: list[Tensor], support: list[Tensor]) -> list[Tensor]:
    """One (L, hq, wq, hs, ws) for each head."""
    size = (*query[0].shape[-2:], *support[0].shape[-2:])
    heads = [[] for _ in range(HEADS)]
    for query_block, support_block in zip(query, support, strict=True):
        q, s = tokens_of(query_block), tokens_of(support_block)
        if f"affinity.{layer}.query_linear.weight" in weights:
            q, s = (
                tokens @ weights[f"affinity.{layer}.{side}_linear.weight"].T
                + weights[f"affinity.{layer}.{side}_linear.bias"]
                for side, tokens in (("query", q), ("support", s))
            )
        width = q.shape[1] // HEADS
        for a, blocks in enumerate(heads):
            of_head = slice(a * width, (a + 1) * width)
            blocks.append((q[:, of_head] @ s[:, of_head].T).reshape(size))
    return [torch.stack(blocks) for blocks in heads]


def enhance(weights, layer: str, S: Tensor) -> Tensor:
    """Both B3DConvs, on the affinity of one shot and one head."""
    for i in range(2):
        name = f"hsfm.{layer}.b3dconvs.{i}."
        if name + "query_conv.weight" in weights:
            S = b3dconv({key.removeprefix(name): w for key, w in weights.items() if key.startswith(name)}, S)
    return S


def b3dconv(weights, S: Tensor) -> Tensor:
    _, hq, wq, hs, ws = S.shape
    over_query, over_support = weights["query_conv.weight"][..., 0], weights["support_conv.weight"][:, :, 0]
    pad = over_query.shape[-1] // 2
    out = S.new_zeros(len(over_query), hq, wq, hs, ws)
    for i in range(hs):
        for j in range(ws):
            out[:, :, :, i, j] += F.conv2d(S[:, :, :, i, j], over_query, weights["query_conv.bias"], padding=pad)
    for i in range(hq):
        for j in range(wq):
            out[:, i, j] += F.conv2d(S[:, i, j], over_support, weights["support_conv.bias"], padding=pad)
    if "norm.running_mean" in weights:
        scale = weights["norm.weight"] / (weights["norm.running_var"] + 1e-5).sqrt()
        shift = weights["norm.bias"] - weights["norm.running_mean"] * scale
        out = out * scale.view(-1, 1, 1, 1, 1) + shift.view(-1, 1, 1, 1, 1)
    else:
        out = F.group_norm(out[None], 4, weights["norm.weight"], weights["norm.bias"])[0]
    return out.clamp(min=0)


def coarse_mask(shots: list[Tensor], mask: Tensor) -> Tensor:
    """K affinities (C, hq, wq, hs, ws) and the mask of their K*hs*ws pixels -> (C, hq, wq)."""
    C, hq, wq = shots[0].shape[:3]
    rows = []
    for c in range(C):
        for i in range(hq):
            for j in range(wq):
                over_supports = torch.cat([shot[c, i, j].flatten() for shot in shots])
                rows.append((over_supports.softmax(0) * mask).sum())
    return torch.stack(rows).view(C, hq, wq)


def decode(weights, coarse3: Tensor, coarse4: Tensor, layer1: Tensor, layer2: Tensor) -> Tensor:
    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights[f"decoder.{name}.bias"], padding=weight.shape[-1] // 2)

    def C(name: str, x: Tensor) -> Tensor:
        norm = weights[f"decoder.{name}.1.weight"], weights[f"decoder.{name}.1.bias"]
        return F.relu(F.group_norm(conv(f"{name}.0", x), 4, *norm))

    def conv1(name: str, x: Tensor) -> Tensor:
        a = C(f"{name}.a", x)
        b = torch.cat([C(f"{name}.b_wide", a), C(f"{name}.b_point", a)], dim=1)
        c = torch.cat([C(f"{name}.c_wide", b), C(f"{name}.c_point", b)], dim=1)
        return C(f"{name}.out", c)

    def conv2(name: str, x: Tensor) -> Tensor:
        x1, x2 = C(f"{name}.x1", x[:, :32]), C(f"{name}.x2", x[:, 32:])
        y1, y2 = C(f"{name}.y1", x2[:, :16]), C(f"{name}.y2.1", C(f"{name}.y2.0", x2[:, 16:]))
        return C(f"{name}.out", torch.cat([x1, y1, y2], dim=1))

    m4 = up2(conv1("conv1_4", coarse4))
    m = conv2("conv2_a", m4 + conv1("conv1_3", coarse3))
    m = conv2("conv2_b", up2(m))
    m = torch.cat([up2(torch.cat([m, layer2], dim=1)), layer1], dim=1)
    m = up2(F.relu(conv("mixer1.2", F.relu(conv("mixer1.0", m)))))
    m = up2(F.relu(conv("mixer2.2", F.relu(conv("mixer2.0", m)))))
    return conv("mixer3.2", F.relu(conv("mixer3.0", m)))


def bilinear(x: Tensor, size) -> Tensor:
    """(C, H, W) -> (C, h, w), corners aligned."""
    return F.interpolate(x[None], size=tuple(size), mode="bilinear", align_corners=True)[0]


def up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
