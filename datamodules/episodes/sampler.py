"""Samples episodes.

An episode depends only on the seed and on its position in the test list or training epoch. The number of workers, the
batch size and the number of processes do not change it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from random import Random

import numpy as np
from torch.utils.data import Sampler

from datamodules.episodes.episode import EpisodeSpec

Images = dict[int, Sequence[str]]  # class id -> names of the images that show the class


class Draw:
    """Random draws with NumPy's legacy generator, in the way of the published loaders.

    Args:
        repeats: whether an image may appear twice among the K supports of an episode, as in the published lists.
        seed: seed of the generator; 0 in all published results.

    Example:
        >>> draw = Draw(repeats=False)
        >>> draw.index(10), draw.supports(["a", "b", "c", "d"], query="b", shot=2)
        (2, ('a', 'c'))
    """

    def __init__(self, repeats: bool = True, seed: int = 0) -> None:
        self.random, self.repeats = np.random.RandomState(seed), repeats

    def index(self, n: int) -> int:
        """Draws one of 0..n-1. `replace=False` shuffles all n, so the result differs from that of `choice(n)`."""
        return int(self.random.choice(n, 1, replace=False)[0])

    def supports(self, names: Sequence[str], query: str, shot: int) -> tuple[str, ...]:
        """Draws `shot` names that differ from the query."""
        supports: list[str] = []
        while len(supports) < shot:
            name = names[self.index(len(names))]
            if name != query and (self.repeats or name not in supports):
                supports.append(name)
        return tuple(supports)


class PlainDraw(Draw):
    """Random draws for the user's own images, for which there is no published protocol."""

    def index(self, n: int) -> int:
        return int(self.random.choice(n))


class PythonDraw(Draw):
    """Random draws with Python's generator, in the way of PFENet's program and those after it."""

    def __init__(self, repeats: bool = False, seed: int = 0) -> None:
        super().__init__(repeats, seed)
        self.python = Random(seed)

    def index(self, n: int) -> int:
        return self.python.randrange(n)


# The functions below sample test lists. Each class in `images` needs at least 2 images (K + 1 without repeats).


def draw_in_turn(images: Images, episodes: int, shot: int, draw: Draw) -> list[EpisodeSpec]:
    """Cycles through the classes and draws a random query of each (Deepglobe, ISIC, Chest X-ray: PATNet)."""
    classes = sorted(images)
    drawn = []
    for i in range(episodes):
        class_id = classes[i % len(classes)]
        names = images[class_id]
        query = names[draw.index(len(names))]
        drawn.append(EpisodeSpec(query, draw.supports(names, query, shot), class_id))
    return drawn


def draw_any_class(images: Images, episodes: int, shot: int, draw: Draw) -> list[EpisodeSpec]:
    """Draws a random class, then a random query of this class (COCO-20i: HSNet; PANet)."""
    classes = sorted(images)
    drawn = []
    for _ in range(episodes):
        class_id = classes[draw.index(len(classes))]
        names = images[class_id]
        query = names[draw.index(len(names))]
        drawn.append(EpisodeSpec(query, draw.supports(names, query, shot), class_id))
    return drawn


def draw_listed(
    queries: Sequence[tuple[str, int]], images: Images, episodes: int, shot: int, draw: Draw
) -> list[EpisodeSpec]:
    """Cycles through a fixed list of queries, pairs (image, class id) (PASCAL-5i, FSS-1000: HSNet)."""
    drawn = []
    for i in range(episodes):
        query, class_id = queries[i % len(queries)]
        drawn.append(EpisodeSpec(query, draw.supports(images[class_id], query, shot), class_id))
    return drawn


