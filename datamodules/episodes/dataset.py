"""The base class of all datasets: classes, folds, reading, and the sampling of episodes."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from datamodules.episodes.augment import Augment, augmented, seeded
from datamodules.episodes.episode import IGNORE, Episode, EpisodeSpec
from datamodules.episodes.protocol import HSNET, Protocol
from datamodules.episodes.sampler import Images, PlainDraw, TrainingEpisodes, draw_in_turn
from datamodules.errors import DatasetError
from datamodules.inventory import Pixels, counted, in_threads
from pmnet.segment.images import resize_image, resize_mask

log = logging.getLogger(__name__)
Split = Literal["train", "test"]
Fold = int | Literal["all"]


class FewShotDataset(ABC):
    """A dataset: its classes, its folds, and how its files are read.

    A subclass sets the attributes and implements `images_of`, `read_image` and `read_index`.

    Attributes:
        name: name of the dataset, as in the config.
        classes: names of all classes; a class id is an index into them.
        folds: ids of the novel classes of each fold.
        splits: origin of the image lists; recorded with every result.
        test_only: True if the dataset has no base classes, and therefore no folds.
        domain: kind of images, such as "natural"; "any" for the user's own images.
        tested_after: datasets of the same domain for which a published protocol trains there and tests here.
        synonyms: class name -> common name, for classes that other datasets name differently.
        balanced: if True, training samples a class first and then its query; if False, it uses every image once.
        leaves_out_rare: if True, classes with too few images for an episode are left out; if False, they are an error,
            so that a benchmark whose download is incomplete is not scored on fewer classes.
        test_length: number of episodes in the published test.

    Example:
        >>> import torch
        >>> class Shades(FewShotDataset):
        ...     name, splits = "shades", "ten images per class"
        ...     classes, folds = ["dark", "bright"], [[0], [1]]
        ...     def images_of(self, class_id, split):
        ...         return [f"{self.classes[class_id]}/{i}" for i in range(10)]
        ...     def read_image(self, name):
        ...         return torch.full((3, 48, 64), 200 if "bright" in name else 50, dtype=torch.uint8)
        ...     def read_index(self, name):
        ...         return torch.full((48, 64), 2 if "bright" in name else 1, dtype=torch.uint8)
        >>> dataset = Shades()
        >>> dataset.base_classes(0), dataset.novel_classes(0)
        ([1], [0])
        >>> dataset.test_episodes([0], count=1, shot=2)
        [EpisodeSpec(query='dark/5', supports=('dark/0', 'dark/3'), class_id=0)]
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
    leaves_out_rare: bool = False
    test_length: int = 1000

    @abstractmethod
    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        """Names of the images that show a class, in a fixed order.

        Args:
            class_id: index into `classes`.
            split: "train" or "test".
        """

    @abstractmethod
    def read_image(self, name: str) -> Tensor:
        """Reads an image in its original size.

        Returns:
            (3, H, W) uint8 RGB.

        Raises:
            ImageError: the file is missing or cannot be read.
        """

    @abstractmethod
    def read_index(self, name: str) -> Tensor:
        """Reads the index mask of an image in its original size.

        Returns:
            (H, W) uint8: class id + 1, 0 = none of the classes, 255 = ignore.

        Raises:
            ImageError: the file is missing or cannot be read.
            DatasetError: the file is not a valid mask.
        """

    def pixels(self, names: Iterable[str]) -> dict[str, Pixels]:
        """Counts the pixels of masks; reads them.

        Args:
            names: names of images.

        Returns:
            Name -> value of the index mask -> number of its pixels.

        Raises:
            ImageError, DatasetError: as `read_index`.
        """
        names = list(names)
        found = in_threads(lambda name: counted(self.read_index(name).numpy()), names, f"Reading masks of {self.name}")
        return dict(zip(names, found, strict=True))

    def read_mask(self, name: str, class_id: int) -> Tensor:
        """Reads the mask of one class.

        Returns:
            (H, W) uint8: 1 = the class, 0 = anything else, 255 = ignore.

        Raises:
            ImageError: the file is missing or cannot be read.
            DatasetError: the file is not a valid mask.
        """
        return self.of_class(self.read_index(name), class_id)

    def of_class(self, index: Tensor, class_id: int) -> Tensor:
        """Extracts the mask of one class from an index mask.

        Args:
            index: uint8 index mask of any shape.
            class_id: index into `classes`.

        Returns:
            uint8 of the same shape: 1 = the class, 0 = anything else, 255 = ignore.
        """
        return (index == class_id + 1).to(torch.uint8).masked_fill_(index == IGNORE, IGNORE)

    def check(self, names: Iterable[str]) -> None:  # noqa: B027
        """Checks that the files of the named images exist. Lists folders only; opens no image.

        Raises:
            DatasetError: a file is missing.
        """

    def base_classes(self, fold: Fold) -> list[int]:
        """Ids of the classes to train on: all classes except the novel ones.

        Args:
            fold: number of the fold; "all" trains on every class.

        Raises:
            DatasetError: there is no such fold.
        """
        if fold == "all":
            return list(range(len(self.classes)))
        return [c for c in range(len(self.classes)) if c not in self.folds[self.check_fold(fold)]]

    def novel_classes(self, fold: Fold) -> list[int]:
        """Ids of the classes to test on: those that the fold holds out.

        Args:
            fold: number of the fold; "all" tests on every class, including those trained on.

        Raises:
            DatasetError: there is no such fold.
        """
        return list(range(len(self.classes))) if fold == "all" else list(self.folds[self.check_fold(fold)])

    def validation_classes(self, fold: Fold) -> list[int]:
        """Ids of the classes used to select the best epoch. By the field's convention these are the test classes.

        Args:
            fold: fold of this dataset; "all" if training uses another dataset.

        Raises:
            DatasetError: there is no such fold.
        """
        return self.novel_classes(fold)

    def target_classes(self, source: "FewShotDataset", fold: Fold) -> list[int]:
        """Ids of the classes to test on after training on another dataset: all with at least two images.

        Args:
            source: the training dataset.
            fold: the fold of `source` that was trained on.
        """
        few = self.few(range(len(self.classes)), "test", shot=1)
        if few:
            log.warning("Dataset %s: skipping classes with fewer than 2 images: %s.", self.name, self.counted(few))
        return [c for c in range(len(self.classes)) if c not in few]

    def test_episodes(
        self, class_ids: Sequence[int], count: int, shot: int, repeats: bool | None = None, seed: int = 0
    ) -> list[EpisodeSpec]:
        """Samples the list of test episodes. The same arguments always give the same list.

        Args:
            class_ids: classes to test on.
            count: number of episodes.
            shot: number of support images, K.
            repeats: whether an image may appear twice among the K supports. None uses the dataset's default: the
                published protocol of a benchmark, no repeats for other images.
            seed: of the draws; 0 in all published lists.

        Returns:
            `count` episode specs.

        Raises:
            DatasetError: a class has too few images and may not be left out, or no class is left.
        """
        repeats = bool(repeats)
        images = self.images(class_ids, "test", 1 if repeats else shot)
        return draw_in_turn(images, count, shot, PlainDraw(repeats, seed))

    @classmethod
    def common_name(cls, name: str) -> str:
        """A class name in the form shared by all datasets, to find the classes that two datasets have in common."""
        return cls.synonyms.get(name, name).replace("_", " ").lower()

    def check_fold(self, fold: int) -> int:
        """Returns `fold`, or raises DatasetError if there is no such fold."""
        if self.test_only:
            raise DatasetError(
                f"Dataset {self.name} is for testing only. Train on another dataset: dataset=pascal "
                f"task=cross_domain target={self.name}."
            )
        if fold not in range(len(self.folds)):
            last = len(self.folds) - 1
            have = f"folds 0 to {last}" if last else "only fold 0"
            choices = f"fold.index=0..{last}" if last else "fold=0"
            raise DatasetError(f"Dataset {self.name} has {have}, not {fold}. Set {choices}, or fold=all.")
        return fold

    def images(self, class_ids: Sequence[int], split: Split, shot: int) -> Images:
        """The images of each class, checked to be enough for episodes of `shot` supports.

        Args:
            class_ids: the classes.
            split: "train" or "test".
            shot: number of different support images, K.

        Returns:
            Class id -> names of its images, at least K + 1. Classes with fewer are left out if `leaves_out_rare`.

        Raises:
            DatasetError: no class is left, or a class has fewer than K + 1 images and may not be left out.
        """
        what = "to train on" if split == "train" else "to test on"
        if not class_ids:
            raise DatasetError(
                f"Dataset {self.name}: this fold leaves no class {what} (classes: {len(self.classes)}, folds: "
                f"{len(self.folds)}). {self.other_folds(split, shot)}"
            )
        few = self.few(class_ids, split, shot)
        if len(few) == len(class_ids) or (few and not self.leaves_out_rare):
            fewer = " Use fewer shots." if shot > 1 else ""
            raise DatasetError(
                f"Dataset {self.name}: a {shot}-shot episode {what} needs {shot + 1} images of its class, but "
                f"{self.counted(few)}.{fewer} {self.advice()}"
            )
        return {c: self.images_of(c, split) for c in class_ids if c not in few}

    def few(self, class_ids: Sequence[int], split: Split, shot: int) -> dict[int, int]:
        """The classes with too few images for episodes of `shot` supports.

        Args:
            class_ids: the classes.
            split: "train" or "test".
            shot: number of different support images, K.

        Returns:
            Class id -> number of its images, K or fewer.
        """
        counts = {c: len(self.images_of(c, split)) for c in class_ids}
        return {c: n for c, n in counts.items() if n <= shot}

    def counted(self, few: Mapping[int, int]) -> str:
        """Class id -> number of images, in words for a message."""
        return ", ".join(f"'{self.classes[c]}' has {n}" for c, n in few.items())

    def other_folds(self, split: Split, shot: int) -> str:
        """What the user can do about a fold without classes; the end of an error message."""
        every = range(len(self.classes))
        trains, tests = (set(every) - self.few(every, s, shot).keys() for s in ("train", "test"))
        if not (trains and tests):
            return self.advice()
        folds = enumerate(self.folds)
        good = [str(f) for f, novel in folds if tests & set(novel) and trains & set(self.base_classes(f))]
        ways = [f"fold.index={'|'.join(good)}"] if good else []
        if not good and len(trains | tests) > 1:
            ways += [f"dataset.folds={len(self.classes)} (one class per fold)"]
        ways += ["fold=all (tests on the classes that it trains on)"]
        if split == "train":
            ways += ["mode=test with model=nearest or model=prototype (they need no training)"]
        return f"Set {', or '.join(ways)}; or add classes."

    def fingerprint(self) -> str:
        """A string that changes whenever the images or masks change."""
        return f"{self.name}: {self.splits}"

    def advice(self) -> str:
        """What the user can do about a class with too few images; the end of an error message."""
        return "Add images, or use other classes."


