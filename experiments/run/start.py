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
    from experiments.run.job import run_job

    gc.freeze()  # nor need it look through them later; a job that is a fork shares their memory
    atexit.register(gc.unfreeze)  # the end of a process does need it
    gc.enable()
    return run_job
