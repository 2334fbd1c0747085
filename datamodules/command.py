"""Shared by the commands that inspect a dataset: they take the same overrides as `run.py`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from datamodules.episodes.dataset import Episodes, FewShotDataset
from datamodules.errors import DatasetError
from pmnet.errors import ImageError

if TYPE_CHECKING:
    from datamodules.episodes.module import FewShotDataModule  # Lightning takes seconds to import
    from datamodules.episodes.protocol import Protocol

CONF = Path(__file__).parents[1] / "conf"


@contextmanager
def one_message() -> Iterator[None]:
    """Prints an error the user can fix as one message and exits with code 1."""
    try:
        yield
    except (DatasetError, ImageError, HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(error, InstantiationException) and not isinstance(cause, (DatasetError, ImageError)):
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(cause))}", highlight=False)
        sys.exit(1)


def config(overrides: Sequence[str]) -> DictConfig:
    """Composes the config as `run.py` does.

    Args:
        overrides: Hydra overrides, such as `dataset=pascal` and `fold=0`.

    Raises:
        HydraException, OmegaConfBaseException: an override or a file of settings is wrong.

    Example:
        >>> config(["dataset=synthetic", "fold=2"]).fold.index
        2
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", list(overrides))
    except Exception as error:  # broken YAML and odd overrides make Hydra raise anything
        if isinstance(error, (HydraException, OmegaConfBaseException)) and str(error):
            raise
        raise HydraException(f"The settings cannot be read: {error or error.__cause__!r}") from error


def load_test_episodes(cfg: DictConfig) -> tuple[FewShotDataset, Episodes]:
    """The test dataset of a config and its test episodes.

    A test-only dataset may be given as `dataset`: no training dataset is needed to list its episodes.

    Raises:
        DatasetError: the dataset is missing or the setting is impossible.
    """
    dataset: FewShotDataset = instantiate(cfg.dataset)
    if cfg.target is not None or not dataset.test_only:
        data: FewShotDataModule = instantiate(cfg.episodes)
        return data.target, data.test_dataset()
    e, class_ids = cfg.episodes, dataset.target_classes(dataset, "all")
    size = (e.image_size, e.image_size) if isinstance(e.image_size, int) else tuple(e.image_size)
    protocol: Protocol = instantiate(cfg.protocol)
    specs = protocol.sample(dataset, class_ids, e.test or protocol.count(dataset), cfg.shot.k, protocol.seed, e.repeats)
    return dataset, Episodes(dataset, specs, size, protocol=protocol)
