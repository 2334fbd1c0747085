"""VAT: correlations, coarsened by 4D convolutions and refined by a transformer whose windows have four axes.

Hong, Cho, Nam, Lin, Kim, "Cost Aggregation with 4D Convolutional Swin Transformer for Few-Shot Segmentation", ECCV
2022. Published program: github.com/Seokju-Cho/Volumetric-Aggregation-Transformer at 5534a15, MIT licence; this code was
written from a description of it.

Every block of three stages correlates each query position with each position of the masked support. Encoders reduce the
support positions of each stage, and transformers refine the stages from deep to shallow. A Swin decoder turns the mean
over the support positions, together with projections of the query's own features, into a mask. Several shots vote.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmnet.backbones import Backbone, Features
from pmnet.errors import CheckpointError, SettingError
from pmnet.memory import keep_freed_memory
from pmnet.methods.base import Method, resize
from pmnet.methods.correlation import correlation, masked, unit
from pmnet.methods.release import filled
from pmnet.methods.votes import VotingHead

STAGES = ("layer4", "layer3", "layer2")  # from deep to shallow
SIDES = {"layer1": 128, "layer2": 64, "layer3": 32, "layer4": 16}  # to which every feature map is resized
ENCODERS = {  # stage -> channels after each step, and strides of the query plane and of the support plane
    "layer4": ((64, 128), ((2, 1), (1, 2))),
    "layer3": ((64, 128), ((2, 2), (1, 2))),
    "layer2": ((32, 64, 128), ((2, 2), (1, 2), (1, 2))),
}
DEPTHS = {"layer4": 4, "layer3": 2, "layer2": 2}  # blocks of each transformer
PROJECTED = {"layer3": 64, "layer2": 32, "layer1": 16}  # channels of the projections of query features
REDUCED = {"layer3": 96, "layer2": 48}  # output channels of the decoder's levels
WIDTH, ATTENTION_HEADS = 128, 4
APART = -100.0  # added to the scores between regions that only a shifted window brings together
ROWS = 8  # of the query plane that are correlated at a time
TOKENS_ON_CPU, TOKENS_ELSEWHERE = 2**12, 2**14  # whose attention is computed at a time


class Query(NamedTuple):
    """What is computed once for all supports of a query.

    Attributes:
        units: stage -> unit vectors of its blocks, (B, C, side, side).
        appearance: layer that the decoder sees -> projection (B, C', side, side).
    """

    units: Features
    appearance: dict[str, Tensor]


class VATHead(VotingHead):
    """All that is learned: 3,180,954 parameters on a ResNet-50 with the appearance that is published for PASCAL.

    Args:
        channels: feature channels of "layer1", "layer2" and "layer3".
        blocks: number of blocks of "layer2", "layer3" and "layer4".
        appearance: layers whose query features the decoder sees. Published: layer1 and layer2 for PASCAL, layer1 for
            COCO, all three for FSS-1000.
    """

    sides: Mapping[str, int] = SIDES

    def __init__(
        self,
        channels: Mapping[str, int],
        blocks: Mapping[str, int],
        appearance: Sequence[str] = ("layer1", "layer2"),
    ) -> None:
        super().__init__()
        if "layer1" not in appearance or not PROJECTED.keys() >= set(appearance):
            raise SettingError(
                f"model.appearance={list(appearance)}: VAT's decoder takes layer1, and optionally layer2 and layer3. "
                "Choose among these."
            )
        self.appearance = tuple(appearance)
        self.encoders = nn.ModuleList(Encoder(blocks[m], *ENCODERS[m]) for m in STAGES)
        self.transformers = nn.ModuleList(Transformer(DEPTHS[m]) for m in STAGES)
        self.project = nn.ModuleList(nn.Conv2d(channels[m], width, 1) for m, width in PROJECTED.items())
        self.drop = nn.Dropout2d(0.5)
        self.decoder, width = nn.ModuleList(), WIDTH
        for m in PROJECTED:
            width += PROJECTED[m] if m in appearance else 0
            self.decoder.append(DecoderLevel(width, REDUCED.get(m)))
            width = REDUCED.get(m, width)
        self.classify = nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 3, padding=1))

    def see(self, support_feats: Features, support_masks: Tensor) -> Features:
        """Unit vectors of the resized and masked features; arguments as in `Head.see`."""
        return {m: [unit(masked(self.fixed(f, m), support_masks)) for f in support_feats[m]] for m in STAGES}

    def see_query(self, query_feats: Features) -> Query:
        units = {m: [unit(self.fixed(f, m)) for f in query_feats[m]] for m in STAGES}
        appearance = {}
        for m, project in zip(PROJECTED, self.project, strict=True):
            if m in self.appearance:
                projected = F.relu(project(self.fixed(query_feats[m][-1], m)))
                appearance[m] = projected if m == "layer1" else self.drop(projected)
        return Query(units, appearance)

    def fixed(self, feature: Tensor, layer: str) -> Tensor:
        """(..., C, h, w) -> (..., C, side, side)."""
        side = self.sides[layer]
        return resize(feature.flatten(0, -4), (side, side)).unflatten(0, feature.shape[:-3])

    def pairs(self, query: Query, support: Features, size: tuple[int, int]) -> Tensor:
        x: Any = None
        for m, encode, refine in zip(STAGES, self.encoders, self.transformers, strict=True):
            coarse = encode(query.units[m], support[m])
            x = coarse if x is None else coarse + over_query(partial(resize, size=coarse.shape[1:3]), x)
            x = x + refine(x)
        x = x.mean(dim=(3, 4)).movedim(-1, 1)
        for m, level in zip(PROJECTED, self.decoder, strict=True):
            x = resize(x, (self.sides[m], self.sides[m]))
            x = level(torch.cat([x, query.appearance[m]], dim=1) if m in self.appearance else x)
        return resize(self.classify(x), size)

    def positions(self, query: Query) -> int:
        return sum(len(blocks) * self.sides[m] ** 4 for m, blocks in query.units.items())

    def loss(self, *args: Any) -> Tensor:
        """Arguments as in `Head.loss`. Unused parameters get gradients of 0, because training on several devices waits
        for a gradient of every parameter."""
        unused = [part.get_submodule("norm") for part in self.transformers]
        unused += [part for m, part in zip(PROJECTED, self.project, strict=True) if m not in self.appearance]
        return super().loss(*args) + 0 * torch.stack([p.sum() for part in unused for p in part.parameters()]).sum()


def in_parts(function: Callable[..., Tensor], at_once: int, *tensors: Tensor) -> Tensor:
    """Applies a function to parts of the batch and joins the results.

    With gradients, the backward pass computes each part again, so that intermediate results take memory for one part
    at a time.

    Args:
        at_once: size of a part along the first axis.
    """
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([function(*part) for part in zip(*(x.split(at_once) for x in tensors), strict=True)])


# Encoder: (N, hq, wq, hs, ws, C), whose planes are images in PyTorch's layout of channels last


class Step(nn.Module):
    """A 4D convolution as the sum of one over the query plane and one over the support plane; GroupNorm, ReLU.

    Before each convolution, the plane that it does not convolve is max-pooled by that plane's stride.

    Args:
        strides: of the query plane and of the support plane.
    """

    def __init__(self, in_channels: int, out_channels: int, strides: tuple[int, int]) -> None:
        super().__init__()
        self.strides = strides
        self.query_conv, self.support_conv = (nn.Conv2d(in_channels, out_channels, 3, s, padding=1) for s in strides)
        self.norm = Norm(out_channels // 16, out_channels)

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of both convolutions, from (N, hq, wq, hs, ws, C): the other's plane is pooled."""
        of_query, of_support = self.strides
        by_query = over_support(partial(F.max_pool2d, kernel_size=of_support), x) if of_support > 1 else x
        by_support = over_query(partial(F.max_pool2d, kernel_size=of_query), x) if of_query > 1 else x
        return by_query, by_support

    def forward(self, by_query: Tensor, by_support: Tensor) -> Tensor:
        """The outputs of `pooled` -> (N, hq / sq, wq / sq, hs / ss, ws / ss, C')."""
        sums = over_support(self.support_conv, by_support) + turned(over_support(self.query_conv, turned(by_query)))
        return F.relu(self.norm(sums), inplace=True)


class Norm(nn.GroupNorm):
    """GroupNorm with channels last. PyTorch's own loses digits over a million positions in this layout on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = exact.flatten(1, -2).unflatten(2, (self.num_groups, -1))
        var, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(var + self.eps) * self.weight.view(self.num_groups, -1)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        return torch.addcmul(shift, grouped, scale).view(x.shape)


def over_support(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images, of the support plane at every query position."""
    images = x.flatten(0, 2).permute(0, 3, 1, 2)
    return function(images).permute(0, 2, 3, 1).unflatten(0, x.shape[:3])


def over_query(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images that takes every channel alone, of the query plane at every support position."""
    images = x.flatten(3).permute(0, 3, 1, 2)
    return function(images).permute(0, 2, 3, 1).unflatten(3, x.shape[3:])


def turned(x: Tensor) -> Tensor:
    """With both planes exchanged."""
    return x.permute(0, 3, 4, 1, 2, 5).contiguous()


class Encoder(nn.Module):
    """Correlations of one stage, coarsened step by step.

    Args:
        blocks: of the stage.
        channels: after each step.
        strides: of each, see `Step`.
    """

    def __init__(self, blocks: int, channels: Sequence[int], strides: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        widths = pairwise((blocks, *channels))
        self.steps = nn.ModuleList(Step(*width, stride) for width, stride in zip(widths, strides, strict=True))

    def forward(self, query: list[Tensor], support: list[Tensor]) -> Tensor:
        """Unit vectors of the stage's blocks, each (N, C, side, side) -> (N, hq, wq, hs, ws, 128)."""
        return in_parts(self.coarse, 1, *self.correlated(query, support))

    def correlated(self, query: list[Tensor], support: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The first step's pooled inputs. The correlations are not kept: a pair's take 268 MB at 64x64."""
        first = cast(Step, self.steps[0])
        rows = zip(*(block.split(ROWS, dim=2) for block in query), strict=True)
        parts = [first.pooled(correlation(list(some), support).movedim(1, -1)) for some in rows]
        by_query, by_support = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return by_query, by_support

    def coarse(self, by_query: Tensor, by_support: Tensor) -> Tensor:
        first, *others = self.steps
        x = first(by_query, by_support)
        for step in others:
            x = step(*cast(Step, step).pooled(x))
        return x


# Transformers


class WindowBlock(nn.Module):
    """A Swin block on a grid with any number of axes: attention inside windows, then two linear layers.

    Args:
        channels: of every position.
        axes: number of the grid's axes.
        window: side of a window; divides the grid's sides.
        shift: of the windows along every axis. The shift wraps around: positions from opposite ends of the grid that
            share a window do not attend to one another.
    """

    offsets: Tensor

    def __init__(self, channels: int, axes: int, window: int, shift: int) -> None:
        super().__init__()
        self.axes, self.window, self.shift = axes, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** axes, ATTENTION_HEADS))
        self.register_buffer("offsets", offsets(window, axes), persistent=False)
        nn.init.trunc_normal_(self.bias, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, sides..., C) -> the same."""
        sides, over = x.shape[1:-1], tuple(range(1, 1 + self.axes))
        bias_hPP = self.bias[self.offsets].movedim(-1, 0)
        windows = windows_of(x.roll((-self.shift,) * self.axes, over), self.window)
        tokens = TOKENS_ON_CPU if x.device.type == "cpu" else TOKENS_ELSEWHERE
        at_once = max(1, tokens // windows.shape[1])
        if self.shift:
            region_WP = windows_of(self.regions(sides).to(x.device), self.window)[..., 0]
            region_NP = region_WP.repeat(len(x), 1)
            windows = in_parts(partial(self.within, bias_hPP), at_once, windows, region_NP)
        else:
            windows = in_parts(partial(self.within, bias_hPP), at_once, windows)
        return grid_of(windows, x.shape, self.window).roll((self.shift,) * self.axes, over)

    def within(self, bias_hPP: Tensor, x_NPC: Tensor, region_NP: Tensor | None = None) -> Tensor:
        """Applies the block to N windows of P positions.

        Args:
            region_NP: numbers of the regions; positions attend only to their own region. None: to all.
        """
        x_NPC = x_NPC + self.attended(self.norm1(x_NPC), bias_hPP, region_NP)
        return x_NPC + self.mlp(self.norm2(x_NPC))

    def attended(self, x_NPC: Tensor, bias_hPP: Tensor, region_NP: Tensor | None) -> Tensor:
        q_NhPc, k_NhPc, v_NhPc = self.qkv(x_NPC).unflatten(2, (3, ATTENTION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        added = bias_hPP[None]
        if region_NP is not None:
            added = added + APART * (region_NP[:, None, :, None] != region_NP[:, None, None, :]).to(added.dtype)
        out_NhPc = F.scaled_dot_product_attention(q_NhPc, k_NhPc, v_NhPc, attn_mask=added)
        return self.project(out_NhPc.transpose(1, 2).flatten(2))

    def regions(self, sides: Sequence[int]) -> Tensor:
        """A number for each region of the rolled grid, (1, sides..., 1)."""
        number = torch.zeros((), dtype=torch.int64)
        for n in sides:
            at = torch.arange(n)
            number = 3 * number[..., None] + (at >= n - self.window).long() + (at >= n - self.shift).long()
        return number[None, ..., None]


def offsets(window: int, axes: int) -> Tensor:
    """Rows of the bias table, (P, P): for each two positions of a window, the row for their distance."""
    at_PA = torch.cartesian_prod(*[torch.arange(window)] * axes)
    apart_PPA = at_PA[:, None] - at_PA[None] + window - 1
    places = (2 * window - 1) ** torch.arange(axes - 1, -1, -1)
    return (apart_PPA * places).sum(dim=2)


def windows_of(x: Tensor, window: int) -> Tensor:
    """(N, sides..., C) -> (N * windows, positions, C)."""
    sides, axes = x.shape[1:-1], x.ndim - 2
    cut = x.reshape(len(x), *(n for side in sides for n in (side // window, window)), x.shape[-1])
    outer, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    cut = cut.permute(0, *outer, *inner, 2 * axes + 1)
    return cut.flatten(1 + axes, 2 * axes).flatten(0, axes)


def grid_of(windows_NPC: Tensor, shape: Sequence[int], window: int) -> Tensor:
    """The inverse of `windows_of`, for a grid of the given shape."""
    sides, axes = shape[1:-1], len(shape) - 2
    cut = windows_NPC.reshape(shape[0], *(side // window for side in sides), *[window] * axes, shape[-1])
    pairs = [axis for a in range(1, axes + 1) for axis in (a, a + axes)]
    return cut.permute(0, *pairs, 2 * axes + 1).reshape(shape)


class Transformer(nn.Module):
    """Window blocks on the four axes of a correlation; every second one is shifted.

    Args:
        depth: number of blocks.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(WindowBlock(WIDTH, axes=4, window=4, shift=2 * (i % 2)) for i in range(depth)))
        self.norm = nn.LayerNorm(WIDTH)  # never used, by the authors' program either; part of its checkpoints

    def forward(self, x: Tensor) -> Tensor:
        """(N, hq, wq, hs, ws, 128) -> the same."""
        return self.blocks(x)


class DecoderLevel(nn.Module):
    """Two Swin blocks with a residual around them; optionally, a 1x1 convolution to fewer channels."""

    def __init__(self, channels: int, reduced: int | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(WindowBlock(channels, axes=2, window=8, shift=shift) for shift in (0, 4)))
        self.norm = nn.LayerNorm(channels)
        self.reduce = nn.Conv2d(channels, reduced, 1) if reduced else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h, w)."""
        x_NhwC = x.movedim(1, -1)
        return self.reduce((x_NhwC + self.norm(self.blocks(x_NhwC))).movedim(-1, 1))


class VAT(Method):
    """Takes any number of shots and any image sides. Training takes one shot.

    Args:
        backbone: with layer1 to layer4. Published: `ResNetBackbone`.
        appearance: see `VATHead`.

    Example:
        >>> import torch
        >>> from pmnet.backbones import SmallBackbone
        >>> from pmnet.methods.vat import VAT
        >>> method = VAT(SmallBackbone("none")).eval()
        >>> images, masks = torch.rand(1, 1, 3, 64, 64), torch.ones(1, 1, 64, 64)
        >>> with torch.no_grad():
        ...     method.predict(torch.rand(1, 3, 64, 64), images, masks).shape
        torch.Size([1, 64, 64])
    """

    protocol = "hsnet"
    query_reads = {"layer1": "last", "layer2": "all", "layer3": "all", "layer4": "all"}
    support_reads = {"layer2": "all", "layer3": "all", "layer4": "all"}
    side_multiple = 1
    ignored = "background"
    head_class: ClassVar[type[VATHead]] = VATHead

    def __init__(self, backbone: Backbone, appearance: Sequence[str] = ("layer1", "layer2")) -> None:
        keep_freed_memory()
        super().__init__(backbone, self.head_class(backbone.channels, backbone.blocks, appearance))


# The authors' checkpoints

ROOTS = re.compile(r"(?:^|\.)((?:encoders|transformer|swin_decoder|decoder|proj_query_feat)\.\d.*)")
CONSTANT = ("relative_position_index", "attn_mask")  # buffers of Swin that are computed here
NAMES = (  # of the authors' tensors -> ours, one after the other
    (r"^decoder\.", "classify."),
    (r"^proj_query_feat\.(\d)\.0\.", r"project.\1."),
    (r"^encoders\.(\d)\.conv4d\.(\d)\.1\.", r"encoders.\1.steps.\2.norm."),
    (r"^encoders\.(\d)\.conv4d\.(\d)\.0\.", r"encoders.\1.steps.\2."),
    (r"^transformer\.(\d)\.transformer\.(layer\.)?", r"transformers.\1."),
    (r"^swin_decoder\.(\d)\.0\.transformer\.(layers\.0\.)?", r"decoder.\1."),
    (r"^swin_decoder\.(\d)\.1\.", r"decoder.\1.reduce."),
    (r"\.supp_conv\.", ".support_conv."),
    (r"\.attn\.relative_position_bias_table$", ".bias"),
    (r"\.attn\.proj\.", ".project."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.mlp\.fc(1|2)\.", lambda found: f".mlp.{2 * int(found[1]) - 2}."),
)


def from_release(state_dict: Mapping[str, Tensor], head_class: type[VATHead] = VATHead) -> VATHead:
    """The head, in eval mode, from the authors' tensor names; its sizes are those of the tensors.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored.
        head_class: VAT's, or that of a method with the same parameters.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = {}
    for key, value in state_dict.items():
        if "backbone" not in key.split(".") and not key.endswith(CONSTANT):
            found = ROOTS.search(key)
            state[renamed(found[1]) if found else key] = torch.as_tensor(value)
    try:
        blocks = {m: state[f"encoders.{i}.steps.0.query_conv.weight"].shape[1] for i, m in enumerate(STAGES)}
        channels = {m: state[f"project.{i}.weight"].shape[1] for i, m in enumerate(PROJECTED)}
        widths = {m: len(state[f"decoder.{i}.norm.weight"]) for i, m in enumerate(PROJECTED)}
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"Not a checkpoint of VAT by its authors: no {error} of this name or shape.") from error
    without = {"layer3": WIDTH, "layer2": REDUCED["layer3"], "layer1": REDUCED["layer2"]}
    appearance = [m for m in PROJECTED if m == "layer1" or widths[m] > without[m]]
    return filled(head_class(channels, blocks, appearance), state)


def renamed(name: str) -> str:
    """Our name of one of the authors' tensors."""
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name
