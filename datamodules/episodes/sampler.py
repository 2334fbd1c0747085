"""Who meets whom: episodes as pure functions of their place, so that workers, batch size and the number
of processes change nothing."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np
from torch.utils.data import Sampler

from datamodules.episodes.episode import EpisodeSpec

Images = dict[int, Sequence[str]]  # class id -> names of the images that show it


class Draw:
    """Numpy's legacy generator, used as the published loaders use it.

    Args:
        repeats: whether an image may come twice among the K supports of an episode, as published.
        seed: 0 in all published results.
    """

    def __init__(self, repeats: bool = True, seed: int = 0) -> None:
        self.random, self.repeats = np.random.RandomState(seed), repeats

    def place(self, n: int) -> int:
        """One of 0..n-1. This way of asking shuffles all n, and so takes other numbers than `choice(n)`."""
        return int(self.random.choice(n, 1, replace=False)[0])

    def supports(self, names: Sequence[str], query: str, shot: int) -> tuple[str, ...]:
        """K names that are not the query's."""
        supports: list[str] = []
        while len(supports) < shot:
            name = names[self.place(len(names))]
            if name != query and (self.repeats or name not in supports):
                supports.append(name)
        return tuple(supports)


class PlainDraw(Draw):
    """For images of one's own, of which nothing is published."""

    def place(self, n: int) -> int:
        return int(self.random.choice(n))


# Each draw of a test list takes the images of each class, at least two (K+1 where supports do not repeat).


def draw_in_turn(images: Images, episodes: int, shot: int, draw: Draw) -> list[EpisodeSpec]:
    """Class i mod n for episode i, its query at random (Deepglobe, ISIC, Chest X-ray: PATNet)."""
    classes = sorted(images)
    drawn = []
    for i in range(episodes):
        class_id = classes[i % len(classes)]
        names = images[class_id]
        query = names[draw.place(len(names))]
        drawn.append(EpisodeSpec(query, draw.supports(names, query, shot), class_id))
    return drawn


def draw_any_class(images: Images, episodes: int, shot: int, draw: Draw) -> list[EpisodeSpec]:
    """Class at random, then its query (COCO-20i: HSNet)."""
    classes = sorted(images)
    drawn = []
    for _ in range(episodes):
        class_id = classes[draw.place(len(classes))]
        names = images[class_id]
        query = names[draw.place(len(names))]
        drawn.append(EpisodeSpec(query, draw.supports(names, query, shot), class_id))
    return drawn


def draw_listed(
    queries: Sequence[tuple[str, int]], images: Images, episodes: int, shot: int, draw: Draw
) -> list[EpisodeSpec]:
    """Query i mod n of a list of (image, class), in its order (PASCAL-5i, FSS-1000: HSNet)."""
    drawn = []
    for i in range(episodes):
        query, class_id = queries[i % len(queries)]
        drawn.append(EpisodeSpec(query, draw.supports(images[class_id], query, shot), class_id))
    return drawn


class Names(Sequence[str]):
    """A list of names as one array: a worker process that reads it copies nothing.

    (Reading a list of Python strings writes their reference counts, and so copies their pages into each
    worker, one after the other.)
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.array = np.array([name.encode() for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return Names([n.decode() for n in self.array[i]]) if isinstance(i, slice) else self.array[i].decode()


class TrainingEpisodes:
    """Training episodes, each a function of (seed, epoch, index) alone.

    Every (image, class) pair is the query once before any is a second time, in an order shuffled anew each
    epoch; or, balanced, a class is drawn first, then its query. Supports are drawn at random from the other images
    of the class, without repeats.

    Args:
        images: of each class, at least K+1.
        shot: K.
        balanced: draws each class as often as any other, however many images it has.
    """

    def __init__(self, images: Images, shot: int, seed: int, balanced: bool = False) -> None:
        self.images, self.shot, self.seed, self.balanced = images, shot, seed, balanced
        self.classes = np.array(sorted(images))
        self.ends = np.cumsum([len(images[c]) for c in self.classes])  # pair number -> class, without a list

    @property
    def pairs(self) -> int:
        """Number of (image, class) pairs."""
        return int(self.ends[-1])

    @cached_property
    def per_epoch(self) -> int:
        """Episodes of an epoch, unless chosen otherwise: as many as pairs; balanced, as there are images."""
        return len({n for names in self.images.values() for n in names}) if self.balanced else self.pairs

    def __getitem__(self, key: tuple[int, int]) -> EpisodeSpec:
        """The episode at `index` of `epoch`; an index past the last pair starts over in a new order."""
        epoch, index = key
        random = np.random.default_rng([self.seed, epoch, index])
        if self.balanced:
            class_id = int(self.classes[random.integers(len(self.classes))])
            query = int(random.integers(len(self.images[class_id])))
        else:
            round_, place = divmod(index, self.pairs)
            pair = int(shuffled(self.seed, epoch, round_, self.pairs)[place])
            position = int(np.searchsorted(self.ends, pair, side="right"))
            class_id = int(self.classes[position])
            query = pair - (int(self.ends[position - 1]) if position else 0)
        names = self.images[class_id]
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

    Attributes:
        skip: batches to leave out of the next pass, where an epoch is gone on with.
    """

    def __init__(self, length: int, batch_size: int, process: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size = length, batch_size
        self.process, self.processes = process, processes
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        return self.length // self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        share, skip = self.batch_size // self.processes, self.skip
        self.skip = 0
        for start in range(skip * self.batch_size + self.process * share, self.length, self.batch_size):
            for index in range(start, start + share):
                yield self.epoch, index


def list_hash(episodes: list[EpisodeSpec]) -> str:
    """sha256 of an episode list as JSON rows [query, [supports], class]."""
    return json_hash([e.row() for e in episodes])


def json_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
