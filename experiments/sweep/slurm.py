"""What a sweep asks Slurm: whether it takes the jobs, and what has become of them."""

import shutil
import subprocess
from pathlib import Path

from omegaconf import DictConfig
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

SBATCH = ["partition", "account", "qos", "constraint", "exclude", "gres", "nodes", "gpus_per_node", "gpus_per_task"]
SBATCH += ["cpus_per_task", "cpus_per_gpu", "mem_per_gpu", "mem_per_cpu"]
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def refusal(launcher: DictConfig) -> str | None:
    """Why Slurm would not take the jobs, as sbatch says of one like them without queueing it."""
    if not shutil.which("sbatch"):
        return (
            "launcher=slurm needs Slurm, and there is no sbatch on PATH. Start the sweep on a login node of the "
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
        f"Slurm does not take these jobs: {said} ({' '.join(flags)}). The partitions here: "
        f"{', '.join(partitions) or 'none was named'}. See launcher.partition, launcher.devices, launcher.time and "
        "the others in conf/launcher/slurm.yaml."
    )


class QueueWatcher(SlurmInfoWatcher):
    """Asks the queue for the states of jobs, where submitit asks the accounting, which not every cluster has."""

    def _make_command(self) -> list[str] | None:
        waiting = self._registered - self._finished
        return ["squeue", "--me", "--noheader", "--states=all", "--array", "--format=%i|%T|%N"] if waiting else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """State by job id; a job that the queue has forgotten is over."""
        lines = string if isinstance(string, str) else string.decode()
        known = super().read_info(f"JobID|State|NodeList\n{lines}")
        for info in known.values():  # CONFIGURING, SUSPENDED, ...: submitit takes what it does not know for the end
            if info["State"] not in OVER | {"PENDING"}:
                info["State"] = "RUNNING"
        return {job: {"State": "FORGOTTEN"} for job in self._registered} | known


def watch_the_queue() -> None:
    SlurmJob.watcher = QueueWatcher(delay_s=10)


def wait_for_the_rest(folder: Path) -> None:
    """Waits for the jobs that are still queued or running after another broke off (out of memory, say)."""
    for job in sorted((folder / ".submitit").glob("*_*")):
        if job.is_dir():
            SlurmJob(folder=job, job_id=job.name).wait()
