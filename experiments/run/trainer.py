"""The Trainer of a run: Lightning's, with this project's callbacks and checkpoints."""

import logging
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.run.checkpoints import AtomicCheckpoints
from experiments.run.processes import is_first
from experiments.run.together import KeepPace, PatientDDP
from experiments.sweep.preemption import signal_callbacks
from pmnet.processor import has_bfloat16

log = logging.getLogger(__name__)

OURS = {"cache", "channels_last", "compile", "timeout"}  # keys of conf/trainer that are not Lightning's
BY_DESIGN = (  # Lightning's warnings about choices made here on purpose
    "does not have many workers",
    "LeafSpec",
    "log_every_n_steps",
    "in eval mode",
    "Experiment logs",
    "could not find the monitored",
    "The dirpath has changed",
    "It is recommended to use `self.log",
    "`srun` command is available",
)


def make_trainer(cfg: DictConfig, folder: Path, loggers: list[Logger], callbacks: list[L.Callback]) -> L.Trainer:
    """Raises UserError for options that Lightning refuses, or that do not match what Slurm started."""
    quiet()
    options = {name: value for name, value in cfg.trainer.items() if name not in OURS}
    trainer: partial[L.Trainer] = instantiate(
        options | {"_partial_": True},
        default_root_dir=str(folder),
        logger=loggers,
        callbacks=[RichProgressBar(leave=False), KeepPace(), *callbacks, *signal_callbacks(cfg.trainer, folder)],
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,  # the DataModule distributes the episodes itself
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    try:
        patience = timedelta(seconds=cfg.trainer.timeout)
        StrategyRegistry.register("ddp", PatientDDP, override=True, timeout=patience)
        made = trainer()
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer: {error}") from error
    if made.precision.startswith("bf16") and made.strategy.root_device.type == "cpu" and not has_bfloat16():
        log.warning(
            "This processor does not compute in bfloat16 itself: trainer.precision=%s can take 50 times as long as "
            "trainer.precision=32-true.",
            made.precision,
        )
    return made


def quiet() -> None:
    """Hides warnings about choices made here on purpose, and all log lines of processes other than the first."""
    if not is_first():
        logging.getLogger().setLevel(logging.ERROR)
    for name in ("utilities.rank_zero", "trainer.connectors.signal_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    for words in BY_DESIGN:
        warnings.filterwarnings("ignore", f".*{words}.*")
