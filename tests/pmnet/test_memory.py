import subprocess
import sys

import psutil
import pytest
import torch

from pmnet.memory import free_memory

FAULTS = """
import resource, sys, torch
from pmnet.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
for _ in range(2):
    torch.ones(25_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="left as it is where there is an accelerator")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again_without_asking_the_system():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=False)
        if done.returncode == 3:
            pytest.skip("another C library than glibc")
        return int(done.stdout)

    assert faults("keep") < faults("not") / 2


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_tightest_control_group(version, tmp_path):
    """The files as Linux writes them; a job may have less than the step of it that this process is in."""
    mount = "sys/fs/cgroup" + ("/memory" if version == 1 else "")
    limit, used, cached = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    unlimited = {1: "9223372036854771712", 2: "max"}[version]
    groups = {"slurm/job_5/step_0": (unlimited, 40, 0), "slurm/job_5": ("1000", 700, 250), "slurm": ("5000", 900, 0)}
    for group, (most, usage, file_pages) in groups.items():
        folder = tmp_path / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 12\n{cached} {file_pages}\n")
    line = {1: "5:cpu,cpuacct:/\n4:memory:/slurm/job_5/step_0\n1:name=systemd:/", 2: "0::/slurm/job_5/step_0"}[version]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    assert free_memory(tmp_path) == 1000 - (700 - 250)
    assert free_memory(tmp_path / "none") == pytest.approx(psutil.virtual_memory().available, rel=0.2)
