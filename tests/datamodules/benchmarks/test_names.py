"""`Names`: lists of image names as one block of memory, which worker processes share."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.benchmarks.coco import CocoDataset
from tests.conftest import ROOT


def test_names_are_a_list_of_strings(lists):
    names = CocoDataset("nowhere", lists).images_of(0, "test")
    some = random.Random(0).sample(range(len(names)), 20)
    assert all(names[i] == list(names)[i] for i in some)
    assert list(names[2:4]) == [names[2], names[3]]


PRIVATE_MEMORY = """
import gc, sys
from datamodules.episodes.sampler import Names

def private() -> int:
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

names = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in range(250_000)]
names = Names(names) if sys.argv[1] == "Names" else names
gc.collect()
import os
if os.fork() == 0:  # as a worker is started
    before = private()
    for i in range(0, len(names), 3):
        name = names[i]
    print(private() - before, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_a_worker_that_reads_coco_sized_lists_copies_nothing():
    """Kilobytes that a forked process comes to own, beside a list of strings."""

    def grown(kind: str) -> int:
        words = [sys.executable, "-c", PRIVATE_MEMORY, kind]
        return int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert grown("Names") < 1000 < 10_000 < grown("list")
