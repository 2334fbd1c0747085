"""Logs a job as a run of W&B. Only jobs that use it import wandb, which takes more than half a second."""

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from experiments.run.processes import is_first

log = logging.getLogger(__name__)
# W&B sends figures about itself, and a process would wait at its end, up to half a minute, for a server that is silent.
os.environ.setdefault("OTEL_SDK_DISABLED", "true")
# Names without fold and shot, so that W&B draws all runs of a metric in one chart.
OVER_EPOCHS = {
    "val/miou": "max",
    "val/fb_iou": "max",
    "train/loss": "min",
}


class WandbLogger(LightningWandbLogger):
    """Logs a job as one W&B run.

    If there is no API key, the key is rejected or the server cannot be reached at the start, the run is kept offline
    and can be uploaded later. If W&B fails in any other way, one warning is logged and the job continues without it;
    all metrics and results are in the run's folder too.

    Args:
        save_dir: the run's folder. A job that resumes in this folder continues the same W&B run.
        offline: whether to keep the run offline without asking the server.
        checkpoint: whether to store the tested checkpoint as an artifact.
        init_timeout: seconds to wait for the server at the start.
        finish_timeout: seconds to wait at the end for uploads; what is left stays in the run's folder.
        init: further arguments of Lightning's WandbLogger: project, name, group, tags, ...
    """

    def __init__(
        self, save_dir: str, offline: bool = False, checkpoint: bool = False,
        init_timeout: float = 60, finish_timeout: float = 120, **init: Any,
    ) -> None:  # fmt: skip
        super().__init__(save_dir=save_dir, id=run_id(Path(save_dir)), **init)
        self._wandb_init.pop("anonymous")  # deprecated: wandb warns about it
        if of_agent():
            for chosen in ("project", "entity", "id"):
                self._wandb_init.pop(chosen, None)  # by the agent: wandb warns about others
        self.checkpoint, self.failed = checkpoint, False

        def configure() -> None:  # raises if wandb rejects an environment variable
            settings = wandb.Settings(init_timeout=init_timeout, finish_timeout=finish_timeout)
            self._wandb_init["settings"] = settings
            if offline:
                self._wandb_init["mode"] = "offline"
            elif os.environ.get("WANDB_MODE", "online") == "online" and (why := reason_against_online()):
                self.go_offline(why)

        self.guard(configure)

    def go_offline(self, why: str) -> None:
        self._wandb_init["mode"] = "offline"
        log.warning("W&B: %s. The run is kept offline; upload it later: wandb sync %s", why, self.offline_runs)

    @property
    def offline_runs(self) -> str:
        return f"{self.save_dir}/wandb/offline-run-*"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at its first use; after a failure, a dummy that accepts every call."""
        if self._experiment is None and not self.failed:
            self.guard(self.start)
        return DummyExperiment() if self.failed else self._experiment

    def start(self) -> None:
        try:
            run = super().experiment
        except wandb.errors.Error as error:
            if self._wandb_init.get("mode") == "offline":
                raise
            self.go_offline(first_line(error))
            wandb.teardown()  # else its service would keep the run that failed to start
            run = super().experiment
        for name, best in OVER_EPOCHS.items():
            run.define_metric(name, step_metric="epoch", summary=best)

    def guard(self, call: Callable[[], Any]) -> None:
        """Calls; on the first error of W&B logs a warning and from then on does nothing."""
        if self.failed:
            return
        try:
            call()
        except Exception as error:  # whatever wandb, its service or the network raise must not stop the training
            if self.failed:  # a nested call has already logged it
                return
            self.failed = True
            with suppress(Exception):
                wandb.teardown()  # else it would try again, and fail again, when Python exits
            log.warning(
                "W&B failed (%s). The run continues without it; its metrics and results are in %s.",
                *(first_line(error), self.save_dir),
            )

    def log_hyperparams(self, params: Any) -> None:
        self.guard(lambda: super(WandbLogger, self).log_hyperparams(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.guard(lambda: super(WandbLogger, self).log_metrics(metrics, step))

    def leave(self) -> None:
        """Ends this part of the W&B run; the job will continue the same run when it is restarted."""

        def end() -> None:
            self.experiment.mark_preempting()
            self.experiment.finish(exit_code=1)

        self.guard(end)

    @rank_zero_only
    def log_results(self, record: dict[str, Any], folder: Path) -> None:
        """Logs test scores and baselines to the run's summary, pictures as images, results.json as a file."""

        def send() -> None:
            run, test = self.experiment, record["test"]
            run.summary.update({f"test/iou/{name}": iou for name, iou in test["iou_per_class"].items()})
            for key in ("miou", "fb_iou"):
                baselines = {f"test/baselines/{name}/{key}": s[key] for name, s in record["baselines"].items()}
                run.summary.update({f"test/{key}": test[key], **baselines})
            run.summary.update({f"test/absent/{key}": score for key, score in test.get("absent", {}).items()})
            if (best := record["checkpoint"].get("val_miou")) is not None:
                run.summary["val/best_miou"] = best  # a plain number, which a search of W&B can compare
            if trained_by := record["training"].get("run"):  # no training if the method learns nothing
                run.config.update({"trained_by": trained_by}, allow_val_change=True)
            pictures = sorted((folder / "predictions").glob("*-episode*.png"))
            if pictures:
                run.log({"predictions": [wandb.Image(str(p), caption=p.stem) for p in pictures]})
            run.save(str(folder / "results.json"), base_path=str(folder), policy="now")
            if self.checkpoint and record["checkpoint"]:
                artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=record["setting"])
                artifact.add_file(record["checkpoint"]["path"])
                run.log_artifact(artifact)

        self.guard(send)


def reason_against_online() -> str | None:
    """Why W&B cannot be used online; None if it can."""
    try:
        return None if wandb.login(prompt=False, verify=False) else "no API key (run wandb login or set WANDB_API_KEY)"
    except wandb.errors.Error as error:
        return first_line(error)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def of_agent() -> str | None:
    """The id that `wandb agent` has given the run; None if no agent started it."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def run_id(folder: Path) -> str:
    """The id of the folder's W&B run, stored in the file `wandb-run-id`."""
    path = folder / "wandb-run-id"
    if not path.exists() and is_first():
        path.write_text(of_agent() or secrets.token_hex(4))
    return path.read_text() if path.exists() else ""
