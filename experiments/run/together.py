"""Processes that train together (DDP): how long they wait for each other."""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
import psutil
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from experiments.run.processes import is_first

EACH = 10  # batches of a validation or test after which the processes wait for each other


class PatientDDP(DDPStrategy):
    """DDP whose processes wait for each other no longer than `timeout`, except while they get ready.

    Getting ready may take one process much longer than another: the one that starts the others has to wait for them to
    come as far as it is itself, and where only one of several nodes has a cache of images, the others build theirs.
    From the first batch on, the processes meet every few batches: one that does not come is frozen or stuck.

    Args:
        timeout: for which the others wait for a process before they end with an error.
        options: of DDPStrategy.
    """

    def __init__(self, timeout: timedelta, **options: Any) -> None:
        super().__init__(timeout=timeout, **options)
        self.timeout = timeout

    def setup_distributed(self) -> None:
        """Connects the processes, at the start of the first training or test."""
        age = timedelta(seconds=time.time() - psutil.Process().create_time())
        self._timeout = max(self.timeout, 5 * age)  # the others take about as long to come here
        super().setup_distributed()
        set_timeout(max(self.timeout, default_pg_timeout))

    def on_train_start(self) -> None:
        set_timeout(self.timeout)

    def on_test_start(self) -> None:
        set_timeout(self.timeout)


def set_timeout(timeout: timedelta) -> None:
    """Sets how long this process waits for the others from now on."""
    if distributed.is_initialized():
        public = getattr(distributed, "set_timeout", None)  # PyTorch before 2.12 has it under another name
        (public or distributed.distributed_c10d._set_pg_timeout)(timeout)


class KeepPace(L.Callback):
    """Makes the processes wait for each other every few batches of a validation or test.

    Otherwise they would meet only at its end, and a process with a slower disk or a busier GPU would look frozen.
    """

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.agree(trainer, trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.agree(trainer, trainer.num_test_batches)

    def agree(self, trainer: L.Trainer, batches: list[int | float]) -> None:
        """Finds the number of batches that every process has; their shares of the episodes may differ by one."""
        own = torch.tensor(sum(batches), device=trainer.strategy.root_device)
        self.common = int(trainer.strategy.reduce(own, reduce_op="min"))

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int, dataloader: int = 0
    ) -> None:
        self.meet(trainer, index)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int, dataloader: int = 0
    ) -> None:
        self.meet(trainer, index)

    def meet(self, trainer: L.Trainer, index: int) -> None:
        if (index + 1) % EACH == 0 and index < self.common:
            trainer.strategy.barrier()


def stopped() -> dict[str, psutil.Process]:
    """The processes of this job on this machine that a signal has stopped (SIGSTOP), by their local rank."""
    found, own = {}, psutil.Process()
    starter = own if is_first() else own.parent() or own  # the first process starts the others
    with suppress(psutil.Error):
        for process in (starter, *starter.children()):
            rank = process.environ().get("LOCAL_RANK", "0" if process == starter else None)  # workers have none
            if rank is not None and process.status() == psutil.STATUS_STOPPED:
                found[rank] = process
    return found
