"""CyCTR: a transformer whose query attends to those support positions that find their way back to their own side.

Zhang et al., "Few-Shot Segmentation via Cycle-Consistent Transformer", NeurIPS 2021. Published program:
github.com/YanFangCS/CyCTR-Pytorch at 1a06183, no licence; this code was written from a description of it.

Two layers of deformable self-attention of the query and cross-attention to sampled support positions. A support
position counts only if the query position most like it is most like a support position of the same side, object or
not. The released program looks up the sides of sampled positions at wrong places; the published numbers are of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pmnet.backbones import Backbone, Features
from pmnet.errors import SettingError
from pmnet.methods.base import Criterion, Head, Method, resize, scored, size_of
from pmnet.methods.pfenet import EPS, flat, mask_at, prior_mask, spread
from pmnet.methods.pooling import masked_mean
from pmnet.methods.release import filled, inputs, of_head

LAYERS, POINTS = 2, 9
SAMPLED = 300  # support positions of the object, and as many others, for each shot
BARRED = -10000.0  # is added to the scores of positions that do not count
DROPOUT = 0.1
NAMES = {  # of the authors' modules -> ours
    "adjust_feature_qry": "of_query",
    "adjust_feature_supp": "of_support",
    "qry_merge_feat": "merge_query",
    "supp_merge_feat": "merge_support",
    "transformer.qry_self_layers": "transformer.self_attention",
    "transformer.cross_layers": "transformer.cross_attention",
    "transformer.layer_norms": "transformer.norms",
    "transformer.level_embed": "transformer.level",
    "merge_multi_lvl_reduce": "reduce",
    "merge_multi_lvl_sum": "refine",
    "cls": "answer",
    "pred_supp_qry_proj": "back.project",
    "supp_init_merge": "back.merge",
    "supp_beta_conv": "back.refine",
    "supp_cls": "back.answer",
}
for i in range(2 * LAYERS):
    NAMES |= {f"transformer.ffns.{i}.layers.0.0": f"transformer.ffns.{i}.0"}
    NAMES |= {f"transformer.ffns.{i}.layers.1": f"transformer.ffns.{i}.3"}


class Seen(NamedTuple):
    """What is remembered of B episodes.

    Attributes:
        tokens: (B, S, C), sampled positions of all shots; while training, all positions.
        foreground: (B, S) bool, whether each counts as of the object.
        padded: (B, S) bool, whether each counts as outside the image.
        prototype: (B, C), the mean of the shots'.
        deep: (B, K, C, h, w), masked layer4, for the prior.
    """

    tokens: Tensor
    foreground: Tensor
    padded: Tensor
    prototype: Tensor
    deep: Tensor


class CyCTRHead(Head):
    """
    Args:
        channels: feature channels of "layer2" and "layer3".
        width: channels of everything above; a multiple of 8.
        corrected: look up the sides of sampled positions at their own places, not at the released program's.
        seed: of the sampling at test, where each episode begins with it.
    """

    def __init__(self, channels: Mapping[str, int], width: int = 256, corrected: bool = False, seed: int = 0) -> None:
        super().__init__()
        if width % 8:
            raise SettingError(f"model.width={width} is no multiple of 8.")
        self.corrected, self.seed = corrected, seed
        read = channels["layer2"] + channels["layer3"]
        self.of_query = nn.Sequential(*merging(read, width), nn.Dropout2d(0.5))
        self.of_support = nn.Sequential(*merging(read, width), nn.Dropout2d(0.5))
        self.merge_query = merging(2 * width + 1, width)
        self.merge_support = merging(2 * width, width)
        self.transformer = Transformer(width)
        self.reduce, self.refine, self.answer = merging(width, width), refining(width), answering(width)
        self.back = Back(width)

    # Supports

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Takes "layer2", "layer3" and "layer4", and "padding" (B, K, H, W) where the supports have any."""
        return self.remembered(self.of_supports(support_feats), support_feats, support_masks)

    def of_supports(self, support_feats: Features) -> Tensor:
        """(B, K, C, h, w)."""
        return self.of_support(middle(flat(support_feats))).unflatten(0, support_feats["layer3"][-1].shape[:2])

    def remembered(self, support_BKChw: Tensor, support_feats: Features, support_masks: Tensor) -> Seen:
        B, K, size = *support_masks.shape[:2], size_of(support_BKChw)
        support_NChw, deep_BKChw = support_BKChw.flatten(0, 1), F.relu(support_feats["layer4"][-1])
        prototype_NC = masked_mean(support_NChw, mask_at(support_masks, support_BKChw).flatten(0, 1), EPS)
        merged_NChw = self.merge_support(torch.cat([support_NChw, spread(prototype_NC, support_NChw)], dim=1))
        seen = Seen(
            tokens=merged_NChw.unflatten(0, (B, K)).movedim(2, -1).flatten(1, 3),
            foreground=object_flags(nearest(support_masks == 1, size)).flatten(1),
            padded=padding(support_feats, support_masks, size).flatten(1),
            prototype=prototype_NC.unflatten(0, (B, K)).mean(dim=1),
            deep=deep_BKChw * mask_at(support_masks, deep_BKChw)[:, :, None],
        )
        return seen if self.training else self.sampled(seen, SAMPLED * K, self.seed)

    def sampled(self, seen: Seen, each: int, seed: int | None) -> Seen:
        """Of each episode, `each` positions of the object and as many others; see `sample`. A `seed` of None draws
        from PyTorch's own generator."""
        places_BS, flagged_BS = [], []
        for foreground_S in seen.foreground:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            places_S, flagged_S = sample(foreground_S, each, generator, self.corrected)
            places_BS.append(places_S)
            flagged_BS.append(flagged_S)
        places, flagged = torch.stack(places_BS), torch.stack(flagged_BS)
        return seen._replace(
            tokens=seen.tokens.gather(1, places[:, :, None].expand(-1, -1, seen.tokens.shape[2])),
            foreground=seen.foreground.gather(1, flagged),
            padded=seen.padded.gather(1, flagged),
        )

    # Query

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Takes "layer2", "layer3" and "layer4", and "padding" (B, H, W) where the queries have any."""
        matched = self.matched(self.of_query(middle(query_feats)), query_feats, seen)
        return resize(self.answer(matched), size)

    def matched(self, query_BChw: Tensor, query_feats: Features, seen: Seen) -> Tensor:
        """(B, C, h, w): what the answer is made of."""
        prior_BKhw = resize(prior_mask(query_feats["layer4"][-1], seen.deep), size_of(query_BChw))
        prior_B1hw = prior_BKhw.mean(dim=1, keepdim=True)
        merged_BChw = self.merge_query(torch.cat([query_BChw, spread(seen.prototype, query_BChw), prior_B1hw], dim=1))
        padded_Bhw = padding(query_feats, query_BChw[:, 0], size_of(query_BChw))
        x = self.reduce(self.transformer(merged_BChw, padded_Bhw, lambda: self.tokens_for_a_layer(seen)))
        return x + self.refine(x)

    def tokens_for_a_layer(self, seen: Seen) -> Seen:
        """At test the same for every layer; while training new ones, and a random number of them."""
        if not self.training:
            return seen
        shots = seen.deep.shape[1]
        factor = torch.empty(()).uniform_(0.6, 4.0 if shots == 1 else 1.4)
        return self.sampled(seen, int(SAMPLED * shots * factor), seed=None)

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The criterion of the answer, and of the supports as predicted from the query; arguments as `Head.loss`."""
        size = size_of(query_mask)
        query_BChw, support_BKChw = self.of_query(middle(query_feats)), self.of_supports(support_feats)
        x = self.matched(query_BChw, query_feats, self.remembered(support_BKChw, support_feats, support_masks))
        back = [self.back(x, query_BChw, query_mask, support_BChw) for support_BChw in support_BKChw.unbind(1)]
        pairs = zip(back, support_masks.unbind(1), strict=True)
        back_losses = [scored(criterion, resize(logits, size), mask) for logits, mask in pairs]
        return scored(criterion, resize(self.answer(x), size), query_mask) + torch.stack(back_losses).mean()


