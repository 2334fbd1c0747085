"""This process's memory: keep freed blocks for the next tensor, and tell how much is still free."""

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
    """Makes glibc reuse large blocks of memory. Applies to the whole process, and only without an accelerator.

    By default, glibc returns every block over 32 MiB to the system as soon as it is freed. The system then has to clear
    and map each page of the next block when it is first written. An affinity has 21 million entries, so PMNet would
    spend about half of its time waiting for the system (`docs/speed.md`). In return, the process never shrinks,
    and its peak memory is up to a quarter larger.

    Returns:
        True if the setting was applied; False with another C library, or where an accelerator holds the tensors.
    """
    if not sys.platform.startswith("linux") or torch.accelerator.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def free_memory(root: Path = Path("/")) -> int:
    """Memory that this process can still allocate, limited by the machine and by control groups (Slurm, containers).

    Args:
        root: the root of the file system.

    Returns:
        Number of bytes.

    Example:
        >>> free_memory() > 0
        True
    """
    free = psutil.virtual_memory().available
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return free
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            mount, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = root / mount / path.lstrip("/")
        for folder in (group, *group.parents[: len(Path(path).parts) - 1]):  # a group limits all groups below it
            with suppress(OSError, ValueError, KeyError):  # the limit is "max", or a container hides the group
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat[cached])
                free = min(free, int((folder / limit).read_text()) - used)
    return free


def free_memory_of(device: torch.device) -> int:
    """Free memory of a device, including what PyTorch has reserved but does not use.

    Args:
        device: a CUDA device; for any other, the memory is that of the host.

    Returns:
        Number of bytes.
    """
    if device.type != "cuda":
        return free_memory()  # Apple's processors share it between CPU and GPU
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
