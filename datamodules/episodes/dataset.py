"""What every benchmark shares: classes and folds, reading, resizing, episodes."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.episodes.episode import IGNORE, Episode, EpisodeSpec
from datamodules.episodes.sampler import Images, PlainDraw, TrainingEpisodes, draw_in_turn
from datamodules.errors import DatasetError
from pmnet.segment.images import resize_image, resize_mask

log = logging.getLogger(__name__)
Split = Literal["train", "test"]
Fold = int | Literal["all"]


class FewShotDataset(ABC):
    """A benchmark: its classes, its folds, and how its files are read. A subclass is one small file.

    Attributes:
        classes: names of all classes; a class id is an index into them.
        folds: the novel classes of each fold, by id.
        test_only: whether it has no base classes, and so no folds.
        name: as in the config.
        splits: where the lists of images come from, recorded with every result.
        domain: what kind of images; "any" for images of one's own.
        tested_after: datasets of the same domain, training on which a published protocol tests this one.
        synonyms: names of classes that another dataset calls otherwise -> a common name.
        balanced: whether training draws a class first, and then its query, instead of every image once.
        test_length: number of episodes of a published test.
    """

    name: str
    classes: Sequence[str]
    folds: Sequence[Sequence[int]]
    splits: str
    test_only: bool = False
    domain: str = "any"
    tested_after: Sequence[str] = ()
    synonyms: Mapping[str, str] = {}
    balanced: bool = False
    test_length: int = 1000

    @abstractmethod
    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        """Names of the images that show a class, in a fixed order."""

    @abstractmethod
    def read_image(self, name: str) -> Tensor:
        """(3, H, W) uint8 RGB in the file's own size. Raises DatasetError."""

    @abstractmethod
    def read_index(self, name: str) -> Tensor:
        """(H, W) uint8 index mask: class id + 1, 0 = none of the classes, 255 = ignore. Raises DatasetError."""

    def read_mask(self, name: str, class_id: int) -> Tensor:
        """(H, W) uint8 mask of one class: 1, 0, or 255 = ignore. Raises DatasetError."""
        return self.of_class(self.read_index(name), class_id)

    def of_class(self, index: Tensor, class_id: int) -> Tensor:
        """Of an index mask, the mask of one class: 1, 0, or 255 = ignore; uint8 of the same shape."""
        return (index == class_id + 1).to(torch.uint8).masked_fill_(index == IGNORE, IGNORE)

    def check(self, names: Iterable[str]) -> None:  # noqa: B027
        """Raises DatasetError where a file of these images is missing; looks at folders, opens no image."""

    def base_classes(self, fold: Fold) -> list[int]:
        """The classes to train on: all that the fold does not hold out."""
        if fold == "all":
            return list(range(len(self.classes)))
        return [c for c in range(len(self.classes)) if c not in self.folds[self.check_fold(fold)]]

    def novel_classes(self, fold: Fold) -> list[int]:
        """The classes to test on; `all` tests on every class, seen in training or not."""
        return list(range(len(self.classes))) if fold == "all" else list(self.folds[self.check_fold(fold)])

    def validation_classes(self, fold: Fold) -> list[int]:
        """The classes to choose the best epoch by; the field takes those of the test.

        Args:
            fold: of this dataset; "all" where training is on another.
        """
        return self.novel_classes(fold)

    def target_classes(self, source: "FewShotDataset", fold: Fold) -> list[int]:
        """The classes to test on, where training was on a fold of another dataset: all that have a pair of images."""
        counts = {c: len(self.images_of(c, "test")) for c in range(len(self.classes))}
        few = [f"'{self.classes[c]}' has {n}" for c, n in counts.items() if n < 2]
        if few:
            log.warning("Dataset %s: classes with fewer than 2 images are not tested: %s.", self.name, ", ".join(few))
        return [c for c, n in counts.items() if n >= 2]

    def test_episodes(
        self, class_ids: Sequence[int], count: int, shot: int, repeats: bool | None = None
    ) -> list[EpisodeSpec]:
        """The list of test episodes, drawn ahead.

        Args:
            count: length of the list.
            shot: K.
            repeats: whether an image may come twice among the K supports; None as the benchmark has it.

        Raises:
            DatasetError: a class with too few images.
        """
        repeats = bool(repeats)
        images = self.images(class_ids, "test", 1 if repeats else shot)
        return draw_in_turn(images, count, shot, PlainDraw(repeats))

    @classmethod
    def common_name(cls, name: str) -> str:
        """A class's name as other datasets would have it, to find classes that two of them share."""
        return cls.synonyms.get(name, name).replace("_", " ").lower()

    def check_fold(self, fold: int) -> int:
        if self.test_only:
            raise DatasetError(
                f"Dataset {self.name} is only tested on: train on another dataset, dataset=pascal "
                f"task=cross_domain target={self.name}."
            )
        if fold not in range(len(self.folds)):
            last = len(self.folds) - 1
            have = f"folds 0 to {last}" if last else "fold 0 alone"
            choices = f"fold.index=0..{last}" if last else "fold=0"
            raise DatasetError(f"Dataset {self.name} has {have}, not {fold}: choose {choices}, or fold=all.")
        return fold

    def images(self, class_ids: Sequence[int], split: Split, shot: int) -> Images:
        """Images of each class.

        Raises:
            DatasetError: no class, or a class with fewer images than an episode of `shot` supports needs.
        """
        what = "to train on" if split == "train" else "to test on"
        if not class_ids:
            raise DatasetError(
                f"Dataset {self.name}: this fold leaves no class {what} "
                f"({len(self.classes)} classes in {len(self.folds)} folds). Choose another fold or fewer folds."
            )
        images = {c: self.images_of(c, split) for c in class_ids}
        small = [f"'{self.classes[c]}' has {len(n)}" for c, n in images.items() if len(n) < shot + 1]
        if small:
            raise DatasetError(
                f"Dataset {self.name}: a {shot}-shot episode {what} needs {shot + 1} images of its class, but "
                f"{', '.join(small)}. {self.advice()}"
            )
        return images

    def fingerprint(self) -> str:
        """A value that changes when the images or masks do."""
        return f"{self.name}: {self.splits}"

    def advice(self) -> str:
        """What to do about a class with too few images."""
        return "Use fewer shots."


