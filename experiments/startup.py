"""Times what comes before the first batch: imports, the help page, a whole job with a single test episode.

python -m experiments.startup

CPU seconds (user and system) of a process of its own, medians; beside them those of Python and of `import torch`, which
no program that uses PyTorch can go below.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
JOB = (
    "dataset=synthetic backbone=small model=nearest floors=false trainer=cpu episodes.image_size=64 episodes.test=1 "
    "episodes.workers=0 panels=0"
).split()
PROGRAMS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import pmnet": ["-c", "import pmnet"],
    "from pmnet import PMNet": ["-c", "from pmnet import PMNet"],
    "run.py --help": ["run.py", "--help"],
    "a job with one test episode": ["run.py", *JOB],
}


def seconds(arguments: list[str]) -> float:
    """CPU seconds of one process, with its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        where = [f"hydra.run.dir={folder}"] if arguments[-1] in JOB else []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *arguments, *where], cwd=ROOT, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int) -> dict[str, float]:
    """Median CPU seconds of each program; they take turns, and the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds + 1):
        for name, arguments in PROGRAMS.items():
            found[name].append(seconds(arguments))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def table_of(measured: dict[str, float]) -> Table:
    table = Table(title="Start-up, CPU seconds (medians)")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("x import torch", justify="right")
    for name, value in measured.items():
        table.add_row(name, f"{value:.2f}", f"{value / measured['import torch']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default: 5)")
    Console().print(table_of(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
