"""A launcher for Slurm that says in one line that Slurm ended a job; submitit says it in a traceback."""

import re
import sys
from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as Submitit


class SlurmLauncher(Submitit):
    """Hydra's launcher for Slurm. The sweep then waits for the jobs that are left, and reports."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from submitit.core.utils import FailedJobError, UncompletedJobError  # takes a while to import

        try:
            return super().launch(job_overrides, initial_job_idx)
        except (FailedJobError, UncompletedJobError) as error:
            job, state = re.search(r"Job (\d\S*)", str(error)), re.search(r"\(state: (\w+)\)", str(error))
            which = f"Job {job[1]}" if job else "A job"
            folder = f"{self.config.hydra.sweep.dir}/.submitit"
            print(
                f"Error: {which} ended without a result{f' ({state[1]})' if state else ''}; what it printed is in "
                f"{folder}. Run the same command again: it takes over the finished trainings.",
                file=sys.stderr,
            )
            sys.exit(1)
