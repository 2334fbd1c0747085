"""Sweeps (multiruns): each job in its own process, a failure stops no other job, a report at the end."""

import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NoReturn

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
from experiments.sweep.warm import RUN, Fork

log = logging.getLogger(__name__)
PARENT = "PMNET_PARENT"  # variable of the environment: the process that started this one
PATIENCE = 8.0  # seconds for a job to end: a little more than it gives itself
HEARD = 0.25  # seconds for a job to take a Ctrl-C, which the terminal sends to it too, before it is asked again


class Sweep(Callback):
    """Writes the plan of a sweep when it starts and a report when it ends, even if it is interrupted."""

    under_way: "Sweep | None" = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folder, self.config = Path(config.hydra.sweep.dir), config
        self.slurm = on_slurm(config)
        if self.slurm:
            try:
                why = slurm.refusal(config.hydra.launcher)
            except OmegaConfBaseException as error:  # Hydra would only warn and continue
                why = f"{str(error).splitlines()[0]} See conf/launcher/slurm.yaml."
            if why:
                stop(why)
            slurm.watch_the_queue()
        self.folder.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.folder / "sweep.json", {"command": sys.argv, "started": started, "jobs": planned(config)})
        Sweep.under_way = self
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on there is something to sum up

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            failed = self.end()
        except Exception:  # Hydra would only warn and exit with code 0
            traceback.print_exc()
            stop(f"The jobs have ended, but the report failed. Try again: python -m experiments.report {self.folder}")
        if failed:
            sys.exit(1)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if on_slurm(config):
            stop("launcher=slurm submits the jobs of a sweep. Add -m, even for a single run.")

    def end(self, wait: bool = True) -> int:
        """Reports on the jobs and returns how many did not finish.

        Args:
            wait: whether to wait for Slurm jobs that are still queued or running.
        """
        from experiments.sweep.summary import sum_up  # torch, wandb and matplotlib take seconds to import

        Sweep.under_way = None
        if self.slurm and wait:
            slurm.wait_for_jobs(self.folder)
        return sum_up(self.folder, self.config)


def on_slurm(config: Any) -> bool:
    return config.hydra.launcher._target_.endswith("SlurmLauncher")


def planned(config: DictConfig) -> list[dict[str, Any]] | None:
    """The overrides of every job, in order; None if a search chooses them while it runs."""
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


def needs_own_process() -> bool:
    """Whether this is a job of a sweep that Hydra runs in a process shared by several jobs: not so on Slurm."""
    hydra = HydraConfig.get()
    return hydra.mode is RunMode.MULTIRUN and not on_slurm(HydraConfig.instance().cfg)


def run_alone(cfg: DictConfig) -> float:
    """Runs this job as `python run.py <its overrides>`, so that nothing, not even a crash, affects the next job.

    Returns:
        The score that a search optimises: validation mIoU in percent; NaN if the job failed.
    """
    hydra = HydraConfig.get()
    folder, number = Path(hydra.runtime.output_dir), hydra.job.num
    given = {"hydra.run.dir": folder, "hydra.sweep.dir": hydra.sweep.dir, "hydra.job.num": number, "hydra.mode": "RUN"}
    arguments = [*config_flags(), *hydra.overrides.task, *(f"{key}={quoted(value)}" for key, value in given.items())]
    in_turn = hydra.launcher._target_.endswith("BasicLauncher")
    with ExitStack() as stack:
        free = {} if in_turn else stack.enter_context(reserved_gpus(cfg.trainer.accelerator, cfg.trainer.devices))
        output = None if in_turn else stack.enter_context((folder / "output.txt").open("a"))
        env = os.environ | free | {PARENT: str(os.getpid())}
        code = exit_code(started(arguments, env, output, warm=on_cpu(cfg.trainer.accelerator)))
    if code or not (folder / "results.json").exists():
        if not (folder / "failure.json").exists():
            write_json(folder / "failure.json", {"error": exit_message(code), "traceback": None})
        log.error("Job %d failed: %s", number, read_json(folder / "failure.json")["error"])
        return failed_score(read_json(folder / "failure.json")["error"])
    record = read_json(folder / "results.json")
    if not in_turn and "test" in record:
        log.info("Job %d finished: mIoU %.1f, %s", number, record["test"]["miou"], folder)
    score = record.get("checkpoint", {}).get("val_miou")
    return float("nan") if score is None else score


