"""Test episodes whose query shows none of the class that the supports show.

A method that is only ever asked for objects that are there is never seen to mark what it should not. These episodes ask
for a class that is absent. They are added to a test list, which itself stays as it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.episodes.dataset import Episodes, FewShotDataset
from datamodules.episodes.episode import IGNORE, OTHER, Episode, EpisodeSpec
from datamodules.episodes.sampler import Images
from datamodules.errors import DatasetError

ATTEMPTS = 1000  # queries drawn for an episode before none counts as found; no mask is read twice


class AbsentSpec(NamedTuple):
    """One row of a list of episodes whose query does not show the class.

    Attributes:
        query: name of the query image.
        supports: names of the K support images.
        class_id: the class to segment, which the supports show and the query does not.
        shown: the class that the query was drawn for, and shows.

    Example:
        >>> AbsentSpec("dog/7", ("cat/4", "cat/2"), 0, 1).row()
        ['dog/7', ['cat/4', 'cat/2'], 0, 1]
    """

    query: str
    supports: tuple[str, ...]
    class_id: int
    shown: int

    @property
    def episode(self) -> EpisodeSpec:
        """The same without the class that is shown."""
        return EpisodeSpec(self.query, self.supports, self.class_id)

    def row(self) -> list[str | list[str] | int]:
        """The spec as plain values: [query, [supports], class, shown class]."""
        return [*self.episode.row(), self.shown]


def count_absent(share: float, episodes: int) -> int:
    """Number of absent episodes to add to a list, so that they are this share of all episodes.

    Args:
        share: at least 0, less than 1.
        episodes: number of ordinary episodes.

    Example:
        >>> count_absent(0, 1000), count_absent(0.2, 1000), count_absent(0.5, 1000)
        (0, 250, 1000)
    """
    return max(1, round(share / (1 - share) * episodes)) if share else 0


def draw_absent(
    dataset: FewShotDataset, images: Images, specs: Sequence[EpisodeSpec], count: int, seed: int
) -> list[AbsentSpec]:
    """Samples episodes whose query shows none of the class. The same arguments always give the same list.

    Each takes the supports and the class of an ordinary episode, in turn. Its query is an image of another class: the
    class is drawn first, then one of its images, until one has no pixel of the episode's class. The masks of the images
    drawn are read in their original size, because lists of images leave small objects out.

    Args:
        dataset: reads the masks.
        images: tested class -> names of its images.
        specs: the ordinary episodes.
        count: number of absent episodes.
        seed: seed of the draws.

    Raises:
        DatasetError: only one class is tested, or no image without the class is found.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> dataset = SyntheticDataset(size=64, images_per_class=9, seed=0)
        >>> images = {c: dataset.images_of(c, "test") for c in (0, 1, 2)}
        >>> specs = dataset.test_episodes([0, 1, 2], count=2, shot=1)
        >>> (spec,) = draw_absent(dataset, images, specs, count=1, seed=0)
        >>> dataset.read_mask(spec.query, spec.class_id).max().item(), spec.supports == specs[0].supports
        (0, True)
    """
    random, known = np.random.RandomState(seed), dict[tuple[str, int], bool]()

    def shows(name: str, class_id: int) -> bool:
        if len(dataset.classes) >= IGNORE:  # FSS-1000: an image shows one class, and its mask does not say which
            return False
        if (name, class_id) not in known:
            known[name, class_id] = bool((dataset.read_mask(name, class_id) == 1).any())
        return known[name, class_id]

    drawn = []
    for i in range(count):
        spec = specs[i % len(specs)]
        others = [c for c in sorted(images) if c != spec.class_id]
        if not others:
            raise DatasetError(
                f"episodes.absent takes queries of other tested classes, but '{dataset.classes[spec.class_id]}' is the "
                f"only class of {dataset.name} that is tested. Set episodes.absent=0, or test on several classes: "
                "another fold, fold=all, or another dataset."
            )
        for _ in range(ATTEMPTS):
            shown = others[random.randint(len(others))]
            query = images[shown][random.randint(len(images[shown]))]
            if not shows(query, spec.class_id):
                break
        else:
            raise DatasetError(
                f"episodes.absent needs images of {dataset.name} that show another tested class and no "
                f"'{dataset.classes[spec.class_id]}', but {ATTEMPTS:,} draws found none. Set episodes.absent=0, add "
                "such images, or test on other classes: another fold, or fold=all."
            )
        drawn.append(AbsentSpec(query, spec.supports, spec.class_id, shown))
    return drawn


class WithAbsent(Episodes):
    """Reads ordinary episodes, and after them the absent ones.

    In the query mask of an absent episode no pixel is 1, and those of the class that the query shows are 2 (`OTHER`).

    Args:
        ordinary: the ordinary episodes.
        absent: the absent ones.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> dataset = SyntheticDataset(size=64, images_per_class=9, seed=0)
        >>> specs = dataset.test_episodes([0, 1], count=4, shot=2)
        >>> absent = draw_absent(dataset, {c: dataset.images_of(c, "test") for c in (0, 1)}, specs, count=2, seed=0)
        >>> episodes = WithAbsent(Episodes(dataset, specs, size=(64, 64)), absent)
        >>> len(episodes), episodes[3].query_mask.unique().tolist(), episodes[4].query_mask.unique().tolist()
        (6, [0, 1], [0, 2])
    """

    def __init__(self, ordinary: Episodes, absent: Sequence[AbsentSpec]) -> None:
        assert isinstance(ordinary.specs, list)
        specs = [*ordinary.specs, *(spec.episode for spec in absent)]
        super().__init__(ordinary.dataset, specs, ordinary.size, protocol=ordinary.protocol)
        self.ordinary, self.absent = len(ordinary.specs), list(absent)

    def __getitem__(self, key: int | tuple[int, int]) -> Episode:
        """Reads a single episode, without the batch axis. `key`: position in the two lists together."""
        episode = super().__getitem__(key)
        assert isinstance(key, int)
        if key >= self.ordinary:
            spec = self.absent[key - self.ordinary]
            _, shown = self.read(spec.query, spec.shown)
            episode.query_mask = with_other(episode.query_mask, shown)
            other = spec.episode._replace(class_id=spec.shown)
            episode.truth = [with_other(mask, self.truth(other)) for mask in episode.truth]
        return episode


def with_other(mask: Tensor, shown: Tensor) -> Tensor:
    """A mask uint8 in which the pixels are 2 that are 1 in the mask of the class that is shown."""
    return torch.where(shown == 1, OTHER, mask).to(mask.dtype)
