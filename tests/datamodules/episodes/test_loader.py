"""Workers that cannot deliver: said before the first batch, or an error in the main process, and never a hang."""

import gc
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules.episodes.dataset import Episodes
from datamodules.episodes.episode import Episode
from datamodules.episodes.loader import EpisodeLoader, check_shared_memory, collate, start_worker
from datamodules.errors import DatasetError
from datamodules.own.synthetic import SyntheticDataset


@pytest.fixture(autouse=True)
def _dead_workers_are_forgotten() -> Iterator[None]:
    """Else torch would report them in a later test, at the end of any child process."""
    yield
    gc.collect()  # errors keep the loaders alive, in cycles


def episodes(count: int = 4, shot: int = 2) -> Episodes:
    data = SyntheticDataset(size=64, images_per_class=8, seed=0)
    return Episodes(data, data.test_episodes([0, 1], count, shot), (64, 64))


def test_size_of_an_episode_is_that_of_its_images_and_masks() -> None:
    data = episodes()
    single = data[0]
    tensors = (single.query, single.query_mask, single.support, single.support_masks)
    assert data.episode_bytes == sum(tensor.nbytes for tensor in tensors)


def test_too_little_shared_memory_is_an_error_before_the_first_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64_000_000))
    check_shared_memory(12_000_000, workers=2, ahead=2, folder=tmp_path)
    check_shared_memory(99_000_000, workers=0, ahead=2, folder=tmp_path)
    with pytest.raises(DatasetError, match=r"need 65 MB .* 64 MB are free.*--shm-size.*episodes\.workers=0"):
        check_shared_memory(13_000_000, workers=2, ahead=2, folder=tmp_path)


def fail(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm)")


@pytest.mark.slow
def test_worker_that_cannot_deliver_ends_the_epoch_with_its_error(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forked, and so fail too
    loader = EpisodeLoader(episodes(), batch_size=2, num_workers=1, collate_fn=collate, patience=120)
    with pytest.raises(RuntimeError, match="unable to allocate shared memory"):
        list(loader)


@pytest.mark.parametrize("patience", [0, -1, math.nan, "soon"])
def test_patience_is_a_positive_number_of_seconds(patience: object) -> None:
    with pytest.raises(DatasetError, match=f"episodes.timeout must be more than 0 seconds, not {patience}"):
        EpisodeLoader(episodes(), patience=patience)


@dataclass
class Late:
    """Items, one of which keeps its worker for some seconds, or for good (NaN)."""

    seconds: float

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> int:
        if i == 3 and math.isnan(self.seconds):
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(self.seconds if i == 3 else 0)
        return i


@pytest.mark.slow
def test_slow_worker_is_waited_for_and_a_stuck_one_is_an_error() -> None:
    assert torch.cat(list(EpisodeLoader(Late(3), patience=20, num_workers=1))).tolist() == [*range(6)]
    with pytest.raises(DatasetError, match=r"The 2 workers that read images have not answered .*episodes\.timeout"):
        list(EpisodeLoader(Late(math.nan), patience=2, num_workers=2))


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_workers_that_are_late_where_a_second_epoch_begins(frozen: bool) -> None:
    """The first epoch is left while a worker still reads, and has announced batches whose memory it has to give."""
    patience = 1 if frozen else 20
    late = EpisodeLoader(Late(7), patience=patience, num_workers=1, persistent_workers=True, prefetch_factor=4)
    assert next(iter(late)).item() == 0
    if frozen:
        (worker,) = late._iterator._workers
        assert late._iterator._worker_result_queue._reader.poll(10), "a batch is announced"
        os.kill(worker.pid or 0, signal.SIGSTOP)
        with pytest.raises(DatasetError, match="The 1 workers that read images have not answered for 1 s"):
            iter(late)
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL
    else:
        assert torch.cat(list(late)).tolist() == [*range(6)]


@pytest.mark.slow
def test_workers_that_cannot_be_killed_are_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a disk, in the kernel."""
    monkeypatch.setattr("multiprocessing.process.BaseProcess.kill", lambda worker: None)
    start = time.monotonic()
    with pytest.raises(DatasetError, match="have not answered for 2 s"):
        list(EpisodeLoader(Late(60), patience=2, num_workers=1))
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_frozen_worker_does_not_outlive_an_epoch_that_is_left() -> None:
    batches = iter(EpisodeLoader(Late(0), num_workers=1, worker_init_fn=start_worker))
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGSTOP)
    del batches
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


@dataclass
class Fatal:
    """Items, one of which kills its worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> int:
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return i


def test_dead_worker_is_an_error_even_if_the_word_of_its_death_is_lost() -> None:
    """An exception of a signal's handler is lost where Python cannot raise it, as in a destructor."""
    batches = iter(EpisodeLoader(Fatal(), patience=60, num_workers=1))
    next(batches)
    before, start = signal.signal(signal.SIGCHLD, signal.SIG_DFL), time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_worker_that_dies_while_it_hands_over_a_batch_is_a_dead_worker(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue then has the batch's number of a file that the worker no longer gives."""

    def detach(_: object) -> None:
        raise error

    monkeypatch.setattr("multiprocessing.resource_sharer.DupFd.detach", detach)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(EpisodeLoader(Late(0), num_workers=1))


@dataclass
class Forgetful:
    """Items that leave an error of their worker that nothing can catch."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> int:
        class Gone:
            def __del__(self) -> None:
                raise MemoryError

        Gone()
        time.sleep(60)
        return i


def test_worker_whose_threads_have_no_memory_is_a_dead_worker(capfd: pytest.CaptureFixture[str]) -> None:
    """As "Exception ignored in thread started by": it would go on, and send nothing."""
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(EpisodeLoader(Forgetful(), num_workers=1, worker_init_fn=start_worker))
    assert "MemoryError" not in capfd.readouterr().err


@dataclass
class Unreadable:
    """Items whose file is gone."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> int:
        raise FileNotFoundError(2, "No such file", f"{i}.png")


@pytest.mark.slow
def test_error_of_the_items_is_not_that_of_a_dead_worker() -> None:
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        list(EpisodeLoader(Unreadable(), num_workers=1))


def test_batches_of_workers_are_those_of_the_main_process() -> None:
    data, loaded = episodes(), []
    for workers in (0, 2):
        loader = EpisodeLoader(data, batch_size=2, num_workers=workers, collate_fn=collate)
        loaded.append([(batch.query, batch.support_masks) for batch in loader])
    expected = [Episode.collate([data[2 * i], data[2 * i + 1]]) for i in range(2)]
    for batches in loaded:
        for (query, masks), batch in zip(batches, expected, strict=True):
            assert torch.equal(query, batch.query)
            assert torch.equal(masks, batch.support_masks)


def test_worker_whose_main_process_is_gone_shows_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Queue, "_on_queue_feeder_error", Queue._on_queue_feeder_error)
    start_worker(0)
    error = EOFError("the connection ended")
    sys.excepthook(EOFError, error, None)
    assert "EOFError: the connection ended" in capsys.readouterr().err
    monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
    sys.excepthook(EOFError, error, None)
    assert capsys.readouterr().err == ""


def test_worker_that_cannot_send_a_batch_ends() -> None:
    """Its queue sends in a thread, whose error would be printed and forgotten."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        start_worker(0)
        queue.put(lambda: None)  # cannot be pickled
        time.sleep(60)

    worker = context.Process(target=work)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 1
