"""The one batch type, and the one place where its fields, shapes and dtypes are written."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255  # value of a mask's pixels that count neither as foreground nor as background


class EpisodeSpec(NamedTuple):
    """Who meets whom: one row of an episode list, drawn before any image is touched."""

    query: str
    supports: tuple[str, ...]
    class_id: int

    def row(self) -> list[str | list[str] | int]:
        """As the published lists have it: [query, [supports], class]."""
        return [self.query, list(self.supports), self.class_id]


@dataclass
class Episode:
    """A batch of B episodes of K shots, or a single one without the axis B.

    Images travel as uint8; the backbone normalises them on its device.

    Attributes:
        query: (B, 3, H, W) uint8 RGB, 0..255.
        query_mask: (B, H, W) uint8; 1 = the episode's class, 0 = not, 255 = counts as neither.
        support: (B, K, 3, H, W) uint8 RGB, 0..255.
        support_masks: (B, K, H, W) uint8; 1 = the episode's class, 0 = anything else.
        class_id: (B,) int64, index into the dataset's `classes`.
        index: (B,) int64, place in the episode list (test) or in the epoch (training).
        spec: the B rows of the list that these are.
    """

    query: Tensor
    query_mask: Tensor
    support: Tensor
    support_masks: Tensor
    class_id: Tensor
    index: Tensor
    spec: list[EpisodeSpec]

    @classmethod
    def collate(cls, episodes: list["Episode"]) -> "Episode":
        """Stacks single episodes into a batch; all must have the same number of shots."""
        stacked = {n: torch.stack([getattr(e, n) for e in episodes]) for n in TENSORS}
        return cls(**stacked, spec=[row for e in episodes for row in e.spec])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Episode":
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> "Episode":
        return replace(self, **{n: getattr(self, n).pin_memory() for n in TENSORS})


TENSORS = tuple(field.name for field in fields(Episode) if field.name != "spec")
