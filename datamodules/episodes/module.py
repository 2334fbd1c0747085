"""The LightningDataModule: train, validation and test episodes of one fold of one setting."""

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader

from datamodules.episodes.cache import ImageCache
from datamodules.episodes.dataset import Episodes, FewShotDataset, Fold
from datamodules.episodes.episode import IGNORE, Episode, EpisodeSpec
from datamodules.episodes.loader import EpisodeLoader, TrainingLoader, leave_the_end_to_the_first
from datamodules.episodes.sampler import EpochSampler, TrainingEpisodes, json_hash, list_hash
from datamodules.episodes.tasks import check_pair, same_benchmark
from datamodules.errors import DatasetError
from datamodules.registry import all_datasets

log = logging.getLogger(__name__)


class FewShotDataModule(L.LightningDataModule):
    """Supplies `Episode` batches; the same episodes whatever the workers, batch size or processes.

    Args:
        dataset: where to train.
        target: where to test; None is where training was, on classes that it held out.
        validation: where to choose the best epoch; None is the training dataset, on classes that it held out.
        task: cross_category, cross_dataset or cross_domain; decides which target goes with a dataset.
        fold: its novel classes are tested on, all others trained on; "all" does both on every class.
        shot: K of test episodes.
        train_shot: K of training and validation episodes (1 by the field's convention), so that one training
            serves tests of any K.
        image_size: the side, or (H, W); multiples of 32.
        batch_size: episodes of a training batch over all processes together.
        test_batch_size: episodes of a validation or test batch of each process.
        per_epoch: training episodes an epoch, rounded up to whole batches; None for one a pair of
            image and class, or one an image where the classes are balanced.
        val: validation episodes; None as many as a published test of the dataset has.
        test: length of the test list; None as published.
        repeats: whether an image may come twice among the K supports of a test episode; None as published.
        novel_pixels: what pixels of the fold's novel classes are in training queries: "background", as the
            published protocols have it, or "ignore": they count neither as right nor as wrong.
        cache: folder for resized images, read instead of the files; None reads and resizes the files each time.
        workers: processes that read images, each in every training process; 0 reads in place.
        seed: of the training episodes. The test list always has seed 0, as published ones do.

    Raises:
        DatasetError: a setting that cannot be; a pair of datasets that is none of the task's.
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        fold: Fold,
        shot: int,
        train_shot: int,
        image_size: int | Sequence[int],
        batch_size: int,
        test_batch_size: int,
        per_epoch: int | None,
        val: int | None,
        test: int | None,
        novel_pixels: str,
        workers: int,
        seed: int,
        repeats: bool | None = None,
        cache: str | None = None,
        task: str = "cross_category",
        target: FewShotDataset | None = None,
        validation: FewShotDataset | None = None,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % 32 or width % 32:
            raise DatasetError(f"episodes.image_size must be multiples of 32, not {(height, width)}.")
        if novel_pixels not in ("background", "ignore"):
            raise DatasetError(f"episodes.novel_pixels={novel_pixels} is not one of background, ignore.")
        counts = {"shot.k": shot, "train_shot": train_shot, "episodes.batch_size": batch_size}
        counts |= {"episodes.test_batch_size": test_batch_size}
        counts |= {f"episodes.{n}": c for n, c in (("val", val), ("test", test)) if c is not None}
        for name, count in counts.items():
            if count < 1:
                raise DatasetError(f"{name} must be 1 or more, not {count}.")
        check_pair(task, dataset, target)
        self.dataset, self.fold, self.shot, self.train_shot = dataset, fold, shot, train_shot
        self.target, self.validation = target or dataset, validation or dataset
        self.same = same_benchmark(dataset, self.target)
        self.image_size = (height, width)
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.per_epoch, self.val, self.test, self.repeats = per_epoch, val, test, repeats
        self.novel_pixels, self.workers, self.seed = novel_pixels, workers, seed
        self.cache = Path(cache).expanduser() if cache else None

    # Who is trained on, who is tested

    @cached_property
    def base_class_ids(self) -> list[int]:
        """Of `dataset`."""
        return self.dataset.base_classes(self.fold)

    @cached_property
    def test_class_ids(self) -> list[int]:
        """Of `target`."""
        if self.same:
            return self.target.novel_classes(self.fold)
        return self.target.target_classes(self.dataset, self.fold)

    @cached_property
    def val_class_ids(self) -> list[int]:
        """Of `validation`."""
        fold = self.fold if same_benchmark(self.dataset, self.validation) else "all"
        return self.validation.validation_classes(fold)

    @cached_property
    def train_specs(self) -> TrainingEpisodes:
        images = self.dataset.images(self.base_class_ids, "train", self.train_shot)
        return TrainingEpisodes(images, self.train_shot, self.seed, self.dataset.balanced)

    @cached_property
    def test_specs(self) -> list[EpisodeSpec]:
        count = self.test or self.target.test_length
        specs = self.target.test_episodes(self.test_class_ids, count, self.shot, self.repeats)
        return self.all_drawn(specs, self.target, self.test_class_ids, "test")

    @cached_property
    def val_specs(self) -> list[EpisodeSpec]:
        """Where validation and test are on the same classes and shots, the head of the test list."""
        count = self.val or self.validation.test_length
        specs = self.validation.test_episodes(self.val_class_ids, count, self.train_shot, self.repeats)
        return self.all_drawn(specs, self.validation, self.val_class_ids, "val")

    def all_drawn(
        self, specs: list[EpisodeSpec], dataset: FewShotDataset, class_ids: list[int], what: str
    ) -> list[EpisodeSpec]:
        missing = sorted(set(class_ids) - {s.class_id for s in specs})
        if missing:
            log.warning(
                "%d episodes (episodes.%s) of %s leave out %d of %d classes ('%s'...), which count as 0 in mIoU.",
                *(len(specs), what, dataset.name, len(missing), len(class_ids), dataset.classes[missing[0]]),
            )
        return specs

    @property
    def base_classes(self) -> list[str]:
        return [self.dataset.classes[c] for c in self.base_class_ids]

    @property
    def test_classes(self) -> list[str]:
        return [self.target.classes[c] for c in self.test_class_ids]

    def seen(self, names: Iterable[str], of: str) -> list[str]:
        """Tested classes that are among those of another dataset, under the same or another name."""
        kind = all_datasets().get(of, FewShotDataset)
        others = {kind.common_name(name) for name in names}
        return sorted(name for name in self.test_classes if self.target.common_name(name) in others)

    @property
    def provenance(self) -> dict[str, object]:
        """What a reader needs to know which episodes a number is about."""
        lists = {"test": lists_of(self.target, self.test_class_ids, "test")}
        lists |= {"train": self.train_lists} if self.same else {}
        return {
            "dataset": self.dataset.name,
            "target": self.target.name,
            "validation": self.validation.name,
            "splits": self.target.splits,
            "splits_sha256": json_hash(lists),
            "novel_classes": self.test_classes,
            "base_classes": self.base_classes,
            "test_episodes": len(self.test_specs),
            "episode_list_sha256": list_hash(self.test_specs),
        }

    @property
    def training_record(self) -> dict[str, object]:
        """What shapes a training, as plain values: goes into checkpoints."""
        return {
            "dataset": self.dataset.name,
            "base_classes": self.base_classes,
            "splits": self.dataset.splits,
            "train_lists_sha256": json_hash(self.train_lists),
            "train_shot": self.train_shot,
            "image_size": list(self.image_size),
            "batch_size": self.batch_size,
            "novel_pixels": self.novel_pixels,
            "seed": self.seed,
            "validation": {
                "dataset": self.validation.name,
                "classes": [self.validation.classes[c] for c in self.val_class_ids],
                "episodes": len(self.val_specs),
                "episode_list_sha256": list_hash(self.val_specs),
            },
        }

    @property
    def train_lists(self) -> dict[str, list[str]]:
        return lists_of(self.dataset, self.base_class_ids, "train")

    # Batches

    def setup(self, stage: str) -> None:
        """Draws the lists before any image is opened, so that what is missing shows at once."""
        self.target.check(names_of(self.test_specs))
        if stage == "fit":
            self.dataset.check(names for c in self.train_specs.images.values() for names in c)
            self.validation.check(names_of(self.val_specs))

    def test_dataset(self) -> Episodes:
        return Episodes(self.target, self.test_specs, self.image_size)

    def train_dataloader(self) -> DataLoader[Episode]:
        process, processes = self.place
        if self.batch_size % processes:
            raise DatasetError(
                f"episodes.batch_size={self.batch_size} (over all processes) does not divide by {processes} processes."
            )
        wanted = self.per_epoch or self.train_specs.per_epoch
        length = -(-wanted // self.batch_size) * self.batch_size
        sampler = EpochSampler(length, self.batch_size, process, processes)
        novel = self.dataset.novel_classes(self.fold) if self.fold != "all" else []
        one_class = len(self.dataset.classes) >= IGNORE  # FSS-1000: more classes than values, so a mask knows its own
        ignored = novel if self.novel_pixels == "ignore" and not one_class else []
        every_class = range(len(self.dataset.classes))  # one cache for all folds
        names = (n for c in every_class for n in self.dataset.images_of(c, "train"))
        episodes = Episodes(
            self.dataset, self.train_specs, self.image_size, ignored, self.cache_of(self.dataset, names)
        )
        if self.trainer:
            sampler.set_epoch(self.trainer.current_epoch)  # workers read ahead before the Trainer says it
        return self.loader(episodes, self.batch_size // processes, sampler, keep_workers=True, kind=TrainingLoader)

    def val_dataloader(self) -> DataLoader[Episode]:
        cache = self.cache_of(self.validation, names_of(self.val_specs))
        episodes = Episodes(self.validation, self.val_specs, self.image_size, cache=cache)
        return self.eval_loader(episodes, keep_workers=True)

    def test_dataloader(self) -> DataLoader[Episode]:
        return self.eval_loader(self.test_dataset(), keep_workers=False)

    def eval_loader(self, episodes: Episodes, keep_workers: bool) -> DataLoader[Episode]:
        """Every process takes its own part of the list: none twice, none left out, uneven if need be."""
        process, processes = self.place
        mine = range(process, len(episodes), processes)
        return self.loader(episodes, self.test_batch_size, mine, keep_workers)

    def loader(  # type: ignore[no-untyped-def]
        self,
        episodes: Episodes,
        batch_size: int,
        sampler,
        keep_workers: bool,
        kind: type[EpisodeLoader] = EpisodeLoader,
    ) -> DataLoader[Episode]:
        return kind(
            episodes,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=Episode.collate,
            worker_init_fn=leave_the_end_to_the_first,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=keep_workers and self.workers > 0,
        )

    def cache_of(self, dataset: FewShotDataset, names: Iterable[str]) -> ImageCache | None:
        return ImageCache(self.cache, dataset, names, self.image_size) if self.cache else None

    @property
    def place(self) -> tuple[int, int]:
        """(this process, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def names_of(specs: list[EpisodeSpec]) -> Iterable[str]:
    return (name for spec in specs for name in (spec.query, *spec.supports))


def lists_of(dataset: FewShotDataset, class_ids: list[int], split: str) -> dict[str, list[str]]:
    return {dataset.classes[c]: list(dataset.images_of(c, split)) for c in class_ids}  # type: ignore[arg-type]