def on_cpu(accelerator: str) -> bool:
    import torch

    return accelerator == "cpu" or not torch.cuda.is_available()


def started(
    arguments: list[str], env: dict[str, str], output: IO[str] | None, warm: bool
) -> subprocess.Popen[bytes] | Fork:
    """`python run.py <arguments>`: warm as a fork of this process, otherwise as a new one, which CUDA needs."""
    if not warm:
        return subprocess.Popen([sys.executable, str(RUN), *arguments], env=env, stdout=output, stderr=output)
    job = Fork(arguments, env, output)
    job.start()
    return job


def exit_code(job: subprocess.Popen[bytes] | Fork) -> int:
    """Waits for a job; when the sweep is interrupted, the job gets the time to end in order."""
    try:
        return job.wait()
    except BaseException:
        try:
            with suppress(subprocess.TimeoutExpired):
                job.wait(HEARD)
            job.terminate()
            with suppress(subprocess.TimeoutExpired):
                job.wait(PATIENCE)
        finally:
            job.kill()
            job.wait()
        raise


def failed_score(error: str) -> float:
    """NaN for a failed job. A search would take NaN for a score, so there it raises UserError instead."""
    if HydraConfig.get().sweeper._target_.endswith("BasicSweeper"):
        return float("nan")
    raise UserError(error)


def config_flags() -> list[str]:
    """The flags that select the config, as the sweep was given them."""
    hydra = HydraConfig.get()
    added = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    return [*added, f"--config-name={hydra.job.config_name}"]


def quoted(value: object) -> str:
    """Quoted for Hydra's override grammar, in which it means itself, with quotes, backslashes and `${` in it.

    Example:
        >>> print(quoted("it's ${x}"))
        'it\\'s \\${x}'
    """
    # Backslashes count only before an interpolation (OmegaConf), before a quote and at the end (Hydra).
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    literal = re.sub(r"(\\*)'", r"\1\1\\'", literal)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", literal) + "'"


def exit_message(code: int) -> str:
    """What happened to a process that ended without a message of its own."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"The process was killed by {name}" + (" (out of memory?)." if name == "SIGKILL" else ".")
    return f"The process exited with code {code} and wrote no results."


def end_with_parent() -> None:
    """Makes the kernel end this process when the process of PMNet that started it ends, even if it is killed (Linux).

    A sweep starts jobs, and a job the other processes of its training. What has ended before this call can no longer
    be noticed by the kernel, so a parent leaves its number to those that it starts, until its run has ended. Call it
    before the imports that take seconds.
    """
    if parent := os.environ.get(PARENT):
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
        if parent != str(os.getppid()):
            sys.exit(128 + signal.SIGTERM)


@contextmanager
def reserved_gpus(accelerator: str, devices: Any) -> Iterator[dict[str, str]]:
    """Reserves GPUs for a job, waiting until enough are free; yields the environment that hides all others from it."""
    if accelerator == "cpu":
        yield {}
        return
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    count = number_of(devices, len(every))
    if not 0 < count <= len(every):
        yield {}  # the Trainer will report the error
        return
    locks = Path(tempfile.gettempdir()) / f"pmnet-gpus-{os.getuid()}"
    with claimed(every, count, locks) as chosen:
        yield {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def number_of(devices: Any, every: int) -> int:
    """How many devices the Trainer uses for `devices`: a number, "auto" or -1 (every one), or a list of indices."""
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if devices in (-1, "auto"):
        return every
    return devices if isinstance(devices, int) else len(devices.split(",") if isinstance(devices, str) else devices)


@contextmanager
def claimed(names: Sequence[str], count: int, locks: Path) -> Iterator[list[str]]:
    """Holds lock files for `count` of the names. Processes choose one after the other, which prevents deadlocks."""
    locks.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        chosen: list[str] = []
        with FileLock(locks / "choosing.lock"):
            while len(chosen) < count:
                for name in names:
                    lock = FileLock(locks / f"{name}.lock")
                    if len(chosen) < count and name not in chosen and acquired(lock):
                        stack.callback(lock.release)
                        chosen.append(name)
                time.sleep(0.05)
        yield chosen


def acquired(lock: BaseFileLock) -> bool:
    """Acquires the lock without waiting; False if another process holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
