"""mode=train and mode=test: train on the base classes, test on the novel ones, write the results."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from datamodules import FewShotDataModule
from experiments.files import write_json
from experiments.loggers import Dashboard, make_loggers
from experiments.run import checkpoints, heads, panels, results
from experiments.run.callbacks import EpochLog, StepSeed
from experiments.run.checkpoints import Checkpoint
from experiments.run.trainer import make_trainer
from experiments.sweep import trainings
from experiments.sweep.preemption import leave_if_asked, was_requeued
from pmnet.backbones import Backbone
from pmnet.methods import Method
from pmnet.training.module import FewShotModule, TestResult

log = logging.getLogger(__name__)


def train_and_test(cfg: DictConfig, folder: Path) -> float:
    """Writes the results to `folder`; returns the best validation mIoU in percent, NaN without validation."""
    loggers = make_loggers(cfg, folder)  # first, so that W&B also shows a job that fails below
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    network, start = build(cfg, folder)
    learns = cfg.mode == "train" and bool(network.learned())
    data: FewShotDataModule = instantiate(cfg.episodes)
    if learns and data.augment:
        network.backbone.cache = None  # no image comes twice
    network.check_sides(data.image_size)
    network.check_shots(data.shot)
    if cfg.fold.index == "all" and data.same:
        log.warning("fold=all trains on every class, so the tested classes are not novel.")
    data.setup("fit" if learns else "test")
    floors = {name: instantiate(floor, backbone=network.backbone) for name, floor in (cfg.floors or {}).items()}
    schedule = OmegaConf.to_container(cfg.scheduler, resolve=True) if cfg.scheduler else None
    interval = schedule.pop("interval", "epoch") if isinstance(schedule, dict) else "epoch"
    module = FewShotModule(
        network,
        data.test_class_ids,
        instantiate(cfg.loss),
        instantiate(cfg.optimizer),
        instantiate(schedule),
        data.training_record | heads.started_from(cfg.ckpt, start, folder) if learns else {},
        data.val_class_ids,
        floors,
        interval,
        recipe_of(cfg, data),
        len(data.test_specs) if data.absent else None,
    )
    trainer = make_trainer(cfg, folder, loggers, [StepSeed(cfg.seed), EpochLog(), *checkpoints.callbacks(folder)])
    if trainer.is_global_zero:
        results.print_setting(cfg, data, network)

    clock, untrained = {"start": time.time()}, None
    if learns and cfg.untrained:
        untrained = test(trainer, module, data, None, data.protocol.seed)
    tested = start
    if learns:
        clock["fit"] = time.time()
        tested = train(cfg, folder, trainer, module, data)
    elif start and not start.released:
        start.check_trained_on(data)
    clock["test"] = time.time()
    lists = [test(trainer, module, data, tested, seed) for seed in data.test_seeds]
    clock["end"] = time.time()
    data.test_seed = data.protocol.seed

    if trainer.is_global_zero:
        record = results.make(cfg, data, network, trainer, lists, untrained, tested, clock)
        write_json(folder / "results.json", record)
        results.write_episodes(folder, data, lists)
        panels.draw(folder / "predictions", data, module.to(trainer.strategy.root_device), lists[0], cfg.panels)
        for logger in loggers:
            if isinstance(logger, Dashboard):
                logger.log_results(record, folder)
        results.print_scores(record, folder)
    return tested.val_miou if tested else float("nan")


def recipe_of(cfg: DictConfig, data: FewShotDataModule) -> dict[str, Any]:
    """How the method is built, in plain values, as `pmnet/segment/recipe.py` reads it from a checkpoint."""
    parts = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("model", "backbone")}
    return parts | {"image_size": list(data.image_size)}


def build(cfg: DictConfig, folder: Path) -> tuple[Method, Checkpoint | None]:
    """The network, and the matching checkpoint that it is tested with or starts from; needs no data.

    A head in a .safetensors file is loaded into the network, and is no checkpoint to resume.
    """
    start, head = None, heads.named(cfg.ckpt)
    if cfg.mode == "train":
        start = checkpoints.to_start_from(None if head else cfg.ckpt, folder, cfg.resume or was_requeued())
    network: Method = instantiate(cfg.model, backbone=instantiate(cfg.backbone))
    if head:
        loaded = heads.load(head, network)
        start = loaded if cfg.mode == "test" else start
    elif cfg.mode == "test" and (network.learned() or cfg.ckpt):
        start = checkpoints.to_test(cfg.ckpt)
        if start.released:
            checkpoints.load_released(start, network)
    if start and not (start.released and cfg.mode == "test"):
        start.check_network(network)
    equip(network.backbone, cfg.trainer)
    return network, start


def equip(backbone: Backbone, options: DictConfig) -> None:
    """Settings that affect the backbone's speed but not its output."""
    backbone.cache = instantiate(options.cache)
    if not options.channels_last:
        backbone.to(memory_format=torch.contiguous_format)
    backbone.compiled = options.compile


def train(
    cfg: DictConfig, folder: Path, trainer: L.Trainer, module: FewShotModule, data: FewShotDataModule
) -> Checkpoint:
    """Trains, or reuses the same training of another run; returns the checkpoint to test."""
    resume = cfg.resume or was_requeued()
    if resume and checkpoints.in_run(folder, "last") and (interrupted := checkpoints.to_start_from(None, folder, True)):
        interrupted.check_training(module.record)
    store = Path(cfg.trainings) if cfg.reuse and cfg.ckpt is None else None
    shape = trainings.shape(cfg, data, module.network, trainer.world_size)
    with trainings.claim(store, folder, shape, resume, partial(leave_if_asked, trainer)) as trained:
        if trained is None:
            ckpt = None if heads.named(cfg.ckpt) else cfg.ckpt
            start = checkpoints.to_start_from(ckpt, folder, True)  # again: `claim` may have copied checkpoints
            if start:
                start.check_epochs(trainer.max_epochs)
                log.info("Resuming from %s", start.path)
            trainer.fit(module, data, ckpt_path=start.path if start else None, weights_only=True)
        else:
            log.info("Already trained in %s; its weights are reused (reuse=false trains again)", trained)
    best = checkpoints.trained_in(trained or folder)
    if best.path.stem == "last":
        log.warning("The training ended before its first validation; the last checkpoint is tested.")
    best.check_network(module.network)
    best.check_training(module.record)  # best.ckpt may be older if this training ended before its first validation
    return best


def test(
    trainer: L.Trainer,
    module: FewShotModule,
    data: FewShotDataModule,
    checkpoint: Checkpoint | None,
    seed: int,
) -> TestResult:
    """Scores on the test list of a seed."""
    data.test_seed = seed
    path = checkpoint.path if checkpoint and not checkpoint.released else None  # else the network has the weights
    trainer.test(module, data, ckpt_path=path, verbose=False, weights_only=True)
    return module.test_result
