"""One run: train, test, and write down what came out. `run.py` hands the composed config to `run_job`."""

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from datamodules import FewShotDataModule
from datamodules.episodes.pixels import BasePixels, PixelDataModule
from datamodules.errors import DatasetError
from experiments.errors import UserError, explain
from experiments.files import write_json
from experiments.loggers import WandbLogger, make_loggers
from experiments.run import panels, results
from experiments.run.callbacks import EpochLog, StepSeed
from experiments.run.checkpoints import (
    AtomicCheckpoints,
    check_same_training,
    checkpoint_callbacks,
    find_checkpoint,
    put_aside,
    read_checkpoint,
    start_of_training,
)
from experiments.run.processes import is_first, processes_of_slurm
from experiments.sweep import jobs as sweep
from experiments.sweep import trainings
from experiments.sweep.preemption import Requeue, leave_after_error, leave_if_asked, was_requeued
from pmnet.backbones import Backbone
from pmnet.errors import PMNetError
from pmnet.methods.pmnet.network import PMNet
from pmnet.training.module import FewShotModule, TestResult
from pmnet.training.pretrain import BackbonePretraining

log = logging.getLogger(__name__)
OURS = {"cache", "channels_last", "compile"}  # of conf/trainer; the rest is Lightning's
EXPECTED = (PMNetError, DatasetError, UserError, MisconfigurationException)


def run_job(cfg: DictConfig) -> float:
    """Runs one config; an error that the user can mend is one message and exit code 1.

    In a sweep, a job that fails is written down and passed over.

    Returns:
        What a sweep may optimise: validation mIoU in percent; NaN where the job of a sweep failed.
    """
    if sweep.belongs_in_a_process_of_its_own():
        return sweep.run_alone(cfg)
    if sweep.is_sweep_job() or "LOCAL_RANK" in os.environ:
        sweep.end_with_parent()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if is_first():
        for name in ("failure.json", "results.json"):  # an earlier run's in the same folder are not this one's
            (folder / name).unlink(missing_ok=True)
    quiet()
    code = 1
    try:
        score = pretrain(cfg, folder) if cfg.mode == "pretrain" else train_and_test(cfg, folder)
        code = 0
        return score
    except SIGTERMException:
        failure = {"error": "The process was asked to end (SIGTERM).", "traceback": None}
        write_json(folder / "failure.json", failure | {"attempt": trainings.attempt()})
        log.info("Asked to end (SIGTERM). The same command goes on after the last whole epoch.")
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        told = as_told(error)
        if Requeue.was_asked():  # what came of being ended is no failure of the job
            log.error("After Slurm had asked for this job's place: %s", told or repr(error))
            leave_after_error()
        if told or not (folder / "failure.json").exists():  # of another process of this job, which it broke off
            failure = {"error": told or repr(error), "traceback": traceback.format_exc()}
            write_json(folder / "failure.json", failure | {"attempt": trainings.attempt()})
        if told is None:
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                raise
            traceback.print_exc()
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]Error:[/] {escape(told or repr(error))}", highlight=False
        )
        if HydraConfig.get().mode is RunMode.MULTIRUN and processes_of_slurm() < 2:  # else srun is to end the others
            return sweep.passed_over(told or repr(error))
        sys.exit(1)
    finally:
        with suppress(Exception):  # a W&B that is gone has been told of
            wandb.finish(exit_code=code)


def as_told(error: Exception) -> str | None:
    """The message of an error that the user can mend; None for any other."""
    cause = error.__cause__ if isinstance(error, InstantiationException) else error
    if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed: {str(cause).splitlines()[0]}. trainer.compile=false does without it."
    return explain(cause) if isinstance(cause, EXPECTED) else None


