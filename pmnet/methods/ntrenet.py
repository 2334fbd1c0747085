"""NTRENet: PFENet's pyramid, told what is background and which other objects look like the right one.

Liu et al., "Learning Non-target Knowledge for Few-shot Semantic Segmentation", CVPR 2022. Published program:
github.com/LIUYUANWEI98/NERTNet at 1fe13ad, no licence; this code was written from a description of it.

A learned prototype finds the query's background. At each scale of the pyramid (`pfenet.py`), what is neither background
nor the object by a first answer is taken for a distracting object, whose prototype is shown to the layers of the final
answer. The published program fails when it trains: the loss here was never compared with it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Features
from pmnet.methods.base import IGNORE, Criterion, resize, scored, size_of
from pmnet.methods.pfenet import (
    BINS,
    EPS,
    WIDTH,
    Enriched,
    PFENet,
    PyramidHead,
    Seen,
    classifier,
    flat,
    mask_at,
    masked_deep,
    middle,
    pointwise,
    prior_mask,
    reduction,
    residual,
    spread,
    supervised,
)
from pmnet.methods.pooling import masked_mean
from pmnet.methods.release import filled, inputs, of_head

if TYPE_CHECKING:
    from datamodules import Episode

KEPT, COMPARED = 2000, 1000  # prototypes of distracting objects: remembered of a class, and compared with in one step


class Answers(NamedTuple):
    """Logits of a batch.

    Attributes:
        background: (B, 2, h, w); 1 means background.
        first: of each scale, (B, 2, b, b), before distracting objects are known.
        enriched: what the pyramid makes of all.
    """

    background: Tensor
    first: list[Tensor]
    enriched: Enriched


class NTRENetHead(PyramidHead):
    """
    Args:
        middle_channels: of layer2 and layer3 together.
        bins: see `PyramidHead`.
    """

    def __init__(self, middle_channels: int, bins: Sequence[float] = BINS) -> None:
        super().__init__(bins)
        self.down_query = reduction(middle_channels)
        self.down_supp = reduction(middle_channels)
        self.bg_prototype = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.down_bg = reduction(2 * WIDTH)
        self.bg_res1 = residual()
        self.bg_cls = classifier()
        self.init_merge1 = nn.ModuleList(pointwise(2 * WIDTH) for _ in self.bins)
        self.init_merge2 = nn.ModuleList(pointwise(2 * WIDTH + 1) for _ in self.bins)
        self.inital_beta_conv = nn.ModuleList(residual() for _ in self.bins)
        self.inital_inner_cls = nn.ModuleList(classifier() for _ in self.bins)
        self.init_merge3 = nn.ModuleList(pointwise(2 * WIDTH) for _ in self.bins)
        self.negatives: dict[int, Tensor] = {}  # class -> (n, 256), newest first; of this training, not saved

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """
        Args:
            support_feats: "layer2", "layer3", and as "layer4_masked" what layer4 makes of the masked layer3.
            support_masks: see `Head.see`.
        """
        return self.remembered(self.down_supp(middle(flat(support_feats))), support_feats, support_masks)

    def remembered(self, support_NChw: Tensor, support_feats: Features, support_masks: Tensor) -> Seen:
        prototype_NC = masked_mean(support_NChw, mask_at(support_masks, support_NChw).flatten(0, 1), EPS)
        prototype_BC = prototype_NC.unflatten(0, support_masks.shape[:2]).mean(dim=1)
        return Seen(prototype_BC, masked_deep(support_feats, support_masks))

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W); reads "layer2", "layer3" and "layer4"."""
        query_BChw = self.down_query(middle(query_feats))
        return resize(self.answers(query_BChw, query_feats, seen).enriched.logits, size)

    def answers(self, query_BChw: Tensor, query_feats: Features, seen: Seen) -> Answers:
        background_B2hw = self.background(query_BChw)
        prior_B1hw = prior_mask(query_feats["layer4"][-1], seen.deep).mean(dim=1, keepdim=True)
        first, merged = [], []
        for i, q in enumerate(self.pooled(query_BChw)):
            side = size_of(q)
            x = self.init_merge1[i](torch.cat([q, self.bg_prototype.expand_as(q)], dim=1))
            x = self.init_merge2[i](torch.cat([x, spread(seen.prototype, q), resize(prior_B1hw, side)], dim=1))
            x = x + self.inital_beta_conv[i](x)
            first.append(self.inital_inner_cls[i](x))
            neither_B1bb = distracting(resize(background_B2hw, side), first[-1]).to(q.dtype)
            distractor_BC = (neither_B1bb * q).mean(dim=(2, 3))  # over all positions, however few are distracting
            merged.append(self.init_merge3[i](torch.cat([x, spread(distractor_BC, q)], dim=1)))
        return Answers(background_B2hw, first, self.enriched(merged, size_of(query_BChw)))

    def background(self, feature_NChw: Tensor) -> Tensor:
        """Logits (N, 2, h, w); 1 means background."""
        x = self.down_bg(torch.cat([feature_NChw, self.bg_prototype.expand_as(feature_NChw)], dim=1))
        return self.bg_cls(x + self.bg_res1(x))

    # Training, after the text of the program, which fails before it gets here

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
        class_ids: Tensor | None = None,
    ) -> Tensor:
        """Of the answer, of the scales' first and final answers, of the background's, and a contrast of prototypes.

        Args:
            query_feats, support_feats, support_masks, query_mask, criterion: see `Head.loss`.
            class_ids: (B,), the class of each episode, whose distracting objects it is compared with; None: one class.
        """
        (B, K), size = support_masks.shape[:2], size_of(query_mask)
        query_BChw, support_NChw = self.down_query(middle(query_feats)), self.down_supp(middle(flat(support_feats)))
        seen = self.remembered(support_NChw, support_feats, support_masks)
        answers = self.answers(query_BChw, query_feats, seen)
        main, final = supervised(answers.enriched, query_mask, criterion)
        first = torch.stack([scored(criterion, resize(logits, size), query_mask) for logits in answers.first]).mean()

        support_BKChw = support_NChw.unflatten(0, (B, K))
        features = [query_BChw, *support_BKChw.unbind(1)]
        backgrounds = [answers.background, *self.background(support_NChw).unflatten(0, (B, K)).unbind(1)]
        masks = [query_mask, *support_masks.unbind(1)]
        of_background = [background_loss(b, m, criterion) for b, m in zip(backgrounds, masks, strict=True)]

        classes = [0] * B if class_ids is None else class_ids.tolist()
        self.remember(features, backgrounds, masks, classes)
        contrast = self.contrast(query_BChw, answers.enriched.logits, seen.prototype, classes)
        return main + torch.stack(of_background).mean() + 0.4 * final + 0.6 * first + 0.01 * contrast

    @torch.no_grad()
    def remember(
        self, features: list[Tensor], backgrounds: list[Tensor], masks: list[Tensor], classes: list[int]
    ) -> None:
        """The prototypes of distracting objects, which are neither background nor the true object."""
        for feature_BChw, background_B2hw, mask_BHW in zip(features, backgrounds, masks, strict=True):
            object_B1hw = mask_at(mask_BHW[:, None], feature_BChw)
            weight_Bhw = (1 - background_B2hw.argmax(dim=1)) * (1 - object_B1hw[:, 0])
            for class_id, prototype_C, weight_hw in zip(
                classes, masked_mean(feature_BChw, weight_Bhw, EPS), weight_Bhw, strict=True
            ):
                if weight_hw.any():
                    known = self.negatives.get(class_id, prototype_C[:0].view(0, WIDTH))
                    self.negatives[class_id] = torch.cat([prototype_C[None], known])[:KEPT]

    def contrast(self, query_BChw: Tensor, logits: Tensor, prototype_BC: Tensor, classes: list[int]) -> Tensor:
        """How much likelier the query's object, as predicted, is to be the supports' than a distracting one."""
        found_BC = masked_mean(query_BChw, logits.argmax(dim=1).to(query_BChw.dtype), EPS)
        losses = [query_BChw.new_zeros(())]
        for class_id, found_C, prototype_C in zip(classes, found_BC, prototype_BC, strict=True):
            if class_id in self.negatives:
                known = self.negatives[class_id]
                chosen = known[torch.randperm(len(known))[:COMPARED].to(known.device)]
                positive = F.cosine_similarity(found_C, prototype_C, dim=0).exp()
                losses.append(-(positive / F.cosine_similarity(found_C[None], chosen).exp().sum() + 1e-8).log())
        return torch.stack(losses).sum() / len(classes)


