"""Preemption and time limits under Slurm: the job saves a checkpoint, is queued again and resumes."""

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.loggers import Dashboard
from experiments.run.ending import EndSoon
from experiments.run.processes import is_first
from experiments.sweep.trainings import keep_training

log = logging.getLogger(__name__)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # sent before the time limit; which one depends on the cluster


class Requeue(L.Callback):
    """Saves `checkpoints/last.ckpt` after the current batch and exits when Slurm asks for it.

    After a warning (SIGUSR1, SIGUSR2) the job queues itself again; after SIGTERM, Slurm ends the job and queues it
    again if it was preempted. The checkpoint is saved between two batches, because all processes have to save together
    and a signal handler cannot do that. Nothing is saved during validation and test, which can simply be repeated.
    A checkpoint is always saved before the last batch of an epoch, so that an interrupted validation does not cost the
    epoch.
    """

    asked = False  # whether this process was asked to exit; errors after that are not failures of the job
    queue = False  # whether the job has to queue itself again

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, folder / "checkpoints" / "last.ckpt"
        for number in WARNINGS:
            signal.signal(number, self.take_note)

    @staticmethod
    def wanted() -> bool:
        """Whether this process belongs to a Slurm batch job, which can be queued again."""
        return SLURMEnvironment.job_id() is not None and "SLURM_STEP_ID" in os.environ

    @staticmethod
    def was_asked() -> bool:
        """After an error: whether Slurm is ending the job. Waits, as its signal may reach another process first."""
        if Requeue.wanted():
            time.sleep(2)
        return Requeue.asked

    @staticmethod
    def take_note(number: int, frame: FrameType | None) -> None:
        if not Requeue.asked:  # later signals change nothing
            Requeue.queue = number in WARNINGS
        Requeue.asked = True
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader workers get the signal too and exit

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.take_note)  # replaces the Trainer's handler

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.take_note)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        any_process = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if trainer.is_last_batch:
            return
        asked = any_process(Requeue.asked)
        if asked or batch_index + 2 == trainer.num_training_batches:
            trainer.save_checkpoint(self.last, weights_only=False)
        if asked:
            Requeue.queue = any_process(Requeue.queue)
            self.leave(trainer, f"saved after batch {batch_index + 1} of epoch {trainer.current_epoch + 1}")

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.leave_if_asked(trainer, f"before epoch {trainer.current_epoch + 1}")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.leave_if_asked(trainer, "during validation")

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.leave_if_asked(trainer, "during the test")

    def leave_if_asked(self, trainer: L.Trainer, where: str) -> None:
        if Requeue.asked and trainer.is_global_zero:  # Slurm ends the other processes
            self.leave(trainer, where)

    def leave(self, trainer: L.Trainer, where: str) -> NoReturn:
        """Exits at once, without clean-up: Slurm removes the whole job."""
        for number in (*WARNINGS, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if trainer.is_global_zero:
            log.info("Slurm is ending this job: %s.", where)
            for logger in trainer.loggers:
                if isinstance(logger, Dashboard):
                    logger.leave()
            if Requeue.queue:
                keep_training(self.folder)
                requeue()
        logging.shutdown()
        os._exit(1)


def signal_callbacks(trainer: DictConfig, folder: Path) -> list[L.Callback]:
    """What takes the signals: `Requeue` in a job under Slurm, `EndSoon` elsewhere.

    Raises:
        UserError: the Trainer's number of devices or nodes is not what Slurm started.
    """
    if not Requeue.wanted():
        return [EndSoon()]
    for name, variable in (("devices", "SLURM_NTASKS_PER_NODE"), ("num_nodes", "SLURM_NNODES")):
        have, want = os.environ.get(variable), trainer[name]
        if have is not None and str(want) != have:
            raise UserError(
                f"Slurm started this job with {variable}={have}, but trainer.{name}={want}. Set launcher.devices and "
                "launcher.nodes instead; they apply to the whole sweep, so start one sweep for each number of devices."
            )
    return [Requeue(folder)]


def leave_if_asked(trainer: L.Trainer) -> None:
    """Exits if Slurm asked for it, while this job waits for another job's training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Requeue):
            callback.leave_if_asked(trainer, "while waiting for another job's training")


def leave_after_error() -> NoReturn:
    """Exits after an error that Slurm's signal caused, and queues the job again after a warning."""
    if Requeue.queue and is_first():
        requeue()
    sys.exit(1)


def was_requeued() -> bool:
    """Whether Slurm started this job before, in the same folder."""
    return Requeue.wanted() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        log.error("Slurm did not requeue this job (%s). Start it again to resume.", done.stderr.strip())
