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
torch.ones(26_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for millions in (25, 24, 23, 22):  # glibc before 2.38 finds aligned memory only in blocks larger than requested
    torch.ones(millions * 1_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="not applied if there is an accelerator")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_reused_without_page_faults():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=False)
        if done.returncode == 3:
            pytest.skip("the C library is not glibc")
        return int(done.stdout)

    assert faults("keep") < faults("not") / 2


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_limited_by_the_tightest_control_group(version, tmp_path):
    """Files as Linux writes them. A Slurm job may have a lower limit than the job step of this process."""
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
