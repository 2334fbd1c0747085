"""Failing jobs: one message, failure.json, and an exit code other than 0."""

import errno
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.markup import escape

from datamodules.errors import DatasetError
from experiments import loggers
from experiments.errors import UserError, explain
from experiments.files import read_json, write_json
from experiments.run import together
from experiments.run.ending import end_children, soon
from experiments.run.processes import is_first, processes_of_slurm, rank
from experiments.sweep import jobs, trainings
from experiments.sweep.preemption import Requeue, leave_after_error
from pmnet.errors import PMNetError

log = logging.getLogger(__name__)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_MEMORY = ("Cannot allocate memory", "can't allocate memory", "can't start new thread", "MemoryError")
EXPECTED = (PMNetError, DatasetError, UserError, MisconfigurationException)


@dataclass
class Outcome:
    """What a job returns to a sweep: validation mIoU in percent, NaN if it failed."""

    score: float = float("nan")


@contextmanager
def explained(folder: Path) -> Iterator[Outcome]:
    """Runs the block; an error that the user can fix becomes one message and exit code 1.

    The failure is written to `failure.json`. In a sweep it does not stop the other jobs.
    """
    accept_any_character()
    logging.raiseExceptions = False  # on a full disk, each line of run.log would be a traceback
    os.environ[jobs.PARENT] = str(os.getpid())
    outcome, code = Outcome(), 1
    try:
        with nullcontext() if Requeue.wanted() else soon():  # Slurm has signals of its own
            if is_first():
                for name in ("failure.json", "results.json"):  # of an earlier run in this folder
                    (folder / name).unlink(missing_ok=True)
            yield outcome
            code = 0
    except SIGTERMException as ended:
        name = signal.Signals(getattr(ended, "number", signal.SIGTERM)).name
        write_failure(folder, f"The process was terminated ({name}).")
        log.info("Terminated (%s). Run the same command again to resume after the last complete epoch.", name)
        sys.exit(128 + signal.Signals[name])
    except Exception as error:
        message = as_message(error)
        if Requeue.was_asked():  # an error caused by the termination is not a failure of the job
            log.error("While Slurm was ending this job: %s", message or repr(error))
            leave_after_error()
        if lost_another(error) and said_elsewhere(folder):
            sys.exit(1)
        if message or not (folder / "failure.json").exists():  # otherwise another process of this job failed first
            write_failure(folder, message or repr(error), traceback.format_exc())
        if message is None:
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                raise
            traceback.print_exc()
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]Error:[/] {escape(message or repr(error))}", highlight=False
        )
        if lost_another(error):
            for process in together.stopped().values():  # would stay, and whoever waits for the run would wait on
                process.kill()
        if HydraConfig.get().mode is RunMode.MULTIRUN and processes_of_slurm() < 2:  # else exit: srun ends the others
            outcome.score = jobs.failed_score(message or repr(error))
            return
        sys.exit(1)
    finally:
        os.environ.pop(jobs.PARENT, None)
        loggers.finish(code)
        end_children(but="wandb")  # a stuck worker would stay; W&B's service has been told, and ends with this process


def accept_any_character() -> None:
    """Shows `?` for a character that the output cannot show (ASCII, Latin-1), where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write_failure(folder: Path, error: str, trace: str | None = None) -> None:
    with suppress(OSError):  # a full disk is often the failure itself, and the message has to come all the same
        write_json(folder / "failure.json", {"error": error, "traceback": trace, "attempt": trainings.attempt()})


def as_message(error: Exception) -> str | None:
    """The message of an error that the user can fix; None for any other."""
    cause = (error.__cause__ or error) if isinstance(error, InstantiationException) else error
    if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed: {str(cause).splitlines()[0]}. Use trainer.compile=false."
    if isinstance(cause, EXPECTED):
        return explain(cause)
    said = last_line(explain(cause))
    if isinstance(cause, MemoryError) or any(words in str(cause) for words in NO_MEMORY):
        return (
            f"The memory of a process ran out: {said} Use fewer workers (episodes.workers=0) or smaller "
            "batches (episodes.batch_size, episodes.test_batch_size), or raise its limit (ulimit -v, the container's)."
        )
    if any(words in str(cause) for words in ("shared memory", "killed by signal", "exited unexpectedly")):
        return (
            f"A worker that reads images could not deliver: {said} Give the container more shared memory "
            "(docker run --shm-size=2g), or read in the main process: episodes.workers=0."
        )
    if isinstance(cause, OSError) and cause.errno in NO_ROOM:
        where = cause.filename or "a file of this run"
        return f"Could not write {where}: {cause.strerror}. Free some space, then run the same command again to resume."
    if (isinstance(cause, OSError) and cause.errno == errno.ENOLCK) or "support flock" in str(cause):
        return (
            f"A file could not be locked: {cause}. The disk has no file locks. Set reuse=false, or choose a folder on "
            "another disk with trainings=FOLDER and, if you use it, episodes.cache=FOLDER."
        )
    if lost_another(cause):
        frozen = ", ".join(f"process {rank} (pid {p.pid})" for rank, p in together.stopped().items())
        which = f"It is {frozen}, stopped by a signal. " if frozen else "If it left a message, it is above. "
        return (
            f"Another process of this job has ended or does not answer: {said} {which}Run the same command "
            "again to resume. If it was only slow, set trainer.timeout=1800."
        )
    return None


def lost_another(error: BaseException) -> bool:
    """Whether PyTorch raised it because another process of this job has ended or does not answer."""
    if type(error).__name__ in ("DistStoreError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("gloo", "NCCL", "pair closure"))


def said_elsewhere(folder: Path) -> bool:
    """Whether another process of this job has already said why the job ends: all lose contact at the same time."""
    deadline = time.monotonic() + 1 + rank()
    while time.monotonic() < deadline:
        if read_json(folder / "failure.json").get("attempt") == trainings.attempt():
            return True
        time.sleep(0.1)
    return False


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no more is known"])[-1].rstrip(".") + "."