def draw_each_image(images: Images, episodes: int, shot: int, draw: Draw) -> list[EpisodeSpec]:
    """Cycles through the images in the order of their names and draws one of the classes of each (PFENet)."""
    classes: dict[str, list[int]] = {}
    for class_id in sorted(images):
        for name in images[class_id]:
            classes.setdefault(name, []).append(class_id)
    queries, drawn = sorted(classes), []
    for i in range(episodes):
        query = queries[i % len(queries)]
        class_id = classes[query][draw.index(len(classes[query]))]
        drawn.append(EpisodeSpec(query, draw.supports(images[class_id], query, shot), class_id))
    return drawn


class Names(Sequence[str]):
    """A sequence of strings stored in one array, which forked workers can read without copying memory.

    Reading a list of Python strings updates their reference counts, so each worker gradually copies all its pages.

    Example:
        >>> names = Names(["cat/1", "cat/2", "dog/1"])
        >>> len(names), names[1], list(names[1:])
        (3, 'cat/2', ['cat/2', 'dog/1'])
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.array = np.array([name.encode() for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return Names([n.decode() for n in self.array[i]]) if isinstance(i, slice) else self.array[i].decode()


class TrainingEpisodes:
    """Training episodes. Each depends only on (seed, epoch, index).

    By default, every (image, class) pair becomes the query once before any pair is repeated, in a new random order
    each epoch. If `balanced`, a random class is drawn first, then a random query of this class. The supports are
    drawn without repeats from the other images of the class.

    Args:
        images: class id -> names of its images, at least K + 1.
        shot: number of support images, K.
        seed: seed of all draws.
        balanced: draw all classes equally often, whatever their number of images.

    Example:
        >>> episodes = TrainingEpisodes({0: ["a", "b", "c"], 4: ["d", "e"]}, shot=1, seed=0)
        >>> episodes.pairs, episodes[0, 0]  # epoch 0, index 0
        (5, EpisodeSpec(query='b', supports=('c',), class_id=0))
    """

    def __init__(self, images: Images, shot: int, seed: int, balanced: bool = False) -> None:
        self.images, self.shot, self.seed, self.balanced = images, shot, seed, balanced
        self.classes = np.array(sorted(images))
        self.ends = np.cumsum([len(images[c]) for c in self.classes])  # class i: pairs ends[i - 1] .. ends[i] - 1

    @property
    def pairs(self) -> int:
        """Number of (image, class) pairs."""
        return int(self.ends[-1])

    @cached_property
    def per_epoch(self) -> int:
        """Default number of episodes per epoch: the number of pairs, or of different images if `balanced`."""
        return len({n for names in self.images.values() for n in names}) if self.balanced else self.pairs

    def __getitem__(self, key: tuple[int, int]) -> EpisodeSpec:
        """Samples one episode.

        Args:
            key: the pair (epoch, index). An index beyond the last pair starts over in a new order.
        """
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
    """A random permutation of 0..length-1, (length,) int64. `round_` counts the passes within an epoch."""
    return np.random.default_rng([seed, epoch, round_, length]).permutation(length)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields the keys (epoch, index) of one process's share of the training episodes.

    Each global batch is split into contiguous shares, one per process, so that N processes together train on the same
    batches as one process. The Trainer calls `set_epoch`.

    Args:
        length: episodes per epoch over all processes; a multiple of `batch_size`.
        batch_size: global batch size; a multiple of `processes`.
        process: rank of this process.
        processes: number of processes.

    Attributes:
        skip: number of batches to skip in the next pass, when an epoch is resumed.

    Example:
        >>> list(EpochSampler(length=8, batch_size=4, process=1, processes=2))
        [(0, 2), (0, 3), (0, 6), (0, 7)]
    """

    def __init__(self, length: int, batch_size: int, process: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size = length, batch_size
        self.process, self.processes = process, processes
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Moves to another epoch and resets `skip`; the current epoch changes nothing."""
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
    """Hash of an episode list: the sha256 of its JSON rows [query, [supports], class], in hex."""
    return json_hash([e.row() for e in episodes])


def json_hash(value: object) -> str:
    """sha256 of a value's compact JSON, in hex.

    Example:
        >>> json_hash({"a": [1, 2]})[:12]
        '01530d164d47'
    """
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
