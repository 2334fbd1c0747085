"""The memory of this process: what it has freed is kept for the next tensor, and how much more it may take."""

import ctypes
import functools
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc reuse large blocks of memory; once a process, and only where there is no accelerator.

    By default it returns every block over 32 MiB to the system as soon as it is freed, and the next one comes as pages
    that the system has to clear and map one after the other when they are first written. An affinity has 21 million
    entries: PMNet then waits for the system about half of its time (`benchmarks/README.md`). The process keeps the
    largest amount of memory it has had, which is up to a quarter larger than without.

    Returns:
        Whether it was done: not with another C library, and not where tensors live on another device.
    """
    if not sys.platform.startswith("linux") or torch.accelerator.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, and of the control groups it is in (Slurm, containers).

    Args:
        root: of the file system.
    """
    free = psutil.virtual_memory().available
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return free
    for _, controllers, path in groups:
        if controllers == "":
            mount, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = root / mount / path.lstrip("/")
        for folder in (group, *group.parents[: len(Path(path).parts) - 1]):  # each limits all that are below it
            with suppress(OSError, ValueError, KeyError):  # "max", or a group that is not seen from in here
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat[cached])
                free = min(free, int((folder / limit).read_text()) - used)
    return free


def free_memory_of(device: torch.device) -> int:
    """Bytes that are free on a GPU, those included that PyTorch holds and does not use."""
    if device.type != "cuda":
        return free_memory()  # shared with the host, as on Apple's processors
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
