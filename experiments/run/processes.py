"""Which process of a job this one is, before the Trainer has made them a group."""

import os

from lightning.pytorch.utilities import rank_zero_only


def is_first() -> bool:
    """Whether this is the process that writes files; the rank that the launcher gave it says so."""
    return getattr(rank_zero_only, "rank", 0) == 0


def processes_of_slurm() -> int:
    """How many processes Slurm started for this step of a job; 0 where it started none."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 0)) if "SLURM_STEP_ID" in os.environ else 0