def distracting(background_B2hw: Tensor, object_B2hw: Tensor) -> Tensor:
    """(B, 1, h, w) bool: neither background nor object."""
    return ((background_B2hw.argmax(dim=1) == 0) & (object_B2hw.argmax(dim=1) == 0))[:, None]


def background_loss(logits: Tensor, mask_BHW: Tensor, criterion: Criterion) -> Tensor:
    """The object is no background; and, half as much, everything is."""
    logits, object_BHW = resize(logits, size_of(mask_BHW)).float(), (mask_BHW == 1).float()
    everything = torch.ones_like(mask_BHW).masked_fill(mask_BHW == IGNORE, IGNORE)
    inside_BHW = object_BHW * F.cross_entropy(logits, torch.zeros_like(mask_BHW, dtype=torch.int64), reduction="none")
    inside_B = inside_BHW.sum(dim=(1, 2)) / (object_BHW.sum(dim=(1, 2)) + 1e-5)
    return inside_B.mean() + 0.5 * scored(criterion, logits, everything)


class NTRENet(PFENet):
    """Takes any number of shots, and image sides of 8n + 1; arguments as those of `PFENet`.

    Example:
        >>> import torch
        >>> from pmnet.backbones.dilated import DilatedResNetBackbone
        >>> from pmnet.methods.ntrenet import NTRENet
        >>> method = NTRENet(DilatedResNetBackbone("resnet50s", "none")).eval()
        >>> method.predict(torch.rand(1, 3, 65, 65), torch.rand(1, 5, 3, 65, 65), torch.ones(1, 5, 65, 65)).shape
        torch.Size([1, 65, 65])
    """

    head: NTRENetHead
    head_type = NTRENetHead

    def loss(self, episode: "Episode", criterion: Criterion) -> Tensor:
        feats = self.features(episode.query, episode.support, episode.support_masks)
        masks = episode.support_masks, episode.query_mask
        return self.head.loss(*feats, *masks, criterion, class_ids=episode.class_id)


def from_release(state_dict: Mapping[str, Tensor], bins: Sequence[float] = BINS) -> NTRENetHead:
    """The head, in eval mode, from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored.
        bins: see `PyramidHead`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = of_head(state_dict)
    return filled(NTRENetHead(inputs(state, "down_query.0.weight"), bins), state)