class Transformer(nn.Module):
    """Self-attention of the query, then cross-attention to the supports, twice; each is followed by two layers more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.randn(1, width))
        self.self_attention = nn.ModuleList(DeformableAttention(width) for _ in range(LAYERS))
        self.cross_attention = nn.ModuleList(CycleConsistentAttention(width) for _ in range(LAYERS))
        self.ffns = nn.ModuleList(feed_forward(width) for _ in range(2 * LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4 * LAYERS))

    def forward(self, query_BChw: Tensor, padded_Bhw: Tensor, supports: Callable[[], Seen]) -> Tensor:
        """(B, C, h, w); `supports` gives the tokens for one layer."""
        place = (sine_code(~padded_Bhw, query_BChw) + self.level[:, :, None, None]).flatten(2).mT
        size, padded, q = size_of(query_BChw), padded_Bhw.flatten(1), query_BChw.flatten(2).mT
        norms, ffns = iter(self.norms), iter(self.ffns)
        for within, across in zip(self.self_attention, self.cross_attention, strict=True):
            attended = within(q + place, q, size, padded)
            q = next(norms)(q + F.dropout(attended, DROPOUT, self.training))
            q = next(norms)(q + next(ffns)(q))
            q = next(norms)(q + across(q, supports()))
            q = next(norms)(q + next(ffns)(q))
        return q.mT.unflatten(2, size)


class DeformableAttention(nn.Module):
    """Each query position reads nine points near it, whose offsets and weights it predicts (Deformable DETR, 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.sampling_offsets = nn.Linear(width, self.heads * POINTS * 2)
        self.attention_weights = nn.Linear(width, self.heads * POINTS)
        self.value_proj = linear(width, width)
        self.output_proj = linear(width, width)
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=1)
        ring = ring / ring.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, POINTS + 1)  # of each head's points, in a direction of its own
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((ring[:, None] * steps[:, None]).flatten())

    def forward(self, q_BNC: Tensor, value_BNC: Tensor, size: tuple[int, int], padded_BN: Tensor) -> Tensor:
        B, N = padded_BN.shape
        h, w = size
        if self.training:
            padded_BN = padded_BN | (torch.rand_like(q_BNC[:, :, 0]) < DROPOUT)
        value = self.value_proj(value_BNC).masked_fill(padded_BN[:, :, None], 0)
        value_MCHW = value.mT.unflatten(1, (self.heads, -1)).flatten(0, 1).unflatten(2, size)  # M = B * heads
        precise = torch.promote_types(value.dtype, torch.float32)
        offsets = self.sampling_offsets(q_BNC).view(B, N, self.heads, POINTS, 2).to(precise)
        weights = self.attention_weights(q_BNC).view(B, N, self.heads, POINTS).softmax(dim=3)
        weights = F.dropout(weights, DROPOUT, self.training)
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        place_N2 = torch.stack([x.flatten(), y.flatten()], dim=1).to(offsets) + 0.5
        points = 2 * (place_N2[:, None, None] + offsets) / offsets.new_tensor([w, h]) - 1
        grid_MNP2 = points.transpose(1, 2).flatten(0, 1)
        read_MCNP = F.grid_sample(value_MCHW.to(precise), grid_MNP2, align_corners=False)
        weighted_MCN = (read_MCNP * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(dim=3)
        return self.output_proj(weighted_MCN.unflatten(0, (B, self.heads)).flatten(1, 2).mT)


class CycleConsistentAttention(nn.Module):
    """Attention to the support tokens that find their way back to a token of their own side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_of(width)
        self.q_fc = linear(width, width)
        self.k_fc = linear(width, width)
        self.v_fc = linear(width, width)
        self.proj = linear(width, width)

    def forward(self, query_BNC: Tensor, seen: Seen) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.q_fc, query_BNC), (self.k_fc, seen.tokens), (self.v_fc, seen.tokens))
        )
        score_BHNS = q @ k.mT * k.shape[3] ** -0.5
        astray_BHS = ~consistent(score_BHNS, seen.foreground)
        if self.training:
            astray_BHS = astray_BHS & (torch.rand_like(score_BHNS[:, :, 0]) >= DROPOUT)
        barred_BHS = astray_BHS | seen.padded[:, None]
        weight_BHNS = (score_BHNS + BARRED * barred_BHS[:, :, None]).softmax(dim=3)
        return self.proj((weight_BHNS @ v).transpose(1, 2).flatten(2))


class Back(nn.Module):
    """Predicts the supports from the query; only in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.merge = merging(width, width), merging(2 * width, width)
        self.refine, self.answer = refining(width), answering(width)

    def forward(self, x: Tensor, query: Tensor, query_mask: Tensor, support: Tensor) -> Tensor:
        """Logits (B, 2, h, w) of one shot."""
        feature = self.project(x) + query
        prototype = masked_mean(feature, mask_at(query_mask[:, None], feature)[:, 0], EPS)
        y = self.merge(torch.cat([support, spread(prototype, support)], dim=1))
        return self.answer(y + self.refine(y))


class CyCTR(Method):
    """Takes any number of shots, and image sides of 8n + 1.

    Args:
        backbone: frozen. Published: `DilatedResNetBackbone` with torchvision's dilation.
        head: options of `CyCTRHead`: width, corrected, seed.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> from pmnet.methods.cyctr import CyCTR
        >>> method = CyCTR(DilatedResNetBackbone("resnet50s", weights="none", dilation="torchvision")).eval()
        >>> method.predict(torch.rand(1, 3, 97, 97), torch.rand(1, 5, 3, 97, 97), torch.ones(1, 5, 97, 97)).shape
        torch.Size([1, 97, 97])
    """

    head: CyCTRHead
    protocol = "pfenet"
    query_reads = support_reads = {"layer2": "last", "layer3": "last", "layer4": "last"}
    side_multiple, side_offset = 8, 1

    def __init__(self, backbone: Backbone, **head: Any) -> None:
        super().__init__(backbone, CyCTRHead(backbone.channels, **head))

    def learned(self) -> list[Any]:
        """Groups for `SGDAndAdamW`; the transformer's biases do not decay."""
        transformer = list(self.head.transformer.named_parameters())
        inside = {p for _, p in transformer}
        return [
            {"params": [p for p in self.head.parameters() if p not in inside], "adamw": False},
            {"params": [p for name, p in transformer if not name.endswith("bias")], "adamw": True},
            {"params": [p for name, p in transformer if name.endswith("bias")], "adamw": True, "weight_decay": 0.0},
        ]


# Parts


def merging(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU())


def refining(width: int) -> nn.Sequential:
    steps = [(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*steps[0], *steps[1])


def answering(width: int) -> nn.Sequential:
    conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(width, 2, 1))


def feed_forward(width: int) -> nn.Sequential:
    first, second = linear(width, 3 * width), linear(3 * width, width)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(DROPOUT), second, nn.Dropout(DROPOUT))


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def heads_of(width: int) -> int:
    return 12 if width % 12 == 0 else 8


