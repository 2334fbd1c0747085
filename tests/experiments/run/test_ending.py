"""Signals to a process that is in the middle of something."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

WAITS = """
import signal, sys, time
if {ignored}:
    signal.signal({ignored}, signal.SIG_IGN)
from experiments.run.ending import Asked, soon
try:
    with soon():
        print("ready", flush=True)
        time.sleep(2)
except Asked as asked:
    sys.exit(100 + asked.number)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ignored, code", [(0, 101), (signal.SIGTERM.value, 101), (signal.SIGHUP.value, 0)])
def test_signal_ends_the_process_unless_it_was_started_to_ignore_it(ignored: int, code: int) -> None:
    """As `nohup` does with SIGHUP, which a terminal sends to all its programs when it closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(ignored=ignored)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == code


KILLS = """
import time
from torch.utils.data import DataLoader
from experiments.run.ending import end_children
batches = iter(DataLoader(range(100), num_workers=1))
next(batches)
end_children()
time.sleep(0.5)
print("ended")
"""


@pytest.mark.slow
def test_workers_that_are_killed_at_the_end_are_no_error() -> None:
    """Those whose loader an error still holds: torch hears of their death by a signal, and would raise anywhere."""
    done = subprocess.run([sys.executable, "-c", KILLS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "ended\n", done.stderr
