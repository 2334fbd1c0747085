"""This process's place among the processes of its job, known before the Trainer connects them."""

import os

from lightning.pytorch.utilities import rank_zero_only


def is_first() -> bool:
    """Whether this is the process that writes files, by the rank that the launcher assigned."""
    return rank() == 0


def rank() -> int:
    """The number that the launcher assigned to this process, from 0."""
    return getattr(rank_zero_only, "rank", 0) or 0


def processes_of_slurm() -> int:
    """How many processes Slurm started for this job step; 0 outside Slurm."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 0)) if "SLURM_STEP_ID" in os.environ else 0