def middle(feats: Features) -> Tensor:
    """(N, C, h, w): layer2 and layer3 after their last ReLU."""
    low, high = feats["layer2"][-1], feats["layer3"][-1]
    return F.relu(torch.cat([resize(low, size_of(high)), high], dim=1))


def nearest(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) bool, of the pixels that PyTorch's nearest interpolation takes."""
    return F.interpolate(masks.float(), size, mode="nearest").bool()


def padding(feats: Features, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions outside the image, bool, in the axes of `masks` with h, w for H, W: none unless the features say."""
    padded = next((maps[-1] for name, maps in feats.items() if name.endswith("padding")), None)
    if padded is None:
        return torch.zeros((*masks.shape[:-2], *size), dtype=torch.bool, device=masks.device)
    return nearest(padded if padded.ndim == 4 else padded[:, None], size).view(*padded.shape[:-2], *size)


def object_flags(foreground_BKhw: Tensor) -> Tensor:
    """Never all of one kind: a support without object has one in its centre, one full of it has others in its
    corners."""
    h, w = size_of(foreground_BKhw)
    centre = torch.zeros_like(foreground_BKhw)
    centre[..., h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1] = True
    corners = torch.zeros_like(foreground_BKhw)
    corners[..., :: max(h - 1, 1), :: max(w - 1, 1)] = True
    some = foreground_BKhw.flatten(2).any(dim=2)[..., None, None]
    every = foreground_BKhw.flatten(2).all(dim=2)[..., None, None]
    return (foreground_BKhw & ~(corners & every)) | (centre & ~some)


def sample(
    foreground_S: Tensor, each: int, generator: torch.Generator | None, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Chooses `each` positions of the object and as many others, or, if there are fewer of one side, all of these and
    more of the other.

    Returns:
        The places of the chosen positions, and the places where their sides are looked up: the same if corrected. The
        released program looks a drawn position's side up at its rank among its own side.
    """
    sides = foreground_S.nonzero()[:, 0], (~foreground_S).nonzero()[:, 0]
    scarce = next((side for side in sides if len(side) < each), None)
    places, looked_up = [], []
    for side in sides:
        if side is scarce:
            places.append(side)
            looked_up.append(side)
        else:
            count = each if scarce is None else 2 * each - len(scarce)
            rank = torch.randperm(len(side), generator=generator)[:count].to(side.device)
            places.append(side[rank])
            looked_up.append(side[rank] if corrected else rank)
    return torch.cat(places), torch.cat(looked_up)


def consistent(score_BHNS: Tensor, foreground_BS: Tensor) -> Tensor:
    """(B, heads, S) bool: a token's best query has a best token of the same side."""
    best_query_BHS, best_token_BHN = score_BHNS.argmax(dim=2), score_BHNS.argmax(dim=3)
    found_BHS = best_token_BHN.gather(2, best_query_BHS)
    foreground_BHS = foreground_BS[:, None].expand_as(found_BHS)
    return foreground_BHS.gather(2, found_BHS) == foreground_BHS


def sine_code(valid_Bhw: Tensor, like_BChw: Tensor) -> Tensor:
    """(B, C, h, w): DETR's code of a position, the row in the first half of the channels, the column in the second."""
    half = like_BChw.shape[1] // 2
    wavelength = 10000 ** (2 * (torch.arange(half, device=like_BChw.device) // 2) / half)
    codes = []
    for axis in (1, 2):
        count = valid_Bhw.cumsum(dim=axis).to(like_BChw.dtype)
        turn = 2 * math.pi * count / (count.narrow(axis, -1, 1) + 1e-6)
        angle = turn[..., None] / wavelength.to(turn.dtype)
        codes.append(torch.stack([angle[..., ::2].sin(), angle[..., 1::2].cos()], dim=4).flatten(3))
    return torch.cat(codes, dim=3).movedim(3, 1)


# Training


class WeightedDice(nn.Module):
    """The Dice loss of background and foreground, each of its own sigmoid, added; a mean over the batch.

    Args:
        ignore_index: value of pixels that belong to neither.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """A scalar, of (B, 2, H, W) and (B, H, W)."""
        true = torch.stack([(masks == side) & (masks != self.ignore_index) for side in (0, 1)], dim=1).to(logits.dtype)
        score = logits.sigmoid()
        both = (score * true).sum(dim=(2, 3))
        squares = (score**2).sum(dim=(2, 3)) + (true**2).sum(dim=(2, 3))
        return (1 - 2 * both / squares.clamp(min=1e-8)).sum() / len(logits)


class SGDAndAdamW(Optimizer):
    """SGD for the groups without "adamw", AdamW for those with it.

    Args:
        groups: dicts of "params" and "adamw".
        lr, momentum, nesterov, weight_decay: of SGD.
        adamw_lr, adamw_weight_decay: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        adamw_lr: float,
        adamw_weight_decay: float,
    ) -> None:
        super().__init__(groups, {"adamw": False})
        by_sgd, by_adamw = ([g for g in self.param_groups if g["adamw"] == kind] for kind in (False, True))
        self.parts = (
            SGD(by_sgd, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay),
            AdamW(by_adamw, lr=adamw_lr, weight_decay=adamw_weight_decay),
        )
        self.share()

    def share(self) -> None:
        """The parts have the same groups and state as the whole, which is what schedules and checkpoints know."""
        for adamw, part in enumerate(self.parts):
            part.param_groups = [group for group in self.param_groups if group["adamw"] == bool(adamw)]
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share()


def poly(optimizer: Optimizer, epochs: int, power: float = 0.9) -> LambdaLR:
    """The rate of SGD falls to 0 over the epochs; that of AdamW stays."""

    def falls(epoch: int) -> float:
        return max(1 - epoch / epochs, 0) ** power

    return LambdaLR(optimizer, [(lambda epoch: 1.0) if g.get("adamw") else falls for g in optimizer.param_groups])


# The authors' checkpoints


def from_release(state_dict: Mapping[str, Tensor], **options: Any) -> CyCTRHead:
    """The head from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors and `addtional_proj`, which nothing uses, are ignored.
        options: corrected, seed, see `CyCTRHead`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in of_head(state_dict).items():
        root = next((root for root in NAMES if f"{name}.".startswith(f"{root}.")), "")
        if not name.startswith(("backbone.", "addtional_proj.")):
            state[NAMES.get(root, "") + name.removeprefix(root)] = tensor
    read = inputs(state, "of_query.0.weight")
    channels = {"layer2": read // 3, "layer3": read - read // 3}
    return filled(CyCTRHead(channels, len(state["of_query.0.weight"]), **options), state)
