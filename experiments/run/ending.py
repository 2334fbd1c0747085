"""How a job ends when it is asked to (docker stop, kill, Ctrl-C, a closed terminal): soon, with nothing left behind.

A signal raises `Asked` wherever the main thread is. Where that does not end the job, as the main thread waits inside a
library or another process, a watchdog does after `GRACE` seconds. Under Slurm, `sweep/preemption.py` takes the signals.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import lightning as L
import psutil
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 7.0  # seconds for an orderly end


class Asked(SIGTERMException):
    """Raised by a signal that asks the process to end; the Trainer lets it pass.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = signal.Signals(number)


def ask(number: int, frame: FrameType | None) -> None:
    """The signals' handler: raises `Asked` once; further signals wait for the end that is under way."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Asked(number)


@contextmanager
def soon() -> Iterator[None]:
    """Within it, a signal ends the process and all that it started, within `GRACE` seconds and a little.

    A signal that the process was started to ignore, as `nohup` ignores SIGHUP, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as by nohup
    before = {number: signal.signal(number, ask) for number in taken}
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        os.close(writer)  # ends the watchdog, unless it was asked
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(reader: int) -> None:
    """The watchdog: waits for a signal's number, and some time later ends what is still there."""
    while number := os.read(reader, 1):
        if number[0] in SIGNALS:
            threading.Event().wait(GRACE)
            end_children()
            os._exit(128 + number[0])
    os.close(reader)


def end_children(but: str | None = None) -> None:
    """Kills every process that this one started: workers ignore SIGTERM, and Python would wait for them at its end.

    Args:
        but: what the names of those contain that end by themselves.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error for each worker that is killed here
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if but is None or but not in child.name():
                child.kill()


class EndSoon(L.Callback):
    """Puts `ask` back in place of the Trainer's own handler, which waits for the end of a batch."""

    def on_train_start(self, *_: Any) -> None:
        take_back()

    def on_validation_start(self, *_: Any) -> None:
        take_back()

    def on_test_start(self, *_: Any) -> None:
        take_back()


def take_back() -> None:
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, ask)
