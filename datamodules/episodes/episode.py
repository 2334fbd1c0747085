"""The batch type: the one definition of the fields, shapes and dtypes of an episode."""

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = 255  # mask value of pixels that are neither foreground nor background
OTHER = 2  # query mask value, in an episode whose query does not show the class, of the class that it shows instead


class EpisodeSpec(NamedTuple):
    """One row of an episode list: the names of the query and of its supports. No image is read to sample it.

    Attributes:
        query: name of the query image.
        supports: names of the K support images.
        class_id: the class to segment, an index into the dataset's `classes`.

    Example:
        >>> EpisodeSpec("cat/1", ("cat/4", "cat/2"), 0).row()
        ['cat/1', ['cat/4', 'cat/2'], 0]
    """

    query: str
    supports: tuple[str, ...]
    class_id: int

    def row(self) -> list[str | list[str] | int]:
        """The spec as plain values in the form of the published lists: [query, [supports], class]."""
        return [self.query, list(self.supports), self.class_id]


@dataclass
class Episode:
    """A batch of B episodes with K support images each, or a single episode without the axis B.

    Images stay uint8 until the backbone normalises them on its device.

    Attributes:
        query: (B, 3, H, W) uint8 RGB, 0..255.
        query_mask: (B, H, W) uint8; 1 = the episode's class, 0 = anything else, 255 = ignore; 2 only in episodes whose
            query does not show the class: what it shows instead, see `absent.py`.
        support: (B, K, 3, H, W) uint8 RGB, 0..255.
        support_masks: (B, K, H, W) uint8; 1 = the episode's class, 0 = anything else.
        class_id: (B,) int64, index into the dataset's `classes`.
        index: (B,) int64, position in the test list or in the training epoch.
        spec: the B rows of the episode list.
        truth: the B query masks (h, w) uint8 at the size where predictions are compared; empty: `query_mask`.

    Example:
        >>> image, mask = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.uint8)
        >>> spec = EpisodeSpec("cat/1", ("cat/2",), 0)
        >>> single = Episode(image, mask, image[None], mask[None], torch.tensor(0), torch.tensor(0), [spec])
        >>> batch = Episode.collate([single, single])
        >>> batch.query.shape, batch.support.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 1, 3, 32, 32]))
    """

    query: Tensor
    query_mask: Tensor
    support: Tensor
    support_masks: Tensor
    class_id: Tensor
    index: Tensor
    spec: list[EpisodeSpec]
    truth: list[Tensor] = field(default_factory=list)

    @classmethod
    def collate(cls, episodes: list["Episode"]) -> "Episode":
        """Stacks single episodes into a batch. All must have the same image size and number of shots."""
        stacked = {n: torch.stack([getattr(e, n) for e in episodes]) for n in TENSORS}
        spec, truth = [row for e in episodes for row in e.spec], [mask for e in episodes for mask in e.truth]
        return cls(**stacked, spec=spec, truth=truth)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Episode":
        """A copy whose tensors are on `device`."""
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in TENSORS}
        return replace(self, **moved, truth=[mask.to(device, non_blocking=non_blocking) for mask in self.truth])

    def pin_memory(self) -> "Episode":
        """A copy whose tensors are in pinned memory; the DataLoader calls this."""
        pinned = {n: getattr(self, n).pin_memory() for n in TENSORS}
        return replace(self, **pinned, truth=[mask.pin_memory() for mask in self.truth])


TENSORS = tuple(field.name for field in fields(Episode) if field.name not in ("spec", "truth"))
