"""The LightningDataModule: train, validation and test episodes of one fold of one benchmark."""

from functools import cached_property

import lightning as L
from torch.utils.data import DataLoader

from datamodules.base import Episodes, FewShotDataset, Fold
from datamodules.episode import Episode, EpisodeSpec
from datamodules.errors import DatasetError
from datamodules.sampler import EpochSampler, TrainingEpisodes, draw_test_episodes, json_hash, list_hash


class FewShotDataModule(L.LightningDataModule):
    """Supplies `Episode` batches; the same episodes whatever the workers, batch size or processes.

    Args:
        dataset: where to train and test.
        fold: its novel classes are tested on, all others trained on; "all" does both on every class.
        shot: K of validation and test episodes.
        train_shot: K of training episodes (1 by the field's convention).
        image_size: (H, W), multiples of 32.
        batch_size: episodes of a training batch over all processes together.
        test_batch_size: episodes of a validation or test batch of each process.
        episodes_per_epoch: None for one a pair of image and class; rounded up to whole batches.
        val_episodes: validation takes this many from the head of the test list.
        test_episodes: length of the test list.
        novel_pixels: what pixels of the fold's novel classes are in training queries: "background", as the
            published protocols have it, or "ignore": they count neither as right nor as wrong.
        workers: processes that read images, each in every training process; 0 reads in place.
        seed: of the training episodes. The test list always has seed 0, as published ones do.
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        fold: Fold,
        shot: int,
        train_shot: int,
        image_size: tuple[int, int],
        batch_size: int,
        test_batch_size: int,
        episodes_per_epoch: int | None,
        val_episodes: int,
        test_episodes: int,
        novel_pixels: str,
        workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if any(side % 32 for side in image_size):
            raise DatasetError(f"episodes.image_size must be multiples of 32, not {tuple(image_size)}.")
        if novel_pixels not in ("background", "ignore"):
            raise DatasetError(f"episodes.novel_pixels={novel_pixels} is not one of background, ignore.")
        counts = {"shot.k": shot, "train_shot": train_shot, "episodes.val": val_episodes}
        counts |= {"episodes.test": test_episodes, "episodes.batch_size": batch_size}
        counts |= {"episodes.test_batch_size": test_batch_size}
        for name, count in counts.items():
            if count < 1:
                raise DatasetError(f"{name} must be 1 or more, not {count}.")
        self.dataset, self.fold, self.shot, self.train_shot = dataset, fold, shot, train_shot
        self.image_size = (image_size[0], image_size[1])
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.episodes_per_epoch = episodes_per_epoch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes
        self.novel_pixels, self.workers, self.seed = novel_pixels, workers, seed

    @cached_property
    def train_specs(self) -> TrainingEpisodes:
        base = self.dataset.base_classes(self.fold)
        images = self.dataset.images(base, "train", self.train_shot)
        return TrainingEpisodes(images, self.train_shot, self.seed)

    @cached_property
    def test_specs(self) -> list[EpisodeSpec]:
        images = self.dataset.images(self.novel_class_ids, "test", self.shot)
        return draw_test_episodes(images, self.test_episodes, self.shot)

    @property
    def novel_class_ids(self) -> list[int]:
        return self.dataset.novel_classes(self.fold)

    @property
    def provenance(self) -> dict[str, object]:
        """What a reader needs to know which episodes a number is about."""
        names = self.dataset.classes
        base = self.dataset.base_classes(self.fold)
        lists = {
            "train": {names[c]: list(self.dataset.images_of(c, "train")) for c in base},
            "test": {names[c]: list(self.dataset.images_of(c, "test")) for c in self.novel_class_ids},
        }
        return {
            "dataset": self.dataset.name,
            "splits": self.dataset.splits,
            "splits_sha256": json_hash(lists),
            "novel_classes": [names[c] for c in self.novel_class_ids],
            "base_classes": [names[c] for c in base],
            "test_episodes": len(self.test_specs),
            "episode_list_sha256": list_hash(self.test_specs),
        }

    @property
    def training_record(self) -> dict[str, object]:
        """What shapes a training, as plain values: goes into checkpoints."""
        names = self.dataset.classes
        base = self.dataset.base_classes(self.fold)
        return {
            "dataset": self.dataset.name,
            "base_classes": [names[c] for c in base],
            "train_lists_sha256": json_hash({names[c]: list(self.dataset.images_of(c, "train")) for c in base}),
            "train_shot": self.train_shot,
            "image_size": list(self.image_size),
            "batch_size": self.batch_size,
            "novel_pixels": self.novel_pixels,
            "seed": self.seed,
        }

    def setup(self, stage: str) -> None:
        """Draws the lists before any image is touched, so that what is missing shows at once."""
        _ = self.test_specs
        if stage == "fit":
            _ = self.train_specs

    def test_dataset(self) -> Episodes:
        return Episodes(self.dataset, self.test_specs, self.image_size)

    def train_dataloader(self) -> DataLoader[Episode]:
        process, processes = self.place
        if self.batch_size % processes:
            raise DatasetError(
                f"episodes.batch_size={self.batch_size} (over all processes) does not divide by {processes} processes."
            )
        wanted = self.episodes_per_epoch or self.train_specs.pairs
        length = -(-wanted // self.batch_size) * self.batch_size
        sampler = EpochSampler(length, self.batch_size, process, processes)
        ignored = self.novel_class_ids if self.novel_pixels == "ignore" and self.fold != "all" else []
        episodes = Episodes(self.dataset, self.train_specs, self.image_size, ignored)
        return self.loader(episodes, self.batch_size // processes, sampler, keep_workers=True)

    def val_dataloader(self) -> DataLoader[Episode]:
        specs = self.test_specs[: self.val_episodes]
        return self.eval_loader(Episodes(self.dataset, specs, self.image_size), keep_workers=True)

    def test_dataloader(self) -> DataLoader[Episode]:
        return self.eval_loader(self.test_dataset(), keep_workers=False)

    def eval_loader(self, episodes: Episodes, keep_workers: bool) -> DataLoader[Episode]:
        """Every process takes its own part of the list: none twice, none left out, uneven if need be."""
        process, processes = self.place
        mine = range(process, len(episodes), processes)
        return self.loader(episodes, self.test_batch_size, mine, keep_workers)

    def loader(self, episodes: Episodes, batch_size: int, sampler, keep_workers: bool) -> DataLoader[Episode]:  # type: ignore[no-untyped-def]
        return DataLoader(
            episodes,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=Episode.collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=keep_workers and self.workers > 0,
        )

    @property
    def place(self) -> tuple[int, int]:
        """(this process, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
