"""DataLoaders for long trainings: they resume in the middle of an epoch and work with signals and process groups."""

import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datamodules.episodes.episode import Episode
from datamodules.errors import DatasetError

GRACE = 10.0  # seconds that workers have to end after an epoch


class EpisodeLoader(DataLoader[Any]):
    """A DataLoader that does not wait forever for its workers and is safe to start while a process group is active.

    After a barrier, a thread of the process group (such as gloo's) may be about to acquire the interpreter lock. A
    worker forked at that moment inherits the held lock and waits forever (Python 3.11). A short pause before the
    workers start avoids this.

    Args:
        dataset: the episodes.
        patience: seconds without a batch after which the workers count as stuck.
        options: as of a DataLoader.

    Raises:
        DatasetError: `patience` is not a positive number.
    """

    def __init__(self, dataset: Dataset[Any], patience: float = 300, **options: Any) -> None:
        if not isinstance(patience, int | float) or not patience > 0:
            raise DatasetError(f"episodes.timeout must be more than 0 seconds, not {patience}.")
        self.patience = patience
        super().__init__(dataset, **options)

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(0.2)
        return PatientIterator(self)


class PatientIterator(_MultiProcessingDataLoaderIter):
    """Kills the workers once they have kept the main process waiting for longer than the loader's patience.

    A time limit within torch is not enough: the memory of a batch that was announced is asked of its worker, and the
    main process waits forever if that is frozen.
    """

    def __init__(self, loader: EpisodeLoader) -> None:
        self.patience, self.stuck = loader.patience, False
        self.requests, self.waiting, self.over = 0, False, threading.Event()
        super().__init__(loader)
        threading.Thread(target=watch, args=(weakref.ref(self), self.over, self.patience), daemon=True).start()

    def _get_data(self) -> Any:
        """Raises DatasetError if the workers are stuck and RuntimeError if one of them is dead."""
        self.requests += 1
        self.waiting = True
        try:
            return super()._get_data()
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if self.stuck:
                raise DatasetError(
                    f"The {self._num_workers} workers that read images have not answered for {self.patience:.0f} s: "
                    "they are stuck, or a disk is. Run the same command again to resume. If they are only slow, set "
                    "episodes.timeout=3000; episodes.workers=0 reads in the main process."
                ) from error
            if isinstance(error, RuntimeError):
                raise
            raise RuntimeError("A worker exited unexpectedly while it handed over a batch.") from error
        finally:
            self.waiting = False

    def _try_get_data(self, *options: Any) -> Any:
        if self.stuck:  # and still alive: a process that waits for a disk cannot be killed
            raise RuntimeError("The workers are stuck.")
        return super()._try_get_data(*options)

    def give_up(self) -> None:
        """Kills the workers; without the signals of their deaths, which could interrupt the message."""
        self.stuck, self._worker_pids_set = True, False
        with suppress(ValueError):  # torch no longer watches them: the epoch is ending
            signal_handling._remove_worker_pids(id(self))
        for worker in self._workers:
            worker.kill()

    def _shutdown_workers(self) -> None:
        """Kills what does not end when asked: torch asks with a signal that a frozen worker, or ours, does not take."""
        self.over.set()
        if getattr(self, "_shutdown", True) or sys.is_finalizing():
            return super()._shutdown_workers()
        late = threading.Timer(GRACE, self.give_up)  # for torch's thread that pins memory, which may wait for one
        late.daemon = True
        late.start()
        try:
            super()._shutdown_workers()
        finally:
            late.cancel()
            self.give_up()


def watch(batches: "weakref.ref[PatientIterator]", over: threading.Event, patience: float) -> None:
    """Gives up on workers that are stuck; ends with the iterator, which it does not keep alive.

    It counts moments, not the time of a clock, which goes on while the whole run is suspended.
    """
    moment, waited, before = min(1.0, patience / 4), 0.0, 0
    while not over.wait(moment):
        iterator = batches()
        if iterator is None:
            return
        waited = waited + moment if iterator.waiting and iterator.requests == before else 0.0
        before = iterator.requests
        if waited >= patience:
            iterator.give_up()
            return
        del iterator


class TrainingLoader(EpisodeLoader):
    """A loader that resumes in the middle of an epoch.

    The Trainer saves `state_dict` in each checkpoint and loads it when a run is resumed. The sampler must have an
    attribute `skip`, as `EpochSampler` has.
    """

    served = 0  # batches of this epoch so far

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Starts the workers with the first batch: only then has a resumed Trainer told the sampler its epoch."""
        self.served = self.sampler.skip  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.skip = state["batches"] % len(self)  # type: ignore[attr-defined]


def check_shared_memory(batch_bytes: int, workers: int, ahead: int, folder: Path = Path("/dev/shm")) -> None:
    """Raises DatasetError where the batches that the workers prepare ahead do not fit into the shared memory.

    Args:
        ahead: batches that each worker prepares ahead.
        folder: where the system keeps shared memory; without it nothing is checked.
    """
    if not workers or not folder.is_dir():
        return
    need, free = batch_bytes * (workers * ahead + 1), shutil.disk_usage(folder).free
    if need > free:
        raise DatasetError(
            f"{workers} workers that read images need {need / 1e6:.0f} MB of shared memory in {folder}, where "
            f"{free / 1e6:.0f} MB are free. Give the container more (docker run --shm-size=2g), use smaller "
            "batches (episodes.batch_size, episodes.test_batch_size), or read in the main process: episodes.workers=0."
        )


def collate(episodes: list[Episode]) -> Episode:
    """Collates as `Episode.collate` does, and in a worker moves the batch to shared memory.

    Otherwise the worker's queue would move it, in a thread whose errors never reach the main process: that would wait
    forever.
    """
    batch = Episode.collate(episodes)
    if get_worker_info() is not None:
        for tensor in [*vars(batch).values(), *batch.truth]:
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()
    return batch


def start_worker(worker: int) -> None:
    """Initialises a worker: it ignores SIGTERM, and its errors are not shown once the main process is gone.

    A cluster sends SIGTERM to every process of a job. The workers must keep reading images until the main process has
    saved its checkpoint. If the main process is killed, they end at their next word to it, which is no error of theirs.
    A worker that cannot send a batch ends, and so does one without memory for a thread that would: the main process
    notices.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main = os.getppid()

    def show(*error: Any) -> None:
        time.sleep(0.2)  # a process that is killed closes its connections before its children get another parent
        if os.getppid() == main:
            sys.__excepthook__(*error)

    def end(ignored: Any) -> None:
        if issubclass(ignored.exc_type, MemoryError):
            os._exit(1)
        sys.__unraisablehook__(ignored)

    sys.excepthook, sys.unraisablehook = show, end
    Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]


def end_worker(error: Exception, batch: object) -> None:
    """Ends a worker whose queue cannot send a batch: it would go on with the next one, and the main process wait."""
    os._exit(1)
