"""Labelled pixels of the base classes for pretraining a backbone. Pixels of novel classes are painted over."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from datamodules.episodes.dataset import FewShotDataset, Fold
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.loader import TrainingLoader, ignore_sigterm
from datamodules.episodes.sampler import EpochSampler, shuffled
from datamodules.errors import DatasetError

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
                "Set another dataset for mode=pretrain."
            )
        images = dataset.images(self.base, "train", 0)
        self.names = sorted({name for names in images.values() for name in names})
        self.augment = v2.Compose(
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
        round_, place = divmod(index, len(self))
        name = self.names[shuffled(self.seed, epoch, round_, len(self))[place]]
        image, mask = self.without_novel(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)
            image, mask = self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def without_novel(self, name: str) -> tuple[Tensor, Tensor]:
        """The image with novel classes painted grey, and its mask of renumbered base classes, in original size."""
        image, index = self.dataset.read_image(name), self.dataset.read_index(name)
        place = torch.full((256,), IGNORE, dtype=torch.uint8)
        place[0] = 0
        for i, class_id in enumerate(self.base, start=1):
            place[class_id + 1] = i
        mask = place[index.long()]
        novel = (mask == IGNORE) & (index != IGNORE)
        return torch.where(novel, GREY, image), mask


class PixelDataModule(L.LightningDataModule):
    """Supplies the batches for pretraining a backbone.

    Args:
        pixels: the images and masks.
        batch_size: images per batch, over all processes together.
        images_per_epoch: images per epoch, rounded up to whole batches.
        workers: worker processes that read images, per training process.
    """

    def __init__(self, pixels: BasePixels, batch_size: int, images_per_epoch: int, workers: int) -> None:
        super().__init__()
        self.pixels, self.batch_size, self.workers = pixels, batch_size, workers
        self.length = -(-images_per_epoch // batch_size) * batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        process, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.batch_size % processes:
            raise DatasetError(f"pretrain.batch_size={self.batch_size} is not divisible by {processes} processes.")
        sampler = EpochSampler(self.length, self.batch_size, process, processes)
        if self.trainer:
            sampler.set_epoch(self.trainer.current_epoch)  # workers prefetch before the Trainer calls set_epoch
        return TrainingLoader(
            self.pixels,
            batch_size=self.batch_size // processes,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=ignore_sigterm,
            persistent_workers=self.workers > 0,
        )
