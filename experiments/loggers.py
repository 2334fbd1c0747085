"""A run's loggers: always metrics.csv, and W&B if chosen."""

import itertools
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf


@runtime_checkable
class Dashboard(Protocol):
    """A logger that shows a run's results elsewhere, such as W&B."""

    def log_results(self, record: dict[str, Any], folder: Path) -> None:
        """Shows the content of results.json, and the pictures in the run's folder."""

    def leave(self) -> None:
        """Ends this part of the run; the job will continue it when it is restarted."""


def finish(code: int) -> None:
    """Ends the W&B run, if one is open."""
    if "wandb" not in sys.modules:
        return
    import wandb

    try:
        wandb.finish(exit_code=code)
    except Exception:  # a failure of W&B has already been logged
        with suppress(Exception):
            wandb.teardown()  # else it would try again, and fail again, when Python exits


def make_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The CSV logger and, if one is chosen, another logger."""
    keep_earlier(folder / "metrics.csv")
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if cfg.logger._target_:
        loggers.append(instantiate(cfg.logger))
        loggers[-1].log_hyperparams(columns(cfg) | {"config": OmegaConf.to_container(cfg, resolve=True)})
    return loggers


def columns(cfg: DictConfig) -> dict[str, Any]:
    """Short names of the setting, by which a table of runs can be filtered."""
    choices = HydraConfig.get().runtime.choices
    return {
        "task": cfg.task.name,
        "dataset": choices["dataset"],
        "target": choices.get("target") or choices["dataset"],
        "backbone": choices["backbone"],
        "weights": cfg.backbone.weights,
        "model": choices["model"],
        "method": cfg.model._target_.rsplit(".", 1)[-1],
        "fold": cfg.fold.index,
        "shot": cfg.shot.k,
        "seed": cfg.seed,
        "sweep": sweep_name(),
    }


def sweep_name() -> str | None:
    """The name of the folder of this job's sweep; None outside a sweep."""
    hydra = HydraConfig.get()
    return None if OmegaConf.is_missing(hydra.job, "num") else Path(hydra.sweep.dir).absolute().name


@rank_zero_only
def keep_earlier(path: Path) -> None:
    """Renames the metrics of an interrupted training in the same folder to metrics-1.csv, metrics-2.csv, ..."""
    if path.exists():
        number = next(n for n in itertools.count(1) if not path.with_stem(f"metrics-{n}").exists())
        path.rename(path.with_stem(f"metrics-{number}"))
