"""Slurm takes a job's place away, by preemption or time limit: the job saves, and goes on when it is started again."""

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
from experiments.loggers import WandbLogger
from experiments.run.processes import is_first
from experiments.sweep.trainings import will_be_back

log = logging.getLogger(__name__)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # clusters differ in which one comes before the time limit


class Requeue(L.Callback):
    """Saves `checkpoints/last.ckpt` at the end of the batch and leaves.

    After a warning (SIGUSR1, SIGUSR2) the job queues itself again; after SIGTERM it is Slurm that ends it, and that
    queues it again if it was preempted. The checkpoint is saved between two batches and by all processes at once,
    which a signal's handler cannot do. In a validation or a test, which repeat in the same way, nothing is saved; but
    before an epoch's last batch it always is, so that a validation that is cut short does not cost the epoch.
    """

    asked = False  # whether this process was asked to leave: errors after that are no failure of the job
    queue = False  # whether it is to queue the job again

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, folder / "checkpoints" / "last.ckpt"
        for number in WARNINGS:
            signal.signal(number, self.take_note)

    @staticmethod
    def wanted() -> bool:
        """Whether this is a step of a batch job of Slurm, which can be queued again."""
        return SLURMEnvironment.job_id() is not None and "SLURM_STEP_ID" in os.environ

    @staticmethod
    def was_asked() -> bool:
        """After an error: whether Slurm ends the job; its signal may reach another process before this one."""
        if Requeue.wanted():
            time.sleep(2)
        return Requeue.asked

    @staticmethod
    def take_note(number: int, frame: FrameType | None) -> None:
        if not Requeue.asked:  # a second signal, as the first goes unheeded for long, changes nothing
            Requeue.queue = number in WARNINGS
        Requeue.asked = True
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the signal ends processes that read images, too

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.take_note)  # in place of the Trainer's

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
        self.leave_if_asked(trainer, "in a validation")

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.leave_if_asked(trainer, "in a test")

    def leave_if_asked(self, trainer: L.Trainer, where: str) -> None:
        if Requeue.asked and trainer.is_global_zero:  # Slurm ends the others
            self.leave(trainer, where)

    def leave(self, trainer: L.Trainer, where: str) -> NoReturn:
        """Ends at once: what a process would tidy up, Slurm is taking away."""
        for number in (*WARNINGS, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if trainer.is_global_zero:
            log.info("Slurm wants this job's place: %s.", where)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.leave()
            if Requeue.queue:
                will_be_back(self.folder)
                requeue()
        logging.shutdown()
        os._exit(1)


def slurm_callbacks(trainer: DictConfig, folder: Path) -> list[L.Callback]:
    """What a job under Slurm needs; nothing elsewhere.

    Raises:
        UserError: Slurm started another number of processes than the Trainer is to have.
    """
    if not Requeue.wanted():
        return []
    for name, variable in (("devices", "SLURM_NTASKS_PER_NODE"), ("num_nodes", "SLURM_NNODES")):
        have, want = os.environ.get(variable), trainer[name]
        if have is not None and str(want) != have:
            raise UserError(
                f"Slurm gave this job {variable}={have}, but trainer.{name}={want}. They follow from launcher.devices "
                "and launcher.nodes, which hold for the whole sweep: start a sweep for each number of devices."
            )
    return [Requeue(folder)]


def leave_if_asked(trainer: L.Trainer) -> None:
    """For a job that waits for another's training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Requeue):
            callback.leave_if_asked(trainer, "waiting for another's training")


def leave_after_error() -> NoReturn:
    if Requeue.queue and is_first():
        requeue()
    sys.exit(1)


def was_requeued() -> bool:
    """Whether this job began earlier, in the same folder, and lost its place."""
    return Requeue.wanted() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        log.error("Slurm does not queue this job again (%s). Start it anew to go on.", done.stderr.strip())
