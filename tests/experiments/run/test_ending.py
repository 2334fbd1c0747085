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
