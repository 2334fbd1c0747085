"""Imports what a run needs, which takes seconds: `--help` need not wait for it."""

import atexit
import gc
from collections.abc import Callable
from functools import cache

from omegaconf import DictConfig


@cache
def job() -> Callable[[DictConfig], float]:
    """`run_job`, imported while the garbage collector rests: it would look through ever more modules, for nothing."""
    gc.disable()
    try:
        from experiments.run.job import run_job
    finally:
        gc.enable()
    gc.freeze()  # nor need it look through them later; a job that is a fork shares their memory
    atexit.register(gc.unfreeze)  # else they outlive Python, and a library of PyTorch's prints that they leaked
    return run_job
