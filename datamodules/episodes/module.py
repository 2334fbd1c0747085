"""The LightningDataModule: training, validation and test episodes of one fold of one setting."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch.utils.data import DataLoader

from datamodules.episodes.absent import AbsentSpec, WithAbsent, count_absent, draw_absent
from datamodules.episodes.augment import Augment, named
from datamodules.episodes.cache import ImageCache
from datamodules.episodes.dataset import Episodes, FewShotDataset, Fold, Split
from datamodules.episodes.episode import IGNORE, Episode, EpisodeSpec
from datamodules.episodes.loader import EpisodeLoader, TrainingLoader, check_shared_memory, collate, start_worker
from datamodules.episodes.protocol import HSNET, Protocol
from datamodules.episodes.sampler import EpochSampler, Images, TrainingEpisodes, json_hash, list_hash
from datamodules.episodes.tasks import check_pair, same_benchmark
from datamodules.errors import DatasetError
from datamodules.registry import all_datasets

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The classes that a setting chooses for one part of a run, before any is left out.

    Attributes:
        dataset: the dataset of the classes.
        class_ids: ids of the classes.
        split: the images that the episodes are sampled from.
        supports: number of different support images in an episode.
    """

    dataset: FewShotDataset
    class_ids: list[int]
    split: Split
    supports: int

    @property
    def few(self) -> dict[int, int]:
        """The classes that are left out: class id -> number of its images."""
        rare = self.dataset.leaves_out_rare
        return self.dataset.few(self.class_ids, self.split, self.supports) if rare else {}

    @property
    def kept(self) -> list[int]:
        """Ids of the classes that remain."""
        few = self.few
        return [c for c in self.class_ids if c not in few]

    @property
    def rows(self) -> list[dict[str, object]]:
        """The classes that are left out, as plain values."""
        return [{"class": self.dataset.classes[c], "images": n} for c, n in self.few.items()]


