"""The only entry. `python run.py --help` shows the choices, README.md the commands to begin with."""

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    from experiments.runner import run_job  # torch takes seconds to import; `--help` need not wait for it

    return run_job(cfg)


if __name__ == "__main__":
    main()
