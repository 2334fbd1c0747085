"""The only entry. `python run.py --help` shows the choices, README.md the commands to begin with."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until a run or a sweep takes the signals itself, Ctrl-C ends the process without a word. As an exception it would
    # be a traceback from the middle of an import, and some imports swallow it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from experiments.sweep import Sweep
from experiments.sweep.jobs import end_with_parent


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float:
    from experiments.run.job import run_job  # torch takes seconds to import; `--help` need not wait for it

    return run_job(cfg)


if __name__ == "__main__":
    wait = True
    end_with_parent()
    try:
        main()
    except KeyboardInterrupt:  # a sweep's: a run takes the signal itself
        wait = False
        sys.exit(130)
    finally:
        if Sweep.under_way:  # broken off: what its jobs have done is summed up all the same
            Sweep.under_way.end(wait)
        if not wait:
            print("Interrupted. Run the same command again: it takes over the finished trainings.", file=sys.stderr)
