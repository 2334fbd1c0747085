"""What the commands that look at a dataset share: a config from overrides as `run.py` takes them, errors in a line."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from datamodules.episodes.dataset import Episodes, FewShotDataset
from datamodules.episodes.module import FewShotDataModule
from datamodules.errors import DatasetError
from pmnet.errors import ImageError

CONF = Path(__file__).parents[1] / "conf"


@contextmanager
def one_message() -> Iterator[None]:
    """An error that the user can mend is one message and exit code 1."""
    try:
        yield
    except (DatasetError, ImageError, HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(error, InstantiationException) and not isinstance(cause, (DatasetError, ImageError)):
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(cause))}", highlight=False)
        sys.exit(1)


def config(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def test_episodes(cfg: DictConfig) -> tuple[FewShotDataset, Episodes]:
    """The tested dataset and its test episodes; a dataset that is only tested on needs no training dataset here."""
    dataset: FewShotDataset = instantiate(cfg.dataset)
    if cfg.target is not None or not dataset.test_only:
        data: FewShotDataModule = instantiate(cfg.episodes)
        return data.target, data.test_dataset()
    e, class_ids = cfg.episodes, dataset.target_classes(dataset, "all")
    size = (e.image_size, e.image_size) if isinstance(e.image_size, int) else tuple(e.image_size)
    specs = dataset.test_episodes(class_ids, e.test or dataset.test_length, cfg.shot.k, e.repeats)
    return dataset, Episodes(dataset, specs, size)
