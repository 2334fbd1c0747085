"""Loggers of a run: metrics.csv always, W&B if chosen."""

import itertools
import logging
from pathlib import Path
from typing import Any, cast

import wandb
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


def make_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The CSV logger, and the chosen one beside it; W&B goes offline where there is no key."""
    keep_earlier(folder / "metrics.csv")
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if cfg.logger._target_:
        options: dict[str, Any] = {}
        if "wandb" in cfg.logger._target_.lower() and not cfg.logger.offline and not wandb.login(prompt=False):
            log.warning(
                "No W&B key: the run is kept offline. Upload it later: wandb sync %s/wandb/offline-run-*", folder
            )
            options = {"offline": True, "mode": "offline"}
        loggers.append(instantiate(cfg.logger, **options))
        loggers[-1].log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)))
    return loggers


@rank_zero_only
def keep_earlier(path: Path) -> None:
    """Moves the metrics of an interrupted training in the same folder to metrics-1.csv, metrics-2.csv, ..."""
    if path.exists():
        number = next(n for n in itertools.count(1) if not path.with_stem(f"metrics-{n}").exists())
        path.rename(path.with_stem(f"metrics-{number}"))
