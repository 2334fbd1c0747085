"""Many runs: their jobs, the trainings they share, clusters, and the summary at the end."""

from experiments.sweep.jobs import Sweep

__all__ = ["Sweep"]
