import subprocess
import sys

import pytest
import torch

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
