"""Labelled pixels of the base classes, for pre-training a backbone. No novel class's pixel is in them."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from datamodules.episodes.dataset import FewShotDataset, Fold
from datamodules.episodes.episode import IGNORE
from datamodules.episodes.loader import TrainingLoader, leave_the_end_to_the_first
from datamodules.episodes.sampler import EpochSampler, shuffled
from datamodules.errors import DatasetError

GREY = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)  # ImageNet's mean: zero once normalised


class BasePixels(Dataset[tuple[Tensor, Tensor]]):
    """Randomly cropped, flipped and coloured images of a fold's base classes.

    Pixels of novel classes are painted over in the image and marked 255 in the mask, so that what is learned
    cannot depend on them. Each item is a function of (seed, epoch, index) alone.

    Args:
        smallest_crop: smallest share of the image that a crop covers.
    """

    def __init__(
        self, dataset: FewShotDataset, fold: Fold, size: tuple[int, int], smallest_crop: float, seed: int
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.base = dataset.base_classes(fold)
        if len(dataset.classes) >= IGNORE:
            raise DatasetError(
                f"A mask of {dataset.name} knows one class alone, so a backbone cannot be taught its pixels: choose "
                "another dataset for mode=pretrain."
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
        """(3, H, W) uint8 image; (H, W) uint8: place among the base classes + 1, 0 = none, 255 = ignore."""
        epoch, index = key
        round_, place = divmod(index, len(self))
        name = self.names[shuffled(self.seed, epoch, round_, len(self))[place]]
        image, mask = self.without_novel(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)
            image, mask = self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def without_novel(self, name: str) -> tuple[Tensor, Tensor]:
        image, index = self.dataset.read_image(name), self.dataset.read_index(name)
        place = torch.full((256,), IGNORE, dtype=torch.uint8)
        place[0] = 0
        for i, class_id in enumerate(self.base, start=1):
            place[class_id + 1] = i
        mask = place[index.long()]
        novel = (mask == IGNORE) & (index != IGNORE)
        return torch.where(novel, GREY, image), mask


class PixelDataModule(L.LightningDataModule):
    """Training batches of `BasePixels`.

    Args:
        batch_size: images of a batch over all processes together.
        images_per_epoch: rounded up to whole batches.
        workers: processes that read images.
    """

    def __init__(self, pixels: BasePixels, batch_size: int, images_per_epoch: int, workers: int) -> None:
        super().__init__()
        self.pixels, self.batch_size, self.workers = pixels, batch_size, workers
        self.length = -(-images_per_epoch // batch_size) * batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        process, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.batch_size % processes:
            raise DatasetError(f"pretrain.batch_size={self.batch_size} does not divide by {processes} processes.")
        sampler = EpochSampler(self.length, self.batch_size, process, processes)
        if self.trainer:
            sampler.set_epoch(self.trainer.current_epoch)  # workers read ahead before the Trainer says it
        return TrainingLoader(
            self.pixels,
            batch_size=self.batch_size // processes,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=leave_the_end_to_the_first,
            persistent_workers=self.workers > 0,
        )