class Episodes(Dataset[Episode]):
    """Reads the images and masks of episode specs.

    Args:
        dataset: the dataset that reads the files.
        specs: a list of episodes, or `TrainingEpisodes`.
        size: (H, W) of the tensors.
        ignored: ids of classes whose pixels become 255 in the query masks.
        cache: image name -> resized image and index mask, used instead of the files.
        protocol: how images get their size and where masks are compared; only without `cache` and `augment`.
        augment: changes each image and its mask at random, before they are resized, or after it if they come from the
            cache; only for `TrainingEpisodes`.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> dataset = SyntheticDataset(size=64, images_per_class=5, seed=0)
        >>> episodes = Episodes(dataset, dataset.test_episodes([0, 1], count=4, shot=2), size=(64, 96))
        >>> len(episodes), episodes[3].query.shape, episodes[3].support_masks.shape
        (4, torch.Size([3, 64, 96]), torch.Size([2, 64, 96]))
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        specs: list[EpisodeSpec] | TrainingEpisodes,
        size: tuple[int, int],
        ignored: Sequence[int] = (),
        cache: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        augment: Augment | None = None,
        protocol: Protocol = HSNET,
    ) -> None:
        self.dataset, self.specs, self.size = dataset, specs, size
        self.ignored, self.cache, self.augment, self.protocol = tuple(ignored), cache, augment, protocol

    def __len__(self) -> int:
        return self.specs.per_epoch if isinstance(self.specs, TrainingEpisodes) else len(self.specs)

    @property
    def episode_bytes(self) -> int:
        """Size of one episode's images and masks."""
        spec = self.specs[0, 0] if isinstance(self.specs, TrainingEpisodes) else self.specs[0]
        truth = self.truth(spec).nbytes if self.protocol.scored == "photo" else 0
        return 4 * self.size[0] * self.size[1] * (1 + len(spec.supports)) + truth

    def __getitem__(self, key: int | tuple[int, int]) -> Episode:
        """Reads a single episode, without the batch axis.

        Args:
            key: position in the list; for `TrainingEpisodes`, the pair (epoch, index).
        """
        spec = self.specs[key]  # type: ignore[index]
        with self.draws(key):
            query, query_mask = self.read(spec.query, spec.class_id, self.ignored)
            support, masks = zip(*(self.read(name, spec.class_id) for name in spec.supports), strict=True)
        return Episode(
            query=query,
            query_mask=query_mask,
            support=torch.stack(support),
            support_masks=(torch.stack(masks) == 1).to(torch.uint8),
            class_id=torch.tensor(spec.class_id),
            index=torch.tensor(key if isinstance(key, int) else key[1]),
            spec=[spec],
            truth=[self.truth(spec)] if self.protocol.scored == "photo" else [],
        )

    def truth(self, spec: EpisodeSpec) -> Tensor:
        """The query's mask in the photo's own size; 255 around it if images are padded."""
        mask = self.dataset.read_mask(spec.query, spec.class_id)
        return mask if self.protocol.fit == "squeeze" else on_canvas(mask, self.size)

    def draws(self, key: int | tuple[int, int]) -> AbstractContextManager[None]:
        """Makes the augmentation of a training episode depend only on (seed, epoch, index)."""
        if self.augment is None or not isinstance(self.specs, TrainingEpisodes) or isinstance(key, int):
            return nullcontext()
        return seeded(self.specs.seed, *key)

    def read(self, name: str, class_id: int, ignored: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Reads an image from the cache, if there is one, or from its file, and augments it.

        Returns:
            The resized (3, H, W) uint8 image and (H, W) uint8 mask of the class, in which pixels of the classes
            `ignored` are 255.
        """
        if self.cache is not None:
            image, index = self.cache[name]
        elif self.augment is None:
            fit = resized if self.protocol.fit == "squeeze" else padded
            image, index = fit(self.dataset, name, self.size)
        else:
            image, index = self.dataset.read_image(name), self.dataset.read_index(name)
        mask = self.dataset.of_class(index, class_id)
        if ignored:
            novel = torch.isin(index, torch.tensor([c + 1 for c in ignored], dtype=torch.uint8))
            mask = torch.where(novel, IGNORE, mask)
        if self.augment is None:
            return image, mask
        image, mask = augmented(self.augment, image, mask)
        return resize_image(image, self.size), resize_mask(mask, self.size)


def resized(dataset: FewShotDataset, name: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Reads an image and its index mask and resizes both.

    Args:
        dataset: the dataset that reads the files.
        name: name of the image.
        size: (H, W) to resize to.

    Returns:
        The (3, H, W) uint8 image and the (H, W) uint8 index mask.
    """
    return resize_image(dataset.read_image(name), size), resize_mask(dataset.read_index(name), size)


def padded(dataset: FewShotDataset, name: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Like `resized`, but keeps the aspect ratio, see `Protocol.fit`; what remains is black, 255 in the index mask."""
    image, index = dataset.read_image(name), dataset.read_index(name)
    new, old = scale(index, size)
    h, w = (max(8, side * new // old // 8 * 8) for side in index.shape)
    margin = (0, size[1] - w, 0, size[0] - h)
    return pad(resize_image(image, (h, w)), margin), pad(resize_mask(index, (h, w)), margin, value=IGNORE)


def on_canvas(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask (h, w) of a photo at the top left of 255, in the aspect ratio of `size`: the padded image, enlarged."""
    new, old = scale(mask, size)
    H, W = (max(photo, side * old // new) for photo, side in zip(mask.shape, size, strict=True))
    return pad(mask, (0, W - mask.shape[1], 0, H - mask.shape[0]), value=IGNORE)


def scale(mask: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """(new, old) length of the side by which an image (h, w) just fits into `size`."""
    pairs = list(zip(size, mask.shape, strict=True))
    return min(pairs, key=lambda pair: pair[0] / pair[1])
