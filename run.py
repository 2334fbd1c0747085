"""The only entry. `python run.py --help` shows the choices, README.md the commands to begin with."""

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until a run or a sweep takes the signals itself, Ctrl-C ends the process without a word. As an exception it would
    # be a traceback from the middle of an import, and some imports swallow it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.run.start import job
from experiments.sweep import Sweep
from experiments.sweep.jobs import end_with_parent

TRACES = "HYDRA_FULL_ERROR"  # variable of the environment: 1 if a user wants the traceback of a wrong setting
WANTED = os.environ.get(TRACES, "0")


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float:
    os.environ[TRACES] = WANTED
    return job()(cfg)


if __name__ == "__main__":
    wait = True
    Sweep.under_way = None  # a job that is a fork of its sweep has the sweep's
    end_with_parent()
    os.environ[TRACES] = "1"  # until a run begins, Hydra passes on what is wrong, to be told here
    try:
        main()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        if WANTED == "1":
            raise
        more = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        sys.exit(f"Error: {str(error).removeprefix('Error: ')}{more}")  # our own have it where Hydra tells them
    except KeyboardInterrupt:  # a sweep's: a run takes the signal itself
        wait = False
        sys.exit(130)
    finally:
        if Sweep.under_way:  # broken off: what its jobs have done is summed up all the same
            Sweep.under_way.end(wait)
        if not wait:
            print("Interrupted. Run the same command again: it takes over the finished trainings.", file=sys.stderr)
