"""RPMMs: prototype mixtures of 1, 3 and 6 components, the answer of each round refined by the next.

Yang et al., "Prototype Mixture Models for Few-shot Semantic Segmentation", ECCV 2020. Published program:
github.com/Yang-Bob/PMMs at 100d66b (`FRPMMs.py`), no licence; this code was written from a description of it.

Each round does what PMMs do (`pmms.py`), with another number of prototypes and the same layers, and also reads the
softmax of the round before. The loss counts all three rounds.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pmnet.backbones import Features
from pmnet.methods.base import Criterion, scored, size_of
from pmnet.methods.mixture import WIDTH, MixtureHead, Prototypes, from_names, upsampled
from pmnet.methods.pmms import PMMs


class Mixtures(NamedTuple):
    """What is remembered of B episodes.

    Attributes:
        prototypes: of each round.
        shots: (B,) int64, K.
    """

    prototypes: list[Prototypes]
    shots: Tensor


class RPMMsHead(MixtureHead):
    """
    Args:
        channels: feature channels of "layer2" and "layer3".
        seed: of the starts of the mixtures.
    """

    def __init__(self, channels: Mapping[str, int], seed: int = 0) -> None:
        super().__init__(channels, (1, 3, 6), WIDTH + 2, lambda: (nn.ReLU(), nn.Dropout2d(0.5)), seed)

    def see(self, support_feats: Features, support_masks: Tensor) -> Mixtures:
        B, K = support_masks.shape[:2]
        return Mixtures(self.prototypes(support_feats, support_masks), torch.full((B,), K, device=support_masks.device))

    def segment(self, query_feats: Features, seen: Mixtures, size: tuple[int, int]) -> Tensor:
        """The last round's logits where K = 1; the sum of all rounds' probabilities, divided by 5, where K > 1."""
        rounds = self.rounds(query_feats, seen)
        several = torch.stack([logits.softmax(dim=1) for logits in rounds]).sum(dim=0) / 5
        return upsampled(torch.where(seen.shots[:, None, None, None] > 1, several, rounds[-1]), size)

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The sum of the criterion over the three rounds; arguments as those of `Head.loss`."""
        rounds = self.rounds(query_feats, self.see(support_feats, support_masks))
        size = size_of(query_mask)
        return torch.stack([scored(criterion, upsampled(logits, size), query_mask) for logits in rounds]).sum()

    def rounds(self, query_feats: Features, seen: Mixtures) -> list[Tensor]:
        """The logits (B, 2, h, w) of each round."""
        query_BChw = self.embedded(query_feats)
        answer, rounds = torch.zeros_like(query_BChw[:, :2]), []
        for prototypes in seen.prototypes:
            matched = self.matched(query_BChw, prototypes.foreground)
            x = self.merge(torch.cat([matched, self.probability_map(query_BChw, prototypes).to(matched.dtype)], dim=1))
            rounds.append(self.decode(x, answer))
            answer = rounds[-1].softmax(dim=1)
        return rounds


class RPMMs(PMMs):
    """Takes any number of shots and any image sides; arguments as those of `PMMs`."""

    head_type = RPMMsHead


def from_release(state_dict: Mapping[str, Tensor], seed: int = 0) -> RPMMsHead:
    """The head from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored. Tensors `mu/1`, `mu/3`, `mu/6` (1, 256, k)
            are the starts of the mixtures, which the authors' program draws in every forward pass.
        seed: of the starts of the mixtures otherwise.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    return from_names(RPMMsHead, state_dict, seed)