def quiet() -> None:
    """Leaves out what Lightning says about choices made here on purpose, and what every process would say again."""
    if not is_first():
        logging.getLogger().setLevel(logging.ERROR)
    for name in ("utilities.rank_zero", "trainer.connectors.signal_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    by_design = (
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
    for message in (f".*{words}.*" for words in by_design):
        warnings.filterwarnings("ignore", message)


def train_and_test(cfg: DictConfig, folder: Path) -> float:
    """Trains on the base classes, tests on the novel ones, leaves the results in `folder`."""
    if cfg.mode not in ("train", "test"):
        raise UserError(f"mode={cfg.mode} is not one of train, test, pretrain.")
    loggers = make_loggers(cfg, folder)  # first, so that W&B knows of a job that fails in what follows
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: FewShotDataModule = instantiate(cfg.episodes)
    if cfg.fold.index == "all" and data.same:
        log.warning("fold=all: every class is trained on, so the classes tested on are not novel.")
    data.setup("test" if cfg.mode == "test" else "fit")
    network: PMNet = instantiate(cfg.model, backbone=instantiate(cfg.backbone))
    record = data.training_record if cfg.mode == "train" else {}
    equip(network.backbone, cfg.trainer)
    module = FewShotModule(
        network,
        data.test_class_ids,
        instantiate(cfg.loss),
        instantiate(cfg.optimizer),
        instantiate(cfg.scheduler),
        record,
        data.val_class_ids,
    )
    trainer = make_trainer(cfg, folder, loggers, [StepSeed(cfg.seed), EpochLog(), *checkpoint_callbacks(folder)])
    if trainer.is_global_zero:
        results.print_setting(cfg, data, network)

    clock = {"start": time.time()}
    untrained = None
    if cfg.mode == "train":
        if cfg.untrained:
            untrained = test(trainer, module, data, None)
        clock["fit"] = time.time()
        best = train(cfg, folder, trainer, module, data)
    else:
        given = find_checkpoint(cfg.ckpt, None, "best")
        if given is None:
            raise UserError("mode=test needs the checkpoint to test: ckpt=/path/to/best.ckpt, or its run's folder.")
        best = given
    checkpoint = read_checkpoint(best)
    module.check_checkpoint(checkpoint)
    if cfg.mode == "test" and not data.same:
        check_trained_on(checkpoint["record"], data)
    if cfg.mode == "train":  # a training that ended before its first validation may stand beside an older best
        check_same_training(best, checkpoint, record)
    clock["test"] = time.time()
    result = test(trainer, module, data, best)
    clock["end"] = time.time()

    if trainer.is_global_zero:
        summary = results.make(cfg, data, network, trainer, result, untrained, best, checkpoint, clock)
        write_json(folder / "results.json", summary)
        results.write_episodes(folder / "episodes.csv", data, result)
        panels.draw(folder / "predictions", data, module.to(trainer.strategy.root_device), result, cfg.panels)
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.log_results(summary, folder)
        results.print_scores(summary, folder)
    return results.val_miou(checkpoint)


def equip(backbone: Backbone, options: DictConfig) -> None:
    """What changes how long a frozen backbone takes, and nothing that it gives."""
    backbone.cache = instantiate(options.cache)
    if not options.channels_last:
        backbone.to(memory_format=torch.contiguous_format)
    backbone.compiled = options.compile


def train(cfg: DictConfig, folder: Path, trainer: L.Trainer, module: FewShotModule, data: FewShotDataModule) -> Path:
    """Trains, or finds the training that another run has finished; returns the checkpoint to test."""
    resume = goes_on(cfg, folder)
    start = start_of_training(cfg.ckpt, folder, resume)
    if start:
        checkpoint = read_checkpoint(start)
        module.check_checkpoint(checkpoint)
        if start.is_relative_to(folder):
            check_same_training(start, checkpoint, module.record)
    store = Path(cfg.trainings) if cfg.reuse and cfg.ckpt is None else None
    shape = trainings.shape(cfg, data, module.network, trainer.world_size)
    with trainings.claim(store, folder, shape, resume, partial(leave_if_asked, trainer)) as trained:
        if trained is None:
            start = start_of_training(cfg.ckpt, folder, resume)  # anew: it may have been taken over just now
            if start:
                log.info("Going on from %s", start)
            trainer.fit(module, data, ckpt_path=start, weights_only=True)
        else:
            log.info("Trained already in %s (reuse=false trains anew)", trained)
    run = trained or folder
    best = find_checkpoint(None, run, "best") or find_checkpoint(None, run, "last")
    if best is None:
        raise UserError("The training ended before its first epoch did: there is no checkpoint to test.")
    if best.stem == "last":
        log.warning("The training ended before its first validation: the last state of the network is tested.")
    return best


def goes_on(cfg: DictConfig, folder: Path) -> bool:
    """Whether what this folder's training left behind is looked at; if not, it is put aside."""
    resume = cfg.resume or was_requeued()
    if not resume and is_first():
        put_aside(folder)
    return resume


def check_trained_on(record: dict[str, Any], data: FewShotDataModule) -> None:
    """Raises UserError where a checkpoint that is tested on another dataset was not trained as the config says."""
    if (record["dataset"], record["base_classes"]) != (data.dataset.name, data.base_classes):
        raise UserError(
            f"The checkpoint was trained on {record['dataset']}, {len(record['base_classes'])} classes "
            f"({', '.join(record['base_classes'][:5])}, ...), but dataset={data.dataset.name} fold={data.fold} "
            f"stands for {len(data.base_classes)} classes. Choose the dataset and the fold that it was trained on."
        )


def make_trainer(cfg: DictConfig, folder: Path, loggers: list[Logger], callbacks: list[L.Callback]) -> L.Trainer:
    if Requeue.wanted():
        check_tasks(cfg)
        callbacks.append(Requeue(folder))
    options = {name: value for name, value in cfg.trainer.items() if name not in OURS}
    trainer: partial[L.Trainer] = instantiate(
        options | {"_partial_": True},
        default_root_dir=str(folder),
        logger=loggers,
        callbacks=[RichProgressBar(leave=False), *callbacks],
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,  # the DataModule shares the episodes out itself
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    try:
        return trainer()
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer: {error}") from error


def check_tasks(cfg: DictConfig) -> None:
    """Raises UserError where Slurm has started another number of processes than the Trainer is to have."""
    for name, variable in (("devices", "SLURM_NTASKS_PER_NODE"), ("num_nodes", "SLURM_NNODES")):
        have, want = os.environ.get(variable), cfg.trainer[name]
        if have is not None and str(want) != have:
            raise UserError(
                f"Slurm gave this job {variable}={have}, but trainer.{name}={want}. They follow from launcher.devices "
                "and launcher.nodes, which are those of the whole sweep: start a sweep for each number of devices."
            )


def test(trainer: L.Trainer, module: FewShotModule, data: FewShotDataModule, ckpt: Path | None) -> TestResult:
    trainer.test(module, data, ckpt_path=ckpt, verbose=False, weights_only=True)
    return module.test_result


def pretrain(cfg: DictConfig, folder: Path) -> float:
    """Trains a backbone on the base classes' pixels; leaves `backbone.safetensors` in `folder`."""
    loggers = make_loggers(cfg, folder)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    dataset, p = instantiate(cfg.dataset), cfg.pretrain
    size = cfg.episodes.image_size
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    pixels = BasePixels(dataset, cfg.fold.index, size, p.smallest_crop, cfg.seed)
    module = BackbonePretraining(
        instantiate(cfg.backbone), len(pixels.base) + 1, instantiate(cfg.optimizer), instantiate(p.scheduler)
    )
    _, keep_last = checkpoint_callbacks(folder)
    trainer = make_trainer(cfg, folder, loggers, [EpochLog(), keep_last])
    data = PixelDataModule(pixels, p.batch_size, p.images_per_epoch, cfg.episodes.workers)
    start = start_of_training(cfg.ckpt, folder, goes_on(cfg, folder))
    if start and read_checkpoint(start).get("state_dict", {}).keys() != module.state_dict().keys():
        raise UserError(f"{start} is no checkpoint of this pre-training: check ckpt, hydra.run.dir and backbone.")
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
    if trainer.is_global_zero:
        path = folder / "backbone.safetensors"
        module.save_backbone(path, trained_on(cfg, pixels))
        write_json(folder / "results.json", {"mode": "pretrain", "backbone": str(path), **results.origin(cfg)})
        log.info("Backbone written. Use it by\n  backbone.weights=%s", path.absolute())
    return float("nan")


def trained_on(cfg: DictConfig, pixels: BasePixels) -> dict[str, Any]:
    names = pixels.dataset.classes
    return {
        "dataset": pixels.dataset.name,
        "splits": pixels.dataset.splits,
        "fold": cfg.fold.index,
        "classes": [names[c] for c in pixels.base],
    }
