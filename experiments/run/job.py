"""One job: it does with a composed config what its mode says."""

from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.failures import explained
from experiments.run.predicting import predict
from experiments.run.pretraining import pretrain
from experiments.run.training import train_and_test
from experiments.sweep import jobs

MODES: dict[str, Callable[[DictConfig, Path], float]] = {
    "train": train_and_test,
    "test": train_and_test,
    "pretrain": pretrain,
    "predict": predict,
}


def run_job(cfg: DictConfig) -> float:
    """Runs one config in this process, or in its own process if it is a job of a sweep.

    Returns:
        The score that a search optimises: validation mIoU in percent; NaN if the job of a sweep failed.
    """
    if jobs.needs_own_process():
        return jobs.run_alone(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with explained(folder) as outcome:
        if cfg.mode not in MODES:
            raise UserError(f"mode={cfg.mode} is not one of {', '.join(MODES)}.")
        outcome.score = MODES[cfg.mode](cfg, folder)
    return outcome.score
