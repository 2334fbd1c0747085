"""Loggers of a run: metrics.csv always, W&B if chosen, which may fail without ending anything."""

import itertools
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from experiments.run.processes import is_first

log = logging.getLogger(__name__)
OVER_EPOCHS = {"val/miou": "max", "val/fb_iou": "max", "train/loss": "min"}  # named alike in any fold and shot


class WandbLogger(LightningWandbLogger):
    """A W&B run of one job.

    Without a key, with a rejected one or without a connection at the start it is kept offline, to be uploaded later.
    Whatever else fails is told once, and the job goes on without W&B: all of it is in the run's folder too.

    Args:
        save_dir: the run's folder; a job that goes on there goes on in the same W&B run.
        checkpoint: whether the tested checkpoint is stored as an artifact.
        init_timeout: seconds to wait for the server at the start.
        finish_timeout: seconds to wait at the end for what is not uploaded yet; it stays in the run's folder.
    """

    def __init__(
        self, save_dir: str, offline: bool = False, checkpoint: bool = False,
        init_timeout: float = 60, finish_timeout: float = 120, **init: Any,
    ) -> None:  # fmt: skip
        super().__init__(save_dir=save_dir, id=run_id(Path(save_dir)), **init)
        self._wandb_init.pop("anonymous")  # wandb warns that it means nothing any more
        self.checkpoint, self.failed = checkpoint, False

        def settle() -> None:  # an environment variable that wandb refuses is told of here
            settings = wandb.Settings(init_timeout=init_timeout, finish_timeout=finish_timeout)
            self._wandb_init["settings"] = settings
            if offline:
                self._wandb_init["mode"] = "offline"
            elif os.environ.get("WANDB_MODE", "online") == "online" and (why := reason_against_online()):
                self.go_offline(why)

        self.guard(settle)

    def go_offline(self, why: str) -> None:
        self._wandb_init["mode"] = "offline"
        log.warning("W&B: %s. The run is kept offline; upload it later: wandb sync %s", why, self.offline_runs)

    @property
    def offline_runs(self) -> str:
        return f"{self.save_dir}/wandb/offline-run-*"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun at its first use; after a failure, one that takes everything and does nothing."""
        if self._experiment is None and not self.failed:
            self.guard(self.begin)
        return DummyExperiment() if self.failed else self._experiment

    def begin(self) -> None:
        try:
            run = super().experiment
        except wandb.errors.Error as error:
            if self._wandb_init.get("mode") == "offline":
                raise
            self.go_offline(first_line(error))
            wandb.teardown()  # its service holds the run that did not come about
            run = super().experiment
        for name, best in OVER_EPOCHS.items():
            run.define_metric(name, step_metric="epoch", summary=best)

    def guard(self, what: Callable[[], Any]) -> None:
        if self.failed:
            return
        try:
            what()
        except Exception as error:  # wandb's own, its service's, the network's: none is worth a training
            if self.failed:  # and told, on the way to this
                return
            self.failed = True
            with suppress(Exception):
                wandb.teardown()  # else it would try again when Python ends, and fail again
            log.warning(
                "W&B failed (%s). The run goes on without it; its metrics and results are in %s.",
                *(first_line(error), self.save_dir),
            )

    def log_hyperparams(self, params: Any) -> None:
        self.guard(lambda: super(WandbLogger, self).log_hyperparams(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.guard(lambda: super(WandbLogger, self).log_metrics(metrics, step))

    def leave(self) -> None:
        """Ends this part of the W&B run; the job goes on in it later."""

        def end() -> None:
            self.experiment.mark_preempting()
            self.experiment.finish(exit_code=1)

        self.guard(end)

    @rank_zero_only
    def log_results(self, record: dict[str, Any], folder: Path) -> None:
        """Test scores as the run's summary, the panels as images, results.json as a file."""

        def send() -> None:
            run, test = self.experiment, record["test"]
            classes = {f"test/iou/{name}": iou for name, iou in test["iou_per_class"].items()}
            run.summary.update({"test/miou": test["miou"], "test/fb_iou": test["fb_iou"], **classes})
            run.config.update({"trained_by": record["training"]["run"]}, allow_val_change=True)
            pictures = sorted((folder / "predictions").glob("*-episode*.png"))
            if pictures:
                run.log({"predictions": [wandb.Image(str(p), caption=p.stem) for p in pictures]})
            run.save(str(folder / "results.json"), base_path=str(folder), policy="now")
            if self.checkpoint:
                artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=record["setting"])
                artifact.add_file(record["checkpoint"]["path"])
                run.log_artifact(artifact)

        self.guard(send)


def finish(code: int) -> None:
    """Ends the W&B run, if one is open."""
    with suppress(Exception):  # a W&B that failed was reported when it did
        wandb.finish(exit_code=code)


def make_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The CSV logger, and the chosen one beside it."""
    keep_earlier(folder / "metrics.csv")
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if cfg.logger._target_:
        loggers.append(instantiate(cfg.logger))
        loggers[-1].log_hyperparams(columns(cfg) | {"config": OmegaConf.to_container(cfg, resolve=True)})
    return loggers


def columns(cfg: DictConfig) -> dict[str, Any]:
    """What runs are told apart by: short names that a table of runs can be filtered by."""
    choices = HydraConfig.get().runtime.choices
    return {
        "task": cfg.task.name,
        "dataset": choices["dataset"],
        "target": choices.get("target") or choices["dataset"],
        "backbone": choices["backbone"],
        "weights": cfg.backbone.weights,
        "model": choices["model"],
        "fold": cfg.fold.index,
        "shot": cfg.shot.k,
        "seed": cfg.seed,
        "sweep": sweep_name(),
    }


def sweep_name() -> str | None:
    """The folder of the sweep that this job is of."""
    hydra = HydraConfig.get()
    return None if OmegaConf.is_missing(hydra.job, "num") else Path(hydra.sweep.dir).absolute().name


def reason_against_online() -> str | None:
    try:
        return None if wandb.login(prompt=False, verify=False) else "there is no key (wandb login, or WANDB_API_KEY)"
    except wandb.errors.Error as error:
        return first_line(error)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def run_id(folder: Path) -> str:
    """The id of the folder's W&B run, kept in `wandb-run-id`."""
    path = folder / "wandb-run-id"
    if not path.exists() and is_first():
        path.write_text(secrets.token_hex(4))
    return path.read_text() if path.exists() else ""


@rank_zero_only
def keep_earlier(path: Path) -> None:
    """Moves the metrics of an interrupted training in the same folder to metrics-1.csv, metrics-2.csv, ..."""
    if path.exists():
        number = next(n for n in itertools.count(1) if not path.with_stem(f"metrics-{n}").exists())
        path.rename(path.with_stem(f"metrics-{number}"))
