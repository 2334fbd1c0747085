"""DataLoaders that take part in what happens to long trainings: clusters' signals, interruptions."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class EpisodeLoader(DataLoader[Any]):
    """Starts its workers when no thread of a process group is about to enter the interpreter.

    One that does so just then, as gloo's do after a barrier, holds a lock that the worker would wait for forever
    (Python 3.11).
    """

    def __iter__(self) -> Any:
        if self.num_workers and torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(0.2)
        return super().__iter__()


class TrainingLoader(EpisodeLoader):
    """Goes on in the middle of an epoch. The Trainer saves and loads the state with its checkpoints."""

    given = 0  # batches of this epoch so far

    def __iter__(self) -> Any:
        self.given = self.sampler.skip  # type: ignore[attr-defined]
        return self.counted(super().__iter__())

    def counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.skip = state["batches"] % len(self)  # type: ignore[attr-defined]


def leave_the_end_to_the_first(worker: int) -> None:
    """A cluster sends SIGTERM to every process of a job: those that read images go on until the first has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
