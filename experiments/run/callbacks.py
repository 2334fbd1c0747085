"""Callbacks of a training: seeds for each step, a log line for each epoch."""

import logging
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class StepSeed(L.Callback):
    """Seeds dropout by (seed, step, process), so that a resumed training equals an uninterrupted one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        torch.manual_seed((self.seed * 1_000_003 + trainer.global_step) * 1_009 + trainer.global_rank)


class EpochLog(L.Callback):
    """Logs one line for each epoch, for runs without a progress bar."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = time.time()  # on_train_epoch_start is not called if the training resumes within an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = time.time()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        shown = {name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name}
        parts = [f"{name} {value:.3f}" if value < 1 else f"{name} {value:.1f}" for name, value in shown.items()]
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        log.info("Epoch %d%s, %.0f s: %s", trainer.current_epoch + 1, of, time.time() - self.start, ", ".join(parts))

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> Any:
        if trainer.training and trainer.current_epoch:
            log.info(
                "Stopped in epoch %d; the checkpoint after epoch %d is kept.",
                trainer.current_epoch + 1,
                trainer.current_epoch,
            )
