"""One bad input to one reader, and what must not happen: other errors, hangs, much memory, escapes."""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from datamodules.errors import DatasetError
from experiments.errors import UserError
from pmnet.errors import PMNetError
from tests.fuzz.targets import TARGETS

KNOWN = (PMNetError, DatasetError, UserError, HydraException, OmegaConfBaseException)
SECONDS, PATIENCE = 5, 30  # processor time of one input; time after which its process is killed
MEMORY, FENCE = 1 << 30, 6 << 30  # resident memory; address space, so that a fault does not take the machine down
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pty.spawn")
CHANGES = ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.chmod", "os.truncate", "shutil.move")


@dataclass(frozen=True)
class Outcome:
    """What came of one input.

    Attributes:
        kind: "read", "refused" with a known error, or "failed".
        detail: the message, or what went wrong.
    """

    kind: str
    detail: str = ""


class Watch:
    """Notes writes outside a folder, processes and connections, with Python's audit hook; it cannot be removed."""

    def __init__(self) -> None:
        self.place: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event in STARTS:
            self.seen.append(f"{event} {arguments[0]!r:.80}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITES:
            self.check(event, arguments[0])
        elif event in CHANGES:
            for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
                self.check(event, path)

    def check(self, event: str, path: Any) -> None:
        with suppress(TypeError, ValueError):
            path = os.path.realpath(os.fsdecode(path))
            if not path.startswith(f"{self.place}/") and path not in (str(self.place), os.devnull):
                self.seen.append(f"{event} {path}")


def bad_input(name: str, seed: int, number: int) -> bytes:
    """The same arguments always give the same bytes."""
    return TARGETS[name].make(np.random.default_rng([seed, zlib.crc32(name.encode()), number]))


def attempt(name: str, content: bytes, watch: Watch) -> Outcome:
    """Feeds an input to a reader in this process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    before, start = reset_peak(), time.process_time()
    watch.place, watch.seen = folder, []
    try:
        outcome = called(name, content, folder)
    finally:
        watch.place = None
        shutil.rmtree(folder, ignore_errors=True)
    seconds, memory = time.process_time() - start, peak() - before
    if watch.seen:
        return Outcome("failed", f"escape: {watch.seen[0]}")
    if memory > MEMORY:  # named first, as filling memory takes time too: on a slow machine, more than a hang
        return Outcome("failed", f"memory: {memory / 1e6:,.0f} MB ({outcome.kind})")
    if seconds > SECONDS:
        return Outcome("failed", f"hang: {seconds:.1f} s of processor time ({outcome.kind})")
    return outcome


def called(name: str, content: bytes, folder: Path) -> Outcome:
    try:
        with warnings.catch_warnings(action="ignore"):
            TARGETS[name].read(content, folder)
    except KNOWN as error:
        text = str(error)
        return Outcome("refused", text) if text.strip() else Outcome("failed", f"no message: {type(error).__name__}")
    except Exception as error:
        at, line = error.__traceback__, 0
        where = "?"
        while at:  # the innermost line of the project itself
            file = Path(at.tb_frame.f_code.co_filename)
            if file.is_relative_to(Path(__file__).parents[2]):
                where, line = file.name, at.tb_lineno
            at = at.tb_next
        return Outcome("failed", f"error: {type(error).__name__} at {where}:{line}: {error}"[:300])
    return Outcome("read")


def reset_peak() -> int:
    """Resident memory in bytes; `peak` measures from here."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak() -> int:
    """Highest resident memory in bytes since `reset_peak`; since the start of the process where that is unavailable."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def worker(name: str, inputs: Sequence[tuple[int, bytes | int]], pipe: Connection) -> None:
    """Feeds inputs in a child process: (number, its bytes or the seed that they come from)."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # the decoders' warnings
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + FENCE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch()
    for number, given in inputs:
        content = given if isinstance(given, bytes) else bad_input(name, given, number)
        pipe.send(number)
        pipe.send(attempt(name, content, watch))
    pipe.send(None)


def outcomes(name: str, inputs: Sequence[tuple[int, bytes | int]]) -> Iterator[tuple[int, Outcome]]:
    """Feeds inputs to a reader in child processes. One that crashes or hangs is replaced.

    Args:
        name: the reader.
        inputs: pairs of a number and the bytes, or a seed to make them from.

    Returns:
        The number and the outcome of each input.
    """
    context = multiprocessing.get_context("fork")
    inputs = list(inputs)
    while inputs:
        ours, theirs = context.Pipe()
        child = context.Process(target=worker, args=(name, inputs, theirs), daemon=True)
        child.start()
        theirs.close()
        current = inputs[0][0]
        try:
            while (told := receive(ours)) is not None:
                if isinstance(told, int):
                    current = told
                else:
                    yield current, told
                    inputs = inputs[1:]
            inputs = []
        except TimeoutError:
            yield current, Outcome("failed", f"hang: more than {PATIENCE} s")
            inputs = inputs[1:]
        except EOFError:
            child.join()
            yield current, Outcome("failed", f"crash: the process ended with {child.exitcode}")
            inputs = inputs[1:]
        finally:
            child.kill()
            child.join()
            ours.close()


def receive(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE):
        raise TimeoutError
    return pipe.recv()
