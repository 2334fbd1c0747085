"""Sweeps: jobs, shared trainings, Slurm, and the summary at the end."""

from experiments.sweep.jobs import Sweep

__all__ = ["Sweep"]
