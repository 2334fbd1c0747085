"""Several shots by votes, as HSNet and the methods that descend from it take them: each support answers alone."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pmnet.backbones import Features
from pmnet.methods.base import Criterion, Head, agreeing, margin_of, scored, size_of

POSITIONS_ON_CPU, POSITIONS_ELSEWHERE = 2**23, 2**28  # correlations that are worked on at a time


def vote_share(votes_BKHW: Tensor) -> Tensor:
    """Of each pixel, its votes as a share of the most that any pixel of the image has; (B, H, W) in [0, 1].

    Args:
        votes_BKHW: each support's mask, bool.
    """
    votes_BHW = votes_BKHW.sum(dim=1)
    most_B11 = votes_BHW.amax(dim=(1, 2), keepdim=True).clamp(min=1)
    return votes_BHW / most_B11


def voted(votes_BKHW: Tensor) -> Tensor:
    """The mask (B, H, W) bool: one support's answer, or the pixels with at least half of the most votes."""
    return votes_BKHW[:, 0] if votes_BKHW.shape[1] == 1 else vote_share(votes_BKHW) >= 0.5


def foreground(answers_BK2HW: Tensor) -> Tensor:
    """The masks (B, K, H, W) bool of logits; ties are background."""
    return answers_BK2HW[:, :, 1] > answers_BK2HW[:, :, 0]


class VotingHead(Head):
    """A head that answers for one support at a time.

    A subclass writes `pairs`; and `see_query` for what needs to be computed once for all supports of a query. What
    `see` returns has leaves (B, K, ...).
    """

    def see_query(self, query_feats: Features) -> Any:
        """What `pairs` takes of the queries, computed once for all of their supports; leaves are (B, ...)."""
        return query_feats

    @abstractmethod
    def pairs(self, query: Any, support: Any, size: tuple[int, int]) -> Tensor:
        """Logits (N, 2, H, W) at the final size, of N queries with one support each.

        Args:
            query: what `see_query` returned, of N queries.
            support: what `see` returned, of N supports: leaves (N, ...).
            size: H, W.
        """

    def positions(self, query: Any) -> int:
        """Correlations of one pair; as many pairs run together as memory allows. 0: all run together."""
        return 0

    def answers(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """Every support's logits, (B, K, 2, H, W). Arguments as those of `segment`."""
        query = self.see_query(query_feats)
        (B, K), device = shape_and_device(seen)
        limit = POSITIONS_ON_CPU if device.type == "cpu" else POSITIONS_ELSEWHERE
        positions = self.positions(query)
        parts = []
        for b, k in portions(B, K, max(1, limit // positions) if positions else B * K):
            queries = each(query, partial(for_each_shot, b, k.stop - k.start))
            parts.append(self.pairs(queries, each(seen, partial(shots, b, k)), size))
        return torch.cat(parts).unflatten(0, (B, K))

    def segment(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W) by one support; by several the two sides' shares of the votes, whose larger one is the
        answer but for ties (1/2 each), which are foreground in `mask`."""
        answers = self.answers(query_feats, seen, size)
        if answers.shape[1] == 1:
            return answers[:, 0]
        share = vote_share(foreground(answers)).to(answers.dtype)
        return torch.stack([1 - share, share], dim=1)

    def mask(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        return voted(foreground(self.answers(query_feats, seen, size)))

    def margin(self, query_feats: Features, seen: Any, size: tuple[int, int]) -> Tensor:
        """The largest margin of any support's own answer: votes alone do not say how sure the supports are."""
        answers = self.answers(query_feats, seen, size)
        margin_BKHW = margin_of(answers.flatten(0, 1)).unflatten(0, answers.shape[:2])
        return agreeing(margin_BKHW.amax(dim=1), voted(foreground(answers)))

    def loss(
        self,
        query_feats: Features,
        support_feats: Features,
        support_masks: Tensor,
        query_mask: Tensor,
        criterion: Criterion,
    ) -> Tensor:
        """The criterion of every support's own answer: votes have no gradient."""
        seen, K = self.see(support_feats, support_masks), support_masks.shape[1]
        answers = self.answers(query_feats, seen, size_of(query_mask))
        return scored(criterion, answers.flatten(0, 1), query_mask.repeat_interleave(K, dim=0))


def portions(B: int, K: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Episodes and shots that run together: all shots of some episodes, or some shots of one."""
    many, few = max(1, at_once // K), min(K, at_once)
    for b in range(0, B, many):
        for k in range(0, K, few):
            yield slice(b, b + many), slice(k, min(K, k + few))


def for_each_shot(episodes: slice, K: int, x: Tensor) -> Tensor:
    """(B, ...) -> (N, ...), each of some episodes K times."""
    return x[episodes, None].expand(-1, K, *x.shape[1:]).flatten(0, 1)


def shots(episodes: slice, shots: slice, x: Tensor) -> Tensor:
    """(B, K, ...) -> (N, ...), some of them."""
    return x[episodes, shots].flatten(0, 1)


def shape_and_device(tree: Any) -> tuple[tuple[int, int], torch.device]:
    """The first two axes of a tree's tensors, and their device."""
    while not isinstance(tree, Tensor):
        tree = next(iter(tree.values() if isinstance(tree, Mapping) else tree))
    return (tree.shape[0], tree.shape[1]), tree.device


def each(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of every tensor in dicts, lists and named tuples."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {name: each(value, function) for name, value in tree.items()}
    values = [each(value, function) for value in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