class FewShotDataModule(L.LightningDataModule):
    """Supplies training, validation and test batches of type `Episode`.

    The episodes do not depend on the number of workers, the batch size or the number of processes.

    Args:
        dataset: dataset to train on.
        fold: number of the fold whose novel classes are tested; all other classes are trained on. "all" trains and
            tests on every class.
        shot: K of test episodes.
        train_shot: K of training and validation episodes (1 by the field's convention). It is independent of `shot`,
            so that one training can be tested with any K.
        image_size: side in pixels, or (H, W). Which sides it takes is the method's own affair.
        batch_size: episodes per training batch, over all processes together.
        test_batch_size: episodes per validation or test batch, on each process.
        per_epoch: training episodes per epoch, rounded up to whole batches. None: one per (image, class) pair, or one
            per image if the dataset is balanced.
        val: number of validation episodes; None: as many as in the published test of the dataset.
        test: number of test episodes; None: as the protocol says.
        novel_pixels: what training does with pixels of novel classes: "background", as in most published protocols,
            labels them so; "ignore" excludes them from the loss; "remove" leaves out the images that show them.
        workers: worker processes that read images, per training process; 0 reads in the training process itself.
        timeout: seconds without a batch after which the workers count as stuck.
        protocol: conventions of the test.
        test_seeds: number of test lists, each with a seed of its own; None: as the protocol says.
        absent: share of test episodes whose query shows none of the class, at least 0, less than 1. They are added to
            each test list, which itself stays as it is.
        seed: seed of the training episodes. Test lists have seeds of their own, see `protocol`.
        repeats: whether an image may appear twice among the K supports of a test episode; None: as published.
        cache: folder for a cache of resized images; None reads and resizes the files each time.
        augment: changes each training image and its mask at random, see `datamodules/episodes/augment.py`; None or an
            empty mapping leaves them as they are.
        task: cross_category, cross_dataset or cross_domain; determines which targets are allowed for a dataset.
        target: dataset to test on; None tests on the novel classes of the training dataset.
        validation: dataset used to select the best epoch; None uses the novel classes of the training dataset.

    Raises:
        DatasetError: a setting is invalid, or the task does not allow this pair of datasets.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> data = FewShotDataModule(
        ...     SyntheticDataset(size=64, images_per_class=5, seed=0), fold=0, shot=2, train_shot=1, image_size=64,
        ...     batch_size=4, test_batch_size=3, per_epoch=8, val=6, test=6, novel_pixels="background", workers=0,
        ...     seed=0,
        ... )
        >>> data.test_classes
        ['striped disc', 'dotted square', 'ringed star', 'plain triangle', 'checked flower']
        >>> batch = next(iter(data.test_dataloader()))
        >>> batch.query.shape, batch.support_masks.shape
        (torch.Size([3, 3, 64, 64]), torch.Size([3, 2, 64, 64]))
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
        augment: Augment | Mapping[str, Any] | None = None,
        task: str = "cross_category",
        target: FewShotDataset | None = None,
        validation: FewShotDataset | None = None,
        timeout: float = 300,
        protocol: Protocol = HSNET,
        test_seeds: int | None = None,
        absent: float = 0,
    ) -> None:
        super().__init__()
        sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise DatasetError(f"episodes.image_size must be one or two positive whole numbers, not {image_size}.")
        if novel_pixels not in ("background", "ignore", "remove"):
            raise DatasetError(f"episodes.novel_pixels must be one of background, ignore, remove, not {novel_pixels}.")
        counts = {"shot.k": shot, "train_shot": train_shot, "episodes.batch_size": batch_size}
        counts |= {"episodes.test_batch_size": test_batch_size}
        counts |= {"test_seeds": test_seeds} if test_seeds is not None else {}
        counts |= {f"episodes.{n}": c for n, c in (("val", val), ("test", test)) if c is not None}
        for name, count in counts.items():
            if count < 1:
                raise DatasetError(f"{name} must be 1 or more, not {count}.")
        if not 0 <= absent < 1:
            raise DatasetError(
                f"episodes.absent is a share of the test episodes: it must be at least 0 and less than 1, not {absent}."
            )
        check_pair(task, dataset, target)
        self.dataset, self.fold, self.shot, self.train_shot = dataset, fold, shot, train_shot
        self.target, self.validation = target or dataset, validation or dataset
        self.same = same_benchmark(dataset, self.target)
        self.image_size = (sides[0], sides[1])
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.per_epoch, self.val, self.test, self.repeats = per_epoch, val, test, repeats
        self.novel_pixels, self.seed = novel_pixels, seed
        self.workers, self.timeout = workers, timeout
        self.protocol = protocol
        self.test_seeds = range(protocol.seed, protocol.seed + (test_seeds or protocol.lists))
        self.test_seed = protocol.seed  # of the list that `test_dataloader` reads
        self.absent = absent
        self.cache = Path(cache).expanduser() if cache else None
        self.augment = augment if callable(augment) else None

    # Classes and episodes

    @cached_property
    def train_choice(self) -> Choice:
        """The training classes before any is left out."""
        return Choice(self.dataset, self.dataset.base_classes(self.fold), "train", self.train_shot)

    @cached_property
    def val_choice(self) -> Choice:
        """The validation classes before any is left out."""
        fold = self.fold if same_benchmark(self.dataset, self.validation) else "all"
        class_ids = self.validation.validation_classes(fold)
        return Choice(self.validation, class_ids, "test", 1 if self.repeats else self.train_shot)

    @cached_property
    def test_choice(self) -> Choice:
        """The test classes before any is left out."""
        if self.same:
            class_ids = self.target.novel_classes(self.fold)
        else:
            class_ids = self.target.target_classes(self.dataset, self.fold)
        return Choice(self.target, class_ids, "test", 1 if self.repeats else self.shot)

    @cached_property
    def base_class_ids(self) -> list[int]:
        """Ids of the training classes, in `dataset`."""
        return self.train_choice.kept

    @cached_property
    def test_class_ids(self) -> list[int]:
        """Ids of the test classes, in `target`."""
        return self.test_choice.kept

    @cached_property
    def val_class_ids(self) -> list[int]:
        """Ids of the validation classes, in `validation`."""
        return self.val_choice.kept

    @cached_property
    def classes_left_out(self) -> dict[str, list[dict[str, object]]]:
        """Classes with too few images for an episode, which are left out: part -> rows {"class", "images"}.

        Logs one warning if there are any.
        """
        choices = {"training": self.train_choice, "validation": self.val_choice, "test": self.test_choice}
        left_out: dict[str, list[str]] = {}  # reason -> parts
        for part, choice in choices.items():
            if choice.few:
                text = choice.dataset.counted(choice.few)
                reason = f"an episode needs {choice.supports + 1} images of its class, but {text}"
                left_out.setdefault(reason, []).append(part)
        if left_out:
            reasons = "; of ".join(f"{' and '.join(parts)}: {reason}" for reason, parts in left_out.items())
            advice = dict.fromkeys(choice.dataset.advice() for choice in choices.values() if choice.few)
            log.warning("Classes left out of %s. %s", reasons, " ".join(advice))
        return {part: choice.rows for part, choice in zip(("train", "val", "test"), choices.values(), strict=True)}

    @cached_property
    def train_specs(self) -> TrainingEpisodes:
        """The training episodes of all epochs."""
        images = self.without_novel(self.dataset.images(self.train_choice.class_ids, "train", self.train_shot))
        return TrainingEpisodes(images, self.train_shot, self.seed, self.dataset.balanced)

    def without_novel(self, images: Images) -> Images:
        """Training images of each class; without those that show a novel class, if these are removed.

        Raises:
            DatasetError: a class has too few images left.
        """
        if self.novel_pixels != "remove":
            return images
        left: dict[int, Sequence[str]] = {
            c: [name for name in names if name not in self.show_novel] for c, names in images.items()
        }
        few = {c: len(names) for c, names in left.items() if len(names) <= self.train_shot}
        if few:
            raise DatasetError(
                "Without the images that show a novel class, too few are left to train on: "
                f"{self.dataset.counted(few)}. Set episodes.novel_pixels=ignore, or choose another fold."
            )
        return left

    @cached_property
    def show_novel(self) -> frozenset[str]:
        """Names of the training images that have a pixel of a novel class."""
        if not self.maskable:
            return frozenset()
        novel = {c + 1 for c in self.novel_class_ids}
        names = sorted({n for c in self.train_choice.class_ids for n in self.dataset.images_of(c, "train")})
        return frozenset(name for name, counts in self.dataset.pixels(names).items() if novel & counts.keys())

    @property
    def novel_class_ids(self) -> list[int]:
        """Ids of the classes of the training dataset that the fold holds out; none if it is "all"."""
        return [] if self.fold == "all" else self.dataset.novel_classes(self.fold)

    @property
    def maskable(self) -> bool:
        """Whether a mask can show novel classes. In FSS-1000, it shows only the class of its own image."""
        return len(self.dataset.classes) < IGNORE and bool(self.novel_class_ids)

    @cached_property
    def test_lists(self) -> dict[int, list[EpisodeSpec]]:
        """Seed -> list of test episodes."""
        count = self.test or self.protocol.count(self.target)
        setting = self.target, self.test_choice.class_ids, count, self.shot
        lists = {seed: self.protocol.sample(*setting, seed, self.repeats) for seed in self.test_seeds}
        self.warn_of_missing_classes(lists[self.protocol.seed], self.target, self.test_class_ids, "test")
        return lists

    @property
    def test_specs(self) -> list[EpisodeSpec]:
        """The list of test episodes that `test_seed` chooses."""
        return self.test_lists[self.test_seed]

    @cached_property
    def absent_lists(self) -> dict[int, list[AbsentSpec]]:
        """Seed -> list of test episodes whose query shows none of the class. Reads the masks of their queries."""
        split = "test" if self.protocol.draw == "benchmark" else self.protocol.split
        images = {c: self.target.images_of(c, split) for c in self.test_class_ids} if self.absent else {}
        return {
            seed: draw_absent(self.target, images, specs, count_absent(self.absent, len(specs)), seed)
            for seed, specs in self.test_lists.items()
        }

    @property
    def absent_specs(self) -> list[AbsentSpec]:
        """The absent episodes that `test_seed` chooses; they follow those of `test_specs`."""
        return self.absent_lists[self.test_seed]

    @cached_property
    def val_specs(self) -> list[EpisodeSpec]:
        """The list of validation episodes: the head of the test list if classes and shots are the same."""
        count = self.val or self.validation.test_length
        specs = self.validation.test_episodes(self.val_choice.class_ids, count, self.train_shot, self.repeats)
        return self.warn_of_missing_classes(specs, self.validation, self.val_class_ids, "val")

    def warn_of_missing_classes(
        self, specs: list[EpisodeSpec], dataset: FewShotDataset, class_ids: list[int], what: str
    ) -> list[EpisodeSpec]:
        """Returns `specs`; warns if they are too few to include every class."""
        missing = sorted(set(class_ids) - {s.class_id for s in specs})
        if missing:
            log.warning(
                "%d episodes of %s miss %d of %d classes ('%s', ...), which lower mIoU with an IoU of 0. "
                "Increase episodes.%s.",
                *(len(specs), dataset.name, len(missing), len(class_ids), dataset.classes[missing[0]], what),
            )
        return specs

    @property
    def base_classes(self) -> list[str]:
        """Names of the training classes."""
        return [self.dataset.classes[c] for c in self.base_class_ids]

    @property
    def test_classes(self) -> list[str]:
        """Names of the test classes."""
        return [self.target.classes[c] for c in self.test_class_ids]

    def seen(self, names: Iterable[str], of: str) -> list[str]:
        """The test classes that are among `names`, even if the two datasets name them differently.

        Args:
            names: class names of another dataset.
            of: name of that dataset.

        Returns:
            Names in `target`, sorted.
        """
        kind = all_datasets().get(of, FewShotDataset)
        others = {kind.common_name(name) for name in names}
        return sorted(name for name in self.test_classes if self.target.common_name(name) in others)

    @property
    def provenance(self) -> dict[str, object]:
        """Identifies the test episodes behind a result, as plain values for `results.json`."""
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
            "episode_list_sha256": list_hash(self.test_lists[self.protocol.seed]),
            "protocol": self.protocol.record() | {"seeds": list(self.test_seeds)},
            **self.record_absent(),
            **self.record_left_out("train", "val", "test"),
        }

    @property
    def training_record(self) -> dict[str, object]:
        """Everything in the data that influences training, as plain values for checkpoints."""
        return {
            "dataset": self.dataset.name,
            "base_classes": self.base_classes,
            "splits": self.dataset.splits,
            "train_lists_sha256": json_hash(self.train_lists),
            "images": len({name for names in self.train_lists.values() for name in names}),
            "train_shot": self.train_shot,
            "image_size": list(self.image_size),
            "batch_size": self.batch_size,
            "novel_pixels": self.novel_pixels,
            "seed": self.seed,
            **self.record_augmentation(),
            "validation": {
                "dataset": self.validation.name,
                "classes": [self.validation.classes[c] for c in self.val_class_ids],
                "episodes": len(self.val_specs),
                "episode_list_sha256": list_hash(self.val_specs),
            },
            **self.record_left_out("train", "val"),
        }

    def record_absent(self) -> dict[str, object]:
        """The entry `absent` of a record; no entry if there are no absent episodes."""
        if not self.absent:
            return {}
        count, rows = len(self.absent_lists[self.protocol.seed]), self.absent_hash(self.protocol.seed)
        return {"absent": {"share": self.absent, "episodes": count, "episode_list_sha256": rows}}

    def absent_hash(self, seed: int) -> str:
        """sha256 of the absent episodes of a test list."""
        return json_hash([spec.row() for spec in self.absent_lists[seed]])

    def record_left_out(self, *parts: str) -> dict[str, object]:
        """The entry `classes_left_out` of a record; no entry if every class of these parts has enough images."""
        left_out = {part: self.classes_left_out[part] for part in parts}
        return {"classes_left_out": left_out} if any(left_out.values()) else {}

    def record_augmentation(self) -> dict[str, object]:
        """The entry `augment` of a record; no entry if images stay as they are."""
        if self.augment is None:
            return {}
        return {"augment": named(self.augment) + ", of cached images" * bool(self.cache)}

    @property
    def train_lists(self) -> dict[str, list[str]]:
        """Training class -> names of its images."""
        images = {c: self.dataset.images_of(c, "train") for c in self.base_class_ids}
        return {self.dataset.classes[c]: list(names) for c, names in self.without_novel(images).items()}

    # Batches

    def setup(self, stage: str) -> None:
        """Samples the episode lists and checks that their files exist, so that problems show before training.

        Raises:
            DatasetError: a file is missing, or a class has too few images and may not be left out.
        """
        for specs in self.test_lists.values():
            self.target.check(names_of(specs))
        for absent in self.absent_lists.values():
            self.target.check(names_of([spec.episode for spec in absent]))
        if stage == "fit":
            self.dataset.check(names for c in self.train_specs.images.values() for names in c)
            self.validation.check(names_of(self.val_specs))
        _ = self.classes_left_out  # logs a warning

    def test_dataset(self) -> Episodes:
        """The test episodes, without the absent ones, as a map-style dataset of single episodes."""
        return Episodes(self.target, self.test_specs, self.image_size, protocol=self.protocol)

    def train_dataloader(self) -> DataLoader[Episode]:
        process, processes = self.rank
        if self.batch_size % processes:
            raise DatasetError(
                f"episodes.batch_size={self.batch_size} (over all processes) is not divisible by {processes} processes."
            )
        wanted = self.per_epoch or self.train_specs.per_epoch
        length = -(-wanted // self.batch_size) * self.batch_size
        sampler = EpochSampler(length, self.batch_size, process, processes)
        ignored = self.novel_class_ids if self.novel_pixels == "ignore" and self.maskable else []
        every_class = range(len(self.dataset.classes))  # one cache for all folds
        names = (n for c in every_class for n in self.dataset.images_of(c, "train"))
        cache = self.cache_of(self.dataset, names)
        episodes = Episodes(self.dataset, self.train_specs, self.image_size, ignored, cache, self.augment)
        if self.trainer:
            sampler.set_epoch(self.trainer.current_epoch)  # workers prefetch before the Trainer calls set_epoch
        return self.loader(episodes, self.batch_size // processes, sampler, keep_workers=True, kind=TrainingLoader)

    def val_dataloader(self) -> DataLoader[Episode]:
        cache = self.cache_of(self.validation, names_of(self.val_specs))
        episodes = Episodes(self.validation, self.val_specs, self.image_size, cache=cache)
        return self.eval_loader(episodes, keep_workers=True)

    def test_dataloader(self) -> DataLoader[Episode]:
        """The test episodes, and after them the absent ones."""
        episodes = self.test_dataset()
        return self.eval_loader(WithAbsent(episodes, self.absent_specs) if self.absent else episodes, False)

    def eval_loader(self, episodes: Episodes, keep_workers: bool) -> DataLoader[Episode]:
        """Splits the list among the processes: each episode exactly once, in shares that may differ by one."""
        process, processes = self.rank
        share = range(process, len(episodes), processes)
        return self.loader(episodes, self.test_batch_size, share, keep_workers)

    def loader(  # type: ignore[no-untyped-def]
        self,
        episodes: Episodes,
        batch_size: int,
        sampler,
        keep_workers: bool,
        kind: type[EpisodeLoader] = EpisodeLoader,
    ) -> DataLoader[Episode]:
        loader = kind(
            episodes,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.workers,
            patience=self.timeout,
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=keep_workers and self.workers > 0,
        )
        check_shared_memory(batch_size * episodes.episode_bytes, self.workers, loader.prefetch_factor or 0)
        return loader

    def cache_of(self, dataset: FewShotDataset, names: Iterable[str]) -> ImageCache | None:
        return ImageCache(self.cache, dataset, names, self.image_size) if self.cache else None

    @property
    def rank(self) -> tuple[int, int]:
        """(rank of this process, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def names_of(specs: list[EpisodeSpec]) -> Iterable[str]:
    """Names of all images of some episodes, with repetitions."""
    return (name for spec in specs for name in (spec.query, *spec.supports))


def lists_of(dataset: FewShotDataset, class_ids: list[int], split: str) -> dict[str, list[str]]:
    """Class name -> names of its images."""
    return {dataset.classes[c]: list(dataset.images_of(c, split)) for c in class_ids}  # type: ignore[arg-type]
