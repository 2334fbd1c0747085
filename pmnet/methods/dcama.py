"""DCAMA: dense cross-query-and-support attention, weighted by the supports' masks.

Shi et al., "Dense Cross-Query-and-Support Attention Weighted Mask Aggregation for Few-Shot Segmentation", ECCV 2022.
Published program: github.com/pawn-sxy/DCAMA at 37fa053, without a licence: this code was written from a description of
it.

Each block of three stages makes a coarse mask of the query: at every query position the mean of the support's mask,
weighted by attention. Several shots are joined inside the softmax. Convolutions merge the coarse masks from deep to
shallow, and mix them with low-level features of query and support.

Axes: N attention heads of all episodes, D channels of a head, S support positions of all shots; more in `base.py`.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pmnet.backbones import Backbone, Features
from pmnet.errors import CheckpointError, SettingError
from pmnet.memory import keep_freed_memory
from pmnet.methods.base import Head, Method, resize, size_of
from pmnet.methods.pmnet.affinity import Dropout, position_code
from pmnet.methods.release import filled

STAGES = ("layer2", "layer3", "layer4")
HEADS = 8
DROPOUT = 0.5  # of the tokens and of the attention, while training
SCORES_ON_CPU, SCORES_ELSEWHERE = 2**20, 2**28  # that are computed at a time


class Seen(NamedTuple):
    """What is remembered of B episodes' supports.

    Attributes:
        keys: stage -> list of (B, S, C), one for each block.
        values: stage -> (B, S), the masks at the stage's size.
        low: (B, 128, h, w) at layer1's size, what their low-level features add to the first mixing convolution.
    """

    keys: Features
    values: dict[str, Tensor]
    low: Tensor


class DCAMAHead(Head):
    """All that is learned: 14,215,394 parameters on a ResNet-50. The modules have the names of the authors' program.

    Args:
        channels: feature channels of "layer1".."layer4".
        blocks: number of blocks of "layer2".."layer4".

    Raises:
        SettingError: the channels of a stage cannot be split into heads.
    """

    def __init__(self, channels: Mapping[str, int], blocks: Mapping[str, int]) -> None:
        keep_freed_memory()
        super().__init__()
        if any(channels[m] % HEADS for m in STAGES):
            raise SettingError(
                f"DCAMA needs a backbone whose layer2, layer3 and layer4 have a multiple of {HEADS} channels, not "
                f"{', '.join(str(channels[m]) for m in STAGES)}."
            )
        self.DCAMA_blocks = nn.ModuleList(Attention(channels[m]) for m in STAGES)
        self.conv1 = building_steps((blocks["layer4"], 16, 64, 128), kernels=(3, 3, 3))
        self.conv2 = building_steps((blocks["layer3"], 16, 64, 128), kernels=(5, 3, 3))
        self.conv3 = building_steps((blocks["layer2"], 16, 64, 128), kernels=(5, 5, 3))
        self.conv4, self.conv5 = (building_steps((128,) * 4, kernels=(3, 3, 3)) for _ in range(2))
        self.parts = (128, channels["layer2"], channels["layer2"], channels["layer1"], channels["layer1"])
        self.mixer1 = nn.Sequential(conv3(sum(self.parts), 128), nn.ReLU(), conv3(128, 64), nn.ReLU())
        self.mixer2 = nn.Sequential(conv3(64, 64), nn.ReLU(), conv3(64, 16), nn.ReLU())
        self.mixer3 = nn.Sequential(conv3(16, 16), nn.ReLU(), conv3(16, 2))

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Arguments as those of `Head.see`."""
        B, K = support_masks.shape[:2]
        keys: Features = {}
        values = {}
        for m, attention in self.attention.items():
            shots = attention.keys([f.flatten(0, 1) for f in support_feats[m]])
            keys[m] = [x.unflatten(0, (B, K)).flatten(1, 2) for x in shots]
            values[m] = resize(support_masks.to(support_feats[m][0].dtype), size_of(support_feats[m][0])).flatten(1)
        layer1, layer2 = (support_feats[m][-1].amax(dim=1) for m in ("layer1", "layer2"))
        _, _, of_layer2, _, of_layer1 = self.mixing
        low = F.conv2d(layer1, of_layer1, self.mixer1[0].bias, padding=1)  # type: ignore[arg-type]
        return Seen(keys, values, low + conv3_of_enlarged(layer2, of_layer2, size_of(layer1)))

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W); arguments as those of `Head.segment`.

        Raises:
            SettingError: the supports are of another size than the queries.
        """
        layer1, layer2 = (query_feats[m][-1] for m in ("layer1", "layer2"))
        if size_of(seen.low) != size_of(layer1):
            raise SettingError("DCAMA takes queries and supports of one size: resize the images to the same sides.")
        coarse2, coarse3, coarse4 = (
            attention.coarse_masks(query_feats[m], seen.keys[m], seen.values[m])
            for m, attention in self.attention.items()
        )
        x = self.conv4(resize(self.conv1(coarse4), size_of(coarse3)) + self.conv2(coarse3))
        x = self.conv5(resize(x, size_of(coarse2)) + self.conv3(coarse2))
        of_x, of_query2, _, of_query1, _ = self.mixing
        deep, of_deep = torch.cat([x, layer2], dim=1), torch.cat([of_x, of_query2], dim=1)
        mixed = F.conv2d(layer1, of_query1, padding=1) + conv3_of_enlarged(deep, of_deep, size_of(layer1)) + seen.low
        x = self.mixer2(doubled(self.mixer1[1:](mixed)))
        x = self.mixer3(doubled(x))
        return x if size_of(x) == size else resize(x, size)

    @property
    def attention(self) -> dict[str, "Attention"]:
        return dict(zip(STAGES, cast(Iterable[Attention], self.DCAMA_blocks), strict=True))

    @property
    def mixing(self) -> tuple[Tensor, ...]:
        """The weights of the first mixing convolution: for what the coarse masks became, for layer2 of query and of
        support, and for layer1 of query and of support."""
        return cast(Tensor, self.mixer1[0].weight).split(self.parts, dim=1)


class Attention(nn.Module):
    """The attention of one stage, shared by its blocks.

    Args:
        channels: of the stage, a multiple of HEADS.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        linear = nn.Linear(channels, channels)
        self.linears = nn.ModuleList([linear, copy.deepcopy(linear)])  # of query and of support; at first the same
        self.dropout = Dropout(DROPOUT)

    def keys(self, supports: list[Tensor]) -> list[Tensor]:
        """L maps (N, C, h, w) -> L tensors (N, S, C)."""
        return self.projected(supports, self.linears[1])

    def coarse_masks(self, queries: list[Tensor], keys: list[Tensor], values_BS: Tensor) -> Tensor:
        """(B, L, h, w) in [0, 1]: for each block what attention gathers of the supports' masks.

        Args:
            queries: L maps (B, C, h, w).
            keys: L tensors (B, S, C).
        """
        exact = torch.promote_types(values_BS.dtype, torch.float32)
        value_NS = values_BS.to(exact).repeat_interleave(HEADS, dim=0)
        dropout = self.dropout.p if self.training else 0.0
        masks = []
        for query_BQC, key_BSC in zip(self.projected(queries, self.linears[0]), keys, strict=True):
            scaled_BQC = query_BQC / (query_BQC.shape[2] // HEADS) ** 0.5
            seed = int(torch.randint(2**62, ())) if dropout else 0
            mask_NQ = Attended.apply(by_head(scaled_BQC), by_head(key_BSC), value_NS, dropout, seed)
            masks.append(mask_NQ.unflatten(0, (-1, HEADS)).mean(dim=1))
        return torch.stack(masks, dim=1).to(queries[0].dtype).unflatten(2, size_of(queries[0]))

    def projected(self, features: list[Tensor], linear: nn.Module) -> list[Tensor]:
        code_PC = position_code(features[0][0, 0].numel(), features[0].shape[1], features[0])
        return [linear(self.dropout(f.flatten(2).mT.contiguous() + code_PC)) for f in features]


def by_head(x_BPC: Tensor) -> Tensor:
    """(B, P, C) -> (N, P, D)."""
    return x_BPC.unflatten(2, (HEADS, -1)).transpose(1, 2).flatten(0, 1)


class Attended(Function):
    """softmax(query key^T) value, (N, Q), for values that need no gradient.

    It works in portions, so that few scores exist at a time; the gradient computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, query_NQD: Tensor, key_NSD: Tensor, value_NS: Tensor, dropout: float, seed: int
    ) -> Tensor:  # fmt: skip
        out_NQ = torch.empty_like(query_NQD[..., 0], dtype=value_NS.dtype)
        for i, (n, q) in enumerate(portions(query_NQD, key_NSD)):
            attention_nqS = attention(query_NQD[n, q], key_NSD[n])
            if dropout:
                attention_nqS *= kept(attention_nqS, dropout, seed + i)
            out_NQ[n, q] = (attention_nqS @ value_NS[n, :, None]).squeeze(2)
        ctx.save_for_backward(query_NQD, key_NSD, value_NS, out_NQ)
        ctx.dropout, ctx.seed = dropout, seed
        return out_NQ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NQ: Tensor) -> tuple[Tensor | None, ...]:
        query_NQD, key_NSD, value_NS, out_NQ = ctx.saved_tensors
        graded_NQD = grad_NQ[..., None] * query_NQD
        of_query, of_key = torch.empty_like(query_NQD), torch.zeros_like(key_NSD)
        for i, (n, q) in enumerate(portions(query_NQD, key_NSD)):
            values = value_NS[n, None]
            if ctx.dropout:
                values = values * kept(values.expand(-1, graded_NQD[n, q].shape[1], -1), ctx.dropout, ctx.seed + i)
            attention_nqS = attention(query_NQD[n, q], key_NSD[n])
            of_scores = attention_nqS.mul_(values - out_NQ[n, q, None]).to(key_NSD.dtype)  # for a gradient of 1
            of_query[n, q] = grad_NQ[n, q, None] * (of_scores @ key_NSD[n])
            of_key[n] += of_scores.mT @ graded_NQD[n, q].to(key_NSD.dtype)
        return of_query, of_key, None, None, None


def portions(query_NQD: Tensor, key_NSD: Tensor) -> list[tuple[slice, slice]]:
    """Heads, and rows of the query, that are worked on at a time."""
    at_once = SCORES_ON_CPU if query_NQD.device.type == "cpu" else SCORES_ELSEWHERE
    N, Q = query_NQD.shape[:2]
    rows = max(1, at_once // key_NSD.shape[1])
    heads = max(1, rows // Q)
    return [(slice(n, n + heads), slice(q, q + rows)) for n in range(0, N, heads) for q in range(0, Q, rows)]


def attention(query_NQD: Tensor, key_NSD: Tensor) -> Tensor:
    """(N, Q, S), in single precision or better."""
    exact = torch.promote_types(query_NQD.dtype, torch.float32)
    return (query_NQD @ key_NSD.mT).softmax(dim=2, dtype=exact)


def kept(like: Tensor, dropout: float, seed: int) -> Tensor:
    """What to multiply by: 0 or 1 / (1 - dropout), the same again for the same seed. A draw decides on four entries."""
    generator = torch.Generator(like.device).manual_seed(seed)
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    above = draws.view(torch.int16)[: like.numel()] >= round(dropout * 2**16) - 2**15
    return above.view(like.shape).to(like.dtype) / (1 - dropout)


def conv3_of_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A 3x3 convolution, padded and without bias, of a map that is resized (bilinearly, corners aligned) before it.

    Channels are mixed where the map is still small, for each of the kernel's nine positions. Resizing and shifting by
    these positions are products with small matrices.

    Args:
        x: (B, C, h, w).
        weight: (C', C, 3, 3).
        size: H, W.

    Returns:
        (B, C', H, W).
    """
    (h, w), (H, W) = size_of(x), size
    pointwise = weight.permute(0, 3, 2, 1).flatten(0, 2)  # for each C', column and row of the kernel
    mixed = (pointwise @ x.flatten(2)).view(len(x), -1, 3 * h, w)  # (B, C' * 3 columns, 3 rows * h, w)
    tall = (enlargement(h, H, x) @ mixed).unflatten(1, (-1, 3))
    return tall.transpose(2, 3).flatten(3) @ enlargement(w, W, x).mT


def enlargement(small: int, large: int, like: Tensor) -> Tensor:
    """(large, 3 * small): resizes a line, and shifts it by one position up, not at all, and down."""
    line = torch.eye(small, dtype=like.dtype, device=like.device)
    resized = F.interpolate(line[None], large, mode="linear", align_corners=True)[0].T
    padded = F.pad(resized, (0, 0, 1, 1))
    return torch.cat([padded[i : i + large] for i in range(3)], dim=1)


def building_steps(channels: tuple[int, ...], kernels: tuple[int, ...]) -> nn.Sequential:
    """Convolution, GroupNorm and ReLU, once for each kernel."""
    steps: list[nn.Module] = []
    for (in_channels, out_channels), kernel in zip(pairwise(channels), kernels, strict=True):
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        steps += [conv, nn.GroupNorm(4, out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def doubled(x: Tensor) -> Tensor:
    h, w = size_of(x)
    return resize(x, (2 * h, 2 * w))


class DCAMA(Method):
    """Takes any number of shots, and image sides that are multiples of 8.

    Args:
        backbone: with layer1..layer4 at strides of 4, 8, 16 and 32.

    Example:
        >>> import torch
        >>> from pmnet.backbones import ResNetBackbone
        >>> from pmnet.methods.dcama import DCAMA
        >>> method = DCAMA(ResNetBackbone("resnet18", weights="none")).eval()
        >>> method.predict(torch.rand(1, 3, 64, 72), torch.rand(1, 5, 3, 64, 72), torch.ones(1, 5, 64, 72)).shape
        torch.Size([1, 64, 72])
    """

    protocol = "hsnet"
    query_reads = support_reads = {"layer1": "last", "layer2": "all", "layer3": "all", "layer4": "all"}
    side_multiple = 8
    ignored = "background"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, DCAMAHead(backbone.channels, backbone.blocks))


def from_release(state_dict: Mapping[str, Tensor]) -> DCAMAHead:
    """The head, in eval mode, from the authors' tensor names; its sizes are those of the tensors.

    Args:
        state_dict: a whole checkpoint; the tensors of the backbone and the constant position codes are ignored.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = {re.sub(r"^(module\.|model\.)*", "", k): torch.as_tensor(value) for k, value in state_dict.items()}
    state = {k: v for k, v in state.items() if not k.startswith("feature_extractor.") and not k.endswith(".pe.pe")}
    try:
        channels = {m: len(state[f"DCAMA_blocks.{i}.linears.0.weight"]) for i, m in enumerate(STAGES)}
        channels["layer1"] = (state["mixer1.0.weight"].shape[1] - 128) // 2 - channels["layer2"]
        blocks = {m: state[f"conv{3 - i}.0.weight"].shape[1] for i, m in enumerate(STAGES)}
        head = DCAMAHead(channels, blocks)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"Not a checkpoint of DCAMA by its authors: no {error} of this name or shape.") from error
    except SettingError as error:
        raise CheckpointError(f"Not a checkpoint of DCAMA by its authors: {error}") from error
    return filled(head, state)