class Episodes(Dataset[Episode]):
    """Reads the episodes of a list, or of `TrainingEpisodes`, from a benchmark's files.

    Args:
        size: height and width of the tensors; multiples of 32.
        ignored: classes whose pixels are marked 255 in the query masks.
        cache: resized images and index masks by name, read instead of the files.
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        specs: list[EpisodeSpec] | TrainingEpisodes,
        size: tuple[int, int],
        ignored: Sequence[int] = (),
        cache: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.dataset, self.specs, self.size = dataset, specs, size
        self.ignored, self.cache = tuple(ignored), cache

    def __len__(self) -> int:
        return self.specs.per_epoch if isinstance(self.specs, TrainingEpisodes) else len(self.specs)

    def __getitem__(self, key: int | tuple[int, int]) -> Episode:
        """A single episode, by place in the list, or by (epoch, index) in training."""
        spec = self.specs[key]  # type: ignore[index]
        query, index = self.read(spec.query)
        query_mask = self.dataset.of_class(index, spec.class_id)
        if self.ignored:
            novel = torch.isin(index, torch.tensor([c + 1 for c in self.ignored], dtype=torch.uint8))
            query_mask = torch.where(novel, IGNORE, query_mask)
        support, indices = zip(*map(self.read, spec.supports), strict=True)
        masks = [self.dataset.of_class(i, spec.class_id) for i in indices]
        return Episode(
            query=query,
            query_mask=query_mask,
            support=torch.stack(support),
            support_masks=(torch.stack(masks) == 1).to(torch.uint8),
            class_id=torch.tensor(spec.class_id),
            index=torch.tensor(key if isinstance(key, int) else key[1]),
            spec=[spec],
        )

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 image and (H, W) uint8 index mask, resized; from the cache if there is one."""
        if self.cache is not None:
            return self.cache[name]
        return resized(self.dataset, name, self.size)


def resized(dataset: FewShotDataset, name: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(3, H, W) uint8 image and (H, W) uint8 index mask."""
    return resize_image(dataset.read_image(name), size), resize_mask(dataset.read_index(name), size)
