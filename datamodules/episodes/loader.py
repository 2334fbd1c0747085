"""DataLoaders for long trainings: they resume in the middle of an epoch and work with signals and process groups."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class EpisodeLoader(DataLoader[Any]):
    """A DataLoader that is safe to start while a process group is active.

    After a barrier, a thread of the process group (such as gloo's) may be about to acquire the interpreter lock. A
    worker forked at that moment inherits the held lock and waits forever (Python 3.11). A short pause before the
    workers start avoids this.
    """

    def __iter__(self) -> Any:
        if self.num_workers and torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(0.2)
        return super().__iter__()


class TrainingLoader(EpisodeLoader):
    """A loader that resumes in the middle of an epoch.

    The Trainer saves `state_dict` in each checkpoint and loads it when a run is resumed. The sampler must have an
    attribute `skip`, as `EpochSampler` has.
    """

    served = 0  # batches of this epoch so far

    def __iter__(self) -> Any:
        self.served = self.sampler.skip  # type: ignore[attr-defined]
        return self.counted(super().__iter__())

    def counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.skip = state["batches"] % len(self)  # type: ignore[attr-defined]


def ignore_sigterm(worker: int) -> None:
    """Initialises a worker so that it ignores SIGTERM.

    A cluster sends SIGTERM to every process of a job. The workers must keep reading images until the main process has
    saved its checkpoint.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
