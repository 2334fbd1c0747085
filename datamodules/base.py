"""What every benchmark shares: classes and folds, reading, resizing, episodes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from datamodules.episode import IGNORE, Episode, EpisodeSpec
from datamodules.errors import DatasetError
from datamodules.sampler import Images, TrainingEpisodes

Split = Literal["train", "test"]
Fold = int | Literal["all"]


class FewShotDataset(ABC):
    """A benchmark: its classes, its folds, and how its files are read. A subclass is one small file.

    Attributes:
        classes: names of all classes; a class id is an index into them.
        folds: the novel classes of each fold, by id.
        name: as in the config.
        splits: where the lists of images come from, recorded with every result.
    """

    name: str
    classes: Sequence[str]
    folds: Sequence[Sequence[int]]
    splits: str

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
        index = self.read_index(name)
        return torch.where(index == IGNORE, IGNORE, (index == class_id + 1).to(torch.uint8))

    def base_classes(self, fold: Fold) -> list[int]:
        """The classes to train on: all that the fold does not hold out."""
        if fold == "all":
            return list(range(len(self.classes)))
        return [c for c in range(len(self.classes)) if c not in self.folds[self.check_fold(fold)]]

    def novel_classes(self, fold: Fold) -> list[int]:
        """The classes to test on; `all` tests on every class, seen in training or not."""
        return list(range(len(self.classes))) if fold == "all" else list(self.folds[self.check_fold(fold)])

    def check_fold(self, fold: int) -> int:
        if fold not in range(len(self.folds)):
            raise DatasetError(
                f"Dataset {self.name} has folds 0 to {len(self.folds) - 1}, not {fold}: choose fold.index=0.."
                f"{len(self.folds) - 1}, or fold=all."
            )
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

    def advice(self) -> str:
        """What to do about a class with too few images."""
        return "Use fewer shots."


class Episodes(Dataset[Episode]):
    """Reads the episodes of a list, or of `TrainingEpisodes`, from a benchmark's files.

    Args:
        size: height and width of the tensors; multiples of 32.
        ignored: classes whose pixels are marked 255 in the query masks.
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        specs: list[EpisodeSpec] | TrainingEpisodes,
        size: tuple[int, int],
        ignored: Sequence[int] = (),
    ) -> None:
        self.dataset, self.specs, self.size, self.ignored = dataset, specs, size, tuple(ignored)

    def __len__(self) -> int:
        return self.specs.pairs if isinstance(self.specs, TrainingEpisodes) else len(self.specs)

    def __getitem__(self, key: int | tuple[int, int]) -> Episode:
        """A single episode, by place in the list, or by (epoch, index) in training."""
        spec = self.specs[key]  # type: ignore[index]
        read = self.dataset.read_image
        query_mask = resize_mask(self.dataset.read_mask(spec.query, spec.class_id), self.size)
        if self.ignored:
            index = resize_mask(self.dataset.read_index(spec.query), self.size)
            novel = torch.isin(index, torch.tensor([c + 1 for c in self.ignored], dtype=torch.uint8))
            query_mask = torch.where(novel, IGNORE, query_mask)
        masks = [resize_mask(self.dataset.read_mask(n, spec.class_id), self.size) for n in spec.supports]
        return Episode(
            query=resize_image(read(spec.query), self.size),
            query_mask=query_mask,
            support=torch.stack([resize_image(read(n), self.size) for n in spec.supports]),
            support_masks=(torch.stack(masks) == 1).to(torch.uint8),
            class_id=torch.tensor(spec.class_id),
            index=torch.tensor(key if isinstance(key, int) else key[1]),
            spec=[spec],
        )


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased: (3, h, w) uint8 -> (3, H, W) uint8."""
    return TF.resize(image, list(size), antialias=True)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest: (h, w) uint8 -> (H, W) uint8."""
    nearest = partial(TF.resize, interpolation=TF.InterpolationMode.NEAREST)
    return nearest(mask[None], list(size))[0]


def load_image(path: Path) -> Tensor:
    """Any image file as (3, H, W) uint8 RGB, turned as its EXIF orientation says. Raises DatasetError."""
    image = decode(path)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # 16 bits: convert() would clip
    array = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def decode(path: Path) -> Image.Image:
    """The fully read image file. Raises DatasetError if it is missing or broken."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise DatasetError(f"No such image: {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"{path} cannot be read ({str(error) or type(error).__name__}): truncated or no image? "
            "Replace it, or take it away."
        ) from error
    return image
