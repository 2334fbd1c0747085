"""Freed memory is kept for the next tensor instead of being given back to the system."""

import ctypes
import functools
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc reuse large blocks of memory; once a process, and only where there is no accelerator.

    By default it returns every block over 32 MiB to the system as soon as it is freed, and the next one comes as pages
    that the system has to clear and map one after the other when they are first written. An affinity has 21 million
    entries: PMNet then waits for the system about half of its time (`benchmarks/README.md`). The process keeps the
    largest amount of memory it has had.

    Returns:
        Whether it was done: not with another C library, and not where tensors live on another device.
    """
    if not sys.platform.startswith("linux") or torch.accelerator.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
