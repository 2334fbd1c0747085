"""Who meets whom: episodes as pure functions of their place, so that workers, batch size and the number
of processes change nothing."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from datamodules.episode import EpisodeSpec

Images = dict[int, Sequence[str]]  # class id -> names of the images that show it


def draw_test_episodes(images: Images, episodes: int, shot: int, seed: int = 0) -> list[EpisodeSpec]:
    """The list of test episodes, drawn ahead with numpy's legacy generator, seeded as published lists are.

    Class i mod n for episode i, its query by `choice`, supports by `choice` until K differ from the query
    and from each other.

    Args:
        images: of each class, at least K+1.
        episodes: length of the list.
        shot: K.
        seed: 0 in all published results.
    """
    random = np.random.RandomState(seed)
    classes = sorted(images)
    drawn = []
    for i in range(episodes):
        class_id = classes[i % len(classes)]
        names = images[class_id]
        query = names[random.choice(len(names))]
        supports: list[str] = []
        while len(supports) < shot:
            name = names[random.choice(len(names))]
            if name != query and name not in supports:
                supports.append(name)
        drawn.append(EpisodeSpec(query, tuple(supports), class_id))
    return drawn


class TrainingEpisodes:
    """Training episodes, each a function of (seed, epoch, index) alone.

    Every (image, class) pair is the query once before any is a second time, in an order shuffled anew each
    epoch; supports are drawn at random from the other images of the class, without repeats.
    """

    def __init__(self, images: Images, shot: int, seed: int) -> None:
        self.images, self.shot, self.seed = images, shot, seed
        self.classes = np.array(sorted(images))
        self.ends = np.cumsum([len(images[c]) for c in self.classes])  # pair number -> class, without a list

    @property
    def pairs(self) -> int:
        """Number of (image, class) pairs: the episodes of one epoch, unless chosen otherwise."""
        return int(self.ends[-1])

    def __getitem__(self, key: tuple[int, int]) -> EpisodeSpec:
        """The episode at `index` of `epoch`; an index past the last pair starts over in a new order."""
        epoch, index = key
        round_, place = divmod(index, self.pairs)
        pair = int(shuffled(self.seed, epoch, round_, self.pairs)[place])
        position = int(np.searchsorted(self.ends, pair, side="right"))
        class_id = int(self.classes[position])
        names = self.images[class_id]
        query = pair - (int(self.ends[position - 1]) if position else 0)
        random = np.random.default_rng([self.seed, epoch, index])
        others = random.choice(len(names) - 1, self.shot, replace=False)
        supports = tuple(names[int(i) + (i >= query)] for i in others)
        return EpisodeSpec(names[query], supports, class_id)


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, round_: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, round_, length]).permutation(length)


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index) of this process's share of an epoch's training episodes.

    Each global batch is cut into contiguous shares, one a process, so that the batches of N processes
    together are those of one. The Trainer calls `set_epoch`.

    Args:
        length: episodes per epoch over all processes, a multiple of `batch_size`.
        batch_size: global batch size, a multiple of `processes`.
    """

    def __init__(self, length: int, batch_size: int, process: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size = length, batch_size
        self.process, self.processes = process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        share = self.batch_size // self.processes
        for start in range(self.process * share, self.length, self.batch_size):
            for index in range(start, start + share):
                yield self.epoch, index


def list_hash(episodes: list[EpisodeSpec]) -> str:
    """sha256 of an episode list as JSON rows [query, [supports], class]."""
    return json_hash([e.row() for e in episodes])


def json_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
