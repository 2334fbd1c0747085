"""Labelled pixels of the base classes, for training without episodes.

`PixelDataModule` pretrains a backbone: pixels of novel classes are painted over. `LabelledDataModule` trains a method,
such as RePRI: pixels of novel classes are only ignored; validation and test are episodes.
"""

from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from datamodules.episodes.augment import Augment, augmented, seeded
from datamodules.episodes.dataset import FewShotDataset, Fold
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.loader import TrainingLoader, start_worker
from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.sampler import EpochSampler, shuffled
from datamodules.errors import DatasetError
from pmnet.segment.images import resize_image, resize_mask

GREY = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)  # ImageNet's mean: zero once normalised


class BasePixels(Dataset[tuple[Tensor, Tensor]]):
    """Images of a fold's base classes with random crops, flips and colour jitter.

    Pixels of novel classes are grey in the image and 255 in the mask, so that the backbone cannot learn from them.
    Each item depends only on (seed, epoch, index).

    Args:
        dataset: the dataset to train on.
        fold: the fold whose novel classes are painted over.
        size: (H, W) of the crops.
        smallest_crop: smallest share of the image area that a crop covers, 0..1.
        seed: seed of the order and of the augmentation.

    Raises:
        DatasetError: a mask of the dataset shows only one class, or there is no such fold.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> dataset = SyntheticDataset(size=64, images_per_class=2, seed=0)
        >>> pixels = BasePixels(dataset, fold=0, size=(32, 32), smallest_crop=0.3, seed=0)
        >>> image, mask = pixels[0, 5]  # epoch 0, index 5
        >>> len(pixels), image.shape, mask.shape, mask.dtype
        (30, torch.Size([3, 32, 32]), torch.Size([32, 32]), torch.uint8)
    """

    def __init__(
        self, dataset: FewShotDataset, fold: Fold, size: tuple[int, int], smallest_crop: float, seed: int
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.base = dataset.base_classes(fold)
        if len(dataset.classes) >= IGNORE:
            raise DatasetError(
                f"A mask of {dataset.name} shows only one class, so novel pixels cannot be found and painted over. "
                "Set another dataset."
            )
        images = dataset.images(self.base, "train", 0)
        self.names = sorted({name for names in images.values() for name in names})
        self.augment: Augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(smallest_crop, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Reads and augments one image.

        Args:
            key: the pair (epoch, index). Every `len(self)` indices are a new random order of all images.

        Returns:
            The (3, H, W) uint8 image, and its (H, W) uint8 mask: i + 1 = i-th base class, 0 = none, 255 = ignore.
        """
        epoch, index = key
        image, mask = self.without_novel(self.name_of(epoch, index))
        with seeded(self.seed, epoch, index):
            return augmented(self.augment, image, mask)

    def name_of(self, epoch: int, index: int) -> str:
        """The name of an image in the random order of an epoch."""
        round_, place = divmod(index, len(self))
        return self.names[shuffled(self.seed, epoch, round_, len(self))[place]]

    def without_novel(self, name: str) -> tuple[Tensor, Tensor]:
        """The image with novel classes painted grey, and its mask of renumbered base classes, in original size."""
        image, index = self.dataset.read_image(name), self.dataset.read_index(name)
        mask = self.renumbered(index)
        novel = (mask == IGNORE) & (index != IGNORE)
        return torch.where(novel, GREY, image), mask

    def renumbered(self, index: Tensor) -> Tensor:
        """An index mask in which the i-th base class is i + 1 and every novel class is 255."""
        place = torch.full((256,), IGNORE, dtype=torch.uint8)
        place[0] = 0
        for i, class_id in enumerate(self.base, start=1):
            place[class_id + 1] = i
        return place[index.long()]


class PixelDataModule(L.LightningDataModule):
    """Supplies the batches for pretraining a backbone.

    Args:
        pixels: the images and masks.
        batch_size: images per batch, over all processes together.
        images_per_epoch: images per epoch, rounded up to whole batches.
        workers: worker processes that read images, per training process.
        timeout: seconds without a batch after which the workers count as stuck.
    """

    def __init__(
        self, pixels: BasePixels, batch_size: int, images_per_epoch: int, workers: int, timeout: float = 300
    ) -> None:
        super().__init__()
        self.pixels, self.batch_size, self.workers, self.timeout = pixels, batch_size, workers, timeout
        self.length = -(-images_per_epoch // batch_size) * batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return loader(self, self.pixels, self.length, "pretrain.batch_size")


# For a method


class Labelled(NamedTuple):
    """A batch of B images, or one image without the axis B.

    Attributes:
        images: (B, 3, H, W) uint8.
        labels: (B, H, W) uint8; i + 1 = i-th base class, 0 = none, 255 = ignore.
        spec: their names.
    """

    images: Tensor
    labels: Tensor
    spec: list[str]


class LabelledImages(BasePixels):
    """Whole images of a fold's base classes, resized. Pixels of novel classes are 255 in the mask.

    Args:
        dataset: the dataset to train on.
        fold: the fold whose novel classes are ignored.
        size: (H, W) of the tensors.
        seed: seed of the order and of the augmentation.
        augment: changes each resized image and its mask at random.
    """

    def __init__(
        self, dataset: FewShotDataset, fold: Fold, size: tuple[int, int], seed: int, augment: Augment | None = None
    ) -> None:
        super().__init__(dataset, fold, size, 1.0, seed)
        self.size = size
        self.augment = augment or v2.Identity()

    def __getitem__(self, key: tuple[int, int]) -> Labelled:  # type: ignore[override]
        """Reads one image, see `BasePixels`."""
        return Labelled(*super().__getitem__(key), self.name_of(*key))  # type: ignore[arg-type]  # lists in batches

    def without_novel(self, name: str) -> tuple[Tensor, Tensor]:
        """The resized image, and its mask in which novel classes are 255."""
        mask = self.renumbered(self.dataset.read_index(name))
        return resize_image(self.dataset.read_image(name), self.size), resize_mask(mask, self.size)


class LabelledDataModule(FewShotDataModule):
    """Supplies batches of type `Labelled` for training, and episodes for validation and test.

    Arguments as those of `FewShotDataModule`; `batch_size` and `per_epoch` count images.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> data = LabelledDataModule(
        ...     SyntheticDataset(size=64, images_per_class=5, seed=0), fold=0, shot=2, train_shot=1, image_size=64,
        ...     batch_size=4, test_batch_size=3, per_epoch=8, val=6, test=6, novel_pixels="ignore", workers=0, seed=0,
        ... )
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.images.shape, batch.labels.shape, len(batch.spec)
        (torch.Size([4, 3, 64, 64]), torch.Size([4, 64, 64]), 4)
    """

    def train_dataloader(self) -> DataLoader[Any]:
        images = LabelledImages(self.dataset, self.fold, self.image_size, self.seed, self.augment)
        length = -(-(self.per_epoch or len(images)) // self.batch_size) * self.batch_size
        return loader(self, images, length, "episodes.batch_size")

    @property
    def training_record(self) -> dict[str, object]:
        return super().training_record | {
            "batches_of": "labelled images, novel pixels ignored",
            "novel_pixels": "ignore",
        }


def loader(data: PixelDataModule | LabelledDataModule, pixels: BasePixels, length: int, option: str) -> DataLoader[Any]:
    """Batches of an epoch of `length` images; `option` names the setting of `data.batch_size` in a message."""
    trainer, batch_size = data.trainer, data.batch_size
    process, processes = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    if batch_size % processes:
        raise DatasetError(f"{option}={batch_size} is not divisible by {processes} processes.")
    sampler = EpochSampler(length, batch_size, process, processes)
    if trainer:
        sampler.set_epoch(trainer.current_epoch)  # workers prefetch before the Trainer calls set_epoch
    return TrainingLoader(
        pixels,
        batch_size=batch_size // processes,
        sampler=sampler,
        num_workers=data.workers,
        patience=data.timeout,
        worker_init_fn=start_worker,
        persistent_workers=data.workers > 0,
    )
