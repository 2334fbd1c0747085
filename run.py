"""The only entry. `python run.py --help` shows the choices, README.md the commands to begin with."""

import sys

import hydra
from omegaconf import DictConfig

from experiments.sweep import Sweep


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float:
    from experiments.run.job import run_job  # torch takes seconds to import; `--help` need not wait for it

    return run_job(cfg)


if __name__ == "__main__":
    try:
        main()
    finally:
        if Sweep.under_way:  # broken off: what its jobs have done is summed up all the same
            Sweep.under_way.end(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt))
