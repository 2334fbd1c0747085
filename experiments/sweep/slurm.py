"""Queries to Slurm: whether it accepts a sweep's jobs, and what state they are in."""

import shutil
import subprocess
from pathlib import Path

from omegaconf import DictConfig
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

SBATCH = ["partition", "account", "qos", "constraint", "exclude", "gres", "nodes", "gpus_per_node", "gpus_per_task"]
SBATCH += ["cpus_per_task", "cpus_per_gpu", "mem_per_gpu", "mem_per_cpu"]
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def refusal(launcher: DictConfig) -> str | None:
    """Why Slurm would reject the sweep's jobs, by `sbatch --test-only`; None if it accepts them."""
    if not shutil.which("sbatch"):
        return (
            "launcher=slurm needs Slurm, but there is no sbatch on PATH. Start the sweep on a login node of the "
            "cluster, or choose launcher=basic or launcher=parallel."
        )
    options = {"ntasks-per-node": launcher.tasks_per_node, "time": launcher.timeout_min}
    options |= {k.replace("_", "-"): launcher[k] for k in SBATCH} | dict(launcher.additional_parameters)
    if launcher.mem_gb is not None:
        options["mem"] = f"{launcher.mem_gb}G"
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items() if v is not None]
    tried = subprocess.run(
        ["sbatch", "--test-only", *flags, "--wrap", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode == 0:
        return None
    partitions = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, check=False).stdout.split()
    said = " ".join(tried.stderr.split()).removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
    return (
        f"Slurm rejects these jobs: {said} ({' '.join(flags)}). Available partitions: "
        f"{', '.join(partitions) or 'none listed'}. Change launcher.partition, launcher.devices, launcher.time or "
        "another option of conf/launcher/slurm.yaml."
    )


class QueueWatcher(SlurmInfoWatcher):
    """Reads job states from squeue instead of submitit's sacct, which not every cluster has."""

    def _make_command(self) -> list[str] | None:
        waiting = self._registered - self._finished
        return ["squeue", "--me", "--noheader", "--states=all", "--array", "--format=%i|%T|%N"] if waiting else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Job id -> state. A job that squeue no longer lists has ended."""
        lines = string if isinstance(string, str) else string.decode()
        known = super().read_info(f"JobID|State|NodeList\n{lines}")
        for info in known.values():  # submitit would take unknown states, as CONFIGURING or SUSPENDED, for the end
            if info["State"] not in OVER | {"PENDING"}:
                info["State"] = "RUNNING"
        return {job: {"State": "FORGOTTEN"} for job in self._registered} | known


def watch_the_queue() -> None:
    SlurmJob.watcher = QueueWatcher(delay_s=10)


def wait_for_jobs(folder: Path) -> None:
    """Waits for jobs that are still queued or running, e.g. after another one ran out of memory."""
    for job in sorted((folder / ".submitit").glob("*_*")):
        if job.is_dir():
            SlurmJob(folder=job, job_id=job.name).wait()
