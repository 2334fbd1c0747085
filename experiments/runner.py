"""One run: train, test, and write down what came out. `run.py` hands the composed config to `run_job`."""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from datamodules import FewShotDataModule
from datamodules.errors import DatasetError
from datamodules.pixels import BasePixels, PixelDataModule
from experiments import panels, results
from experiments.callbacks import EpochLog, EpochSeed
from experiments.checkpoints import (
    AtomicCheckpoints,
    check_same_training,
    checkpoint_callbacks,
    find_checkpoint,
    read_checkpoint,
    start_of_training,
)
from experiments.errors import UserError, explain
from experiments.loggers import make_loggers
from pmnet.errors import PMNetError
from pmnet.module import FewShotModule, TestResult
from pmnet.network import PMNet
from pmnet.pretrain import BackbonePretraining

log = logging.getLogger(__name__)
EXPECTED = (PMNetError, DatasetError, UserError, MisconfigurationException)


def run_job(cfg: DictConfig) -> float | None:
    """Runs one config; an error that the user can mend is one message and exit code 1.

    Returns:
        Test mIoU in percent; None where nothing was tested.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    quiet()
    try:
        if cfg.mode != "pretrain":
            return train_and_test(cfg, folder)
        pretrain(cfg, folder)
        return None
    except (*EXPECTED, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not isinstance(cause, EXPECTED):
            raise
        message = escape(explain(cause))
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {message}", highlight=False)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the sweep goes on with its other jobs, and ends with an exit code that says so
        sys.exit(1)
    finally:
        wandb.finish()  # the next job of a sweep in this process begins a run of its own


def quiet() -> None:
    """Leaves out what Lightning says about choices made here on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    by_design = (
        "does not have many workers",
        "LeafSpec",
        "log_every_n_steps",
        "in eval mode",
        "Experiment logs",
        "could not find the monitored",
    )
    for message in (f".*{words}.*" for words in by_design):
        warnings.filterwarnings("ignore", message)


def train_and_test(cfg: DictConfig, folder: Path) -> float:
    """Trains on the base classes, tests on the novel ones, leaves the results in `folder`."""
    if cfg.mode not in ("train", "test"):
        raise UserError(f"mode={cfg.mode} is not one of train, test, pretrain.")
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: FewShotDataModule = instantiate(cfg.episodes)
    if cfg.fold.index == "all" and data.same:
        log.warning("fold=all: every class is trained on, so the classes tested on are not novel.")
    data.setup("test" if cfg.mode == "test" else "fit")
    network: PMNet = instantiate(cfg.model, backbone=instantiate(cfg.backbone))
    record = data.training_record if cfg.mode == "train" else {}
    module = FewShotModule(
        network,
        data.test_class_ids,
        instantiate(cfg.loss),
        instantiate(cfg.optimizer),
        instantiate(cfg.scheduler),
        record,
        data.val_class_ids,
    )
    trainer = make_trainer(cfg, folder, [EpochSeed(cfg.seed), EpochLog(), *checkpoint_callbacks(folder)])
    if trainer.is_global_zero:
        results.print_setting(cfg, data, network)

    clock = {"start": time.time()}
    untrained = None
    if cfg.mode == "train":
        start = start_of_training(cfg.ckpt, folder, cfg.resume)
        if start:
            checkpoint = read_checkpoint(start)
            module.check_checkpoint(checkpoint)
            if start.is_relative_to(folder):
                check_same_training(start, checkpoint, record)
            log.info("Going on from %s", start)
        if cfg.untrained:
            untrained = test(trainer, module, data, None)
        clock["fit"] = time.time()
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        best = find_checkpoint(None, folder, "best") or find_checkpoint(None, folder, "last")
        if best is None:
            raise UserError("The training ended before its first epoch did: there is no checkpoint to test.")
        if best.stem == "last":
            log.warning("The training ended before its first validation: the last state of the network is tested.")
    else:
        best = find_checkpoint(cfg.ckpt, None, "best")
        if best is None:
            raise UserError("mode=test needs the checkpoint to test: ckpt=/path/to/best.ckpt, or its run's folder.")
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
        results.write_json(folder / "results.json", summary)
        results.write_episodes(folder / "episodes.csv", data, result)
        panels.draw(folder / "predictions", data, module.to(trainer.strategy.root_device), result, cfg.panels)
        results.print_scores(summary, folder)
    return float(result.scores["miou"])


def check_trained_on(record: dict[str, Any], data: FewShotDataModule) -> None:
    """Raises UserError where a checkpoint that is tested on another dataset was not trained as the config says."""
    if (record["dataset"], record["base_classes"]) != (data.dataset.name, data.base_classes):
        raise UserError(
            f"The checkpoint was trained on {record['dataset']}, {len(record['base_classes'])} classes "
            f"({', '.join(record['base_classes'][:5])}, ...), but dataset={data.dataset.name} fold={data.fold} "
            f"stands for {len(data.base_classes)} classes. Choose the dataset and the fold that it was trained on."
        )


def make_trainer(cfg: DictConfig, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        default_root_dir=str(folder),
        logger=make_loggers(cfg, folder),
        callbacks=[RichProgressBar(leave=False), *callbacks],
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,  # the DataModule shares the episodes out itself
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN and hydra.launcher._target_.endswith("BasicLauncher") and trainer.world_size > 1:
        raise UserError(
            "A sweep in one process (-m) cannot start several processes a job: use trainer.devices=1, or start the "
            "jobs one by one without -m."
        )
    return trainer


def test(trainer: L.Trainer, module: FewShotModule, data: FewShotDataModule, ckpt: Path | None) -> TestResult:
    trainer.test(module, data, ckpt_path=ckpt, verbose=False, weights_only=True)
    return module.test_result


def pretrain(cfg: DictConfig, folder: Path) -> None:
    """Trains a backbone on the base classes' pixels; leaves `backbone.safetensors` in `folder`."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    dataset, p = instantiate(cfg.dataset), cfg.pretrain
    size = cfg.episodes.image_size
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    pixels = BasePixels(dataset, cfg.fold.index, size, p.smallest_crop, cfg.seed)
    module = BackbonePretraining(
        instantiate(cfg.backbone), len(pixels.base) + 1, instantiate(cfg.optimizer), instantiate(p.scheduler)
    )
    _, keep_last = checkpoint_callbacks(folder)
    trainer = make_trainer(cfg, folder, [EpochLog(), keep_last])
    data = PixelDataModule(pixels, p.batch_size, p.images_per_epoch, cfg.episodes.workers)
    start = start_of_training(cfg.ckpt, folder, cfg.resume)
    if start and read_checkpoint(start).get("state_dict", {}).keys() != module.state_dict().keys():
        raise UserError(f"{start} is no checkpoint of this pre-training: check ckpt, hydra.run.dir and backbone.")
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
    if trainer.is_global_zero:
        path = folder / "backbone.safetensors"
        module.save_backbone(path, trained_on(cfg, pixels))
        results.write_json(folder / "results.json", {"mode": "pretrain", "backbone": str(path), **results.origin(cfg)})
        log.info("Backbone written. Use it by\n  backbone.weights=%s", path.absolute())


def trained_on(cfg: DictConfig, pixels: BasePixels) -> dict[str, Any]:
    names = pixels.dataset.classes
    return {
        "dataset": pixels.dataset.name,
        "splits": pixels.dataset.splits,
        "fold": cfg.fold.index,
        "classes": [names[c] for c in pixels.base],
    }
