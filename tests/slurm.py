"""A real Slurm on this machine, for the tests: two nodes, started and stopped by the tests."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=5
MinJobAge=600
SchedulerParameters=sched_min_interval=500000,batch_sched_delay=1
NodeName=first NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory={memory}
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory={memory}
PartitionName=main Nodes=first,second Default=YES State=UP
"""


def why_not() -> str | None:
    """Why a Slurm cannot be started here; None where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]
    if missing:
        return f"Slurm is not installed here: no {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return None if os.getuid() == 0 else "Slurm's daemons are started as root"


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Starts munge (unless it runs) and Slurm; SLURM_CONF points to it meanwhile."""
    start_munge()
    (folder / "state").mkdir(parents=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 3 // 4
    host, cpus = socket.gethostname().split(".")[0], max(2, os.cpu_count() or 2)
    config = CONFIG.format(host=host, folder=folder, cpus=cpus, memory=memory, ports=[free_port() for _ in range(3)])
    (folder / "slurm.conf").write_text(config)
    here = {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}  # no one resolves the nodes' names
    os.environ.update(here)
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in ("first", "second"))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [subprocess.Popen(command, **quiet) for command in commands]
    try:
        wait_until(lambda: output("sinfo", "-h", "-o", "%D %T") == "2 idle", "two nodes are idle", folder)
        yield
    finally:
        output("scancel", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        for name in here:
            del os.environ[name]


def start_munge() -> None:
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
    run = Path("/run/munge")
    run.mkdir(exist_ok=True)
    shutil.chown(run, "munge", "munge")
    run.chmod(0o755)
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()


def wait_until(condition, what: str, folder: Path, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        if time.time() > deadline:
            logs = "\n".join(p.read_text()[-2000:] for p in folder.glob("slurm*.log"))
            raise TimeoutError(f"waited {seconds} s in vain until {what}\n{logs}")
        time.sleep(0.2)
