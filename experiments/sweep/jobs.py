"""A multirun: each job alone in a process, a failure reported and passed over, and at the end a summary of all."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from filelock import BaseFileLock, FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from experiments.errors import UserError
from experiments.files import read_json, write_json
from experiments.sweep import slurm

log = logging.getLogger(__name__)
RUN = Path(__file__).parents[2] / "run.py"


class Sweep(Callback):
    """Writes down what a sweep is to do, and at its end, whatever that is, what came of it."""

    under_way: "Sweep | None" = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folder, self.config = Path(config.hydra.sweep.dir), config
        self.slurm = on_slurm(config)
        if self.slurm:
            try:
                why = slurm.refusal(config.hydra.launcher)
            except OmegaConfBaseException as error:  # Hydra would warn of it and go on
                why = f"{str(error).splitlines()[0]} See conf/launcher/slurm.yaml."
            if why:
                stop(why)
            slurm.watch_the_queue()
        self.folder.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.folder / "sweep.json", {"command": sys.argv, "started": started, "jobs": planned(config)})
        Sweep.under_way = self

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            failed = self.end()
        except Exception:  # Hydra would warn of it and end well
            traceback.print_exc()
            stop(f"The jobs have ended, but not the report on them: python -m experiments.report {self.folder}")
        if failed:
            sys.exit(1)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if on_slurm(config):
            stop(
                "launcher=slurm sends the jobs of a sweep: add -m, for a single run too. Without it, it would run here."
            )

    def end(self, wait: bool = True) -> int:
        """Reports what came of the jobs, and returns how many did not finish.

        Args:
            wait: for jobs of Slurm that are still to come.
        """
        from experiments.sweep.summary import sum_up  # torch, wandb and matplotlib take seconds to import

        Sweep.under_way = None
        if self.slurm and wait:
            slurm.wait_for_the_rest(self.folder)
        return sum_up(self.folder, self.config)


def on_slurm(config: Any) -> bool:
    return config.hydra.launcher._target_.endswith("SlurmLauncher")


def planned(config: DictConfig) -> list[dict[str, Any]] | None:
    """The overrides of every job, in order; None where a search chooses them as it goes."""
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    always = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*always, *config.hydra.overrides.task])
    return [{"overrides": job} for job in BasicSweeper.split_arguments(overrides, None)[0]]


def stop(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(message)}", highlight=False)
    sys.exit(1)


# A job


def is_sweep_job() -> bool:
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def belongs_in_a_process_of_its_own() -> bool:
    """Where Hydra runs the jobs of a sweep in processes that other jobs use too: everywhere but on Slurm."""
    hydra = HydraConfig.get()
    return hydra.mode is RunMode.MULTIRUN and not on_slurm(HydraConfig.instance().cfg)


def run_alone(cfg: DictConfig) -> float:
    """Runs this job as `python run.py <its overrides>`, so that it leaves nothing to the next, not even by a crash.

    Returns:
        What the sweep may optimise: validation mIoU in percent; NaN where the job failed.
    """
    hydra = HydraConfig.get()
    folder, number = Path(hydra.runtime.output_dir), hydra.job.num
    given = {"hydra.run.dir": folder, "hydra.sweep.dir": hydra.sweep.dir, "hydra.job.num": number, "hydra.mode": "RUN"}
    command = [sys.executable, str(RUN), *config_flags(), *hydra.overrides.task]
    command += [f"{key}={quoted(str(value))}" for key, value in given.items()]
    in_turn = hydra.launcher._target_.endswith("BasicLauncher")
    with ExitStack() as stack:
        free = {} if in_turn else stack.enter_context(gpus_of_its_own(cfg.trainer.accelerator, cfg.trainer.devices))
        output = None if in_turn else stack.enter_context((folder / "output.txt").open("a"))
        done = subprocess.run(command, env=os.environ | free, stdout=output, stderr=output, check=False)
    if done.returncode or not (folder / "results.json").exists():
        if not (folder / "failure.json").exists():
            write_json(folder / "failure.json", {"error": broken_off(done.returncode), "traceback": None})
        log.error("Job %d failed: %s", number, read_json(folder / "failure.json")["error"])
        return passed_over(read_json(folder / "failure.json")["error"])
    record = read_json(folder / "results.json")
    if not in_turn and "test" in record:
        log.info("Job %d has finished: mIoU %.1f, %s", number, record["test"]["miou"], folder)
    score = record.get("checkpoint", {}).get("val_miou")
    return float("nan") if score is None else score


def passed_over(error: str) -> float:
    """What a failed job returns: NaN; to a search, which would take that for a score, the error."""
    if HydraConfig.get().sweeper._target_.endswith("BasicSweeper"):
        return float("nan")
    raise UserError(error)


def config_flags() -> list[str]:
    """The flags that chose another config than this project's own."""
    hydra = HydraConfig.get()
    added = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    return [*added, f"--config-name={hydra.job.config_name}"]


def quoted(value: str) -> str:
    """As a value in Hydra's grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def broken_off(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"The process was ended by {name}" + (" (out of memory?)." if name == "SIGKILL" else ".")
    return f"The process ended with exit code {code} and left no results."


def end_with_parent() -> None:
    """Has the kernel end this process when the one that started it is gone, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


@contextmanager
def gpus_of_its_own(accelerator: str, devices: Any) -> Iterator[dict[str, str]]:
    """The environment that shows a job only GPUs which no other job on this machine has; waits until there are."""
    if accelerator == "cpu":
        yield {}
        return
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    count = number_of(devices, len(every))
    if not 0 < count <= len(every):
        yield {}  # the job says what is wrong
        return
    locks = Path(tempfile.gettempdir()) / f"pmnet-gpus-{os.getuid()}"
    with claimed(every, count, locks) as chosen:
        yield {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def number_of(devices: Any, every: int) -> int:
    """How many devices the Trainer takes `devices` for: a number, "auto", or a list of which."""
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if devices in (-1, "auto"):
        return every
    return devices if isinstance(devices, int) else len(devices.split(",") if isinstance(devices, str) else devices)


@contextmanager
def claimed(names: Sequence[str], count: int, locks: Path) -> Iterator[list[str]]:
    """Holds `count` of the names by lock files. One claims at a time, lest two wait for what the other has."""
    locks.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        chosen: list[str] = []
        with FileLock(locks / "choosing.lock"):
            while len(chosen) < count:
                for name in names:
                    lock = FileLock(locks / f"{name}.lock")
                    if len(chosen) < count and name not in chosen and taken(lock):
                        stack.callback(lock.release)
                        chosen.append(name)
                time.sleep(0.05)
        yield chosen


def taken(lock: BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
