"""mode=pretrain: trains a backbone to segment the base classes."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from datamodules.episodes.pixels import BasePixels, PixelDataModule
from experiments.errors import UserError
from experiments.files import write_json
from experiments.loggers import make_loggers
from experiments.run import checkpoints, results
from experiments.run.callbacks import EpochLog
from experiments.run.trainer import make_trainer
from experiments.sweep.preemption import was_requeued
from pmnet.training.pretrain import BackbonePretraining

log = logging.getLogger(__name__)


def pretrain(cfg: DictConfig, folder: Path) -> float:
    """Writes `backbone.safetensors` to `folder`; returns NaN, as there is no validation."""
    loggers = make_loggers(cfg, folder)
    start = checkpoints.to_start_from(cfg.ckpt, folder, cfg.resume or was_requeued())
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    dataset, p = instantiate(cfg.dataset), cfg.pretrain
    size = cfg.episodes.image_size
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    pixels = BasePixels(dataset, cfg.fold.index, size, p.smallest_crop, cfg.seed)
    module = BackbonePretraining(
        instantiate(cfg.backbone), len(pixels.base) + 1, instantiate(cfg.optimizer), instantiate(p.scheduler)
    )
    if start and start.content.get("state_dict", {}).keys() != module.state_dict().keys():
        raise UserError(
            f"{start.path} is not a checkpoint of this pretraining. Check ckpt, hydra.run.dir and backbone."
        )
    _, keep_last = checkpoints.callbacks(folder)
    trainer = make_trainer(cfg, folder, loggers, [EpochLog(), keep_last])
    data = PixelDataModule(pixels, p.batch_size, p.images_per_epoch, cfg.episodes.workers, cfg.episodes.timeout)
    trainer.fit(module, data, ckpt_path=start.path if start else None, weights_only=True)
    if trainer.is_global_zero:
        path = folder / "backbone.safetensors"
        module.save_backbone(path, trained_on(cfg, pixels))
        write_json(folder / "results.json", {"mode": "pretrain", "backbone": str(path), **results.origin(cfg)})
        log.info("Wrote the backbone. Use it with\n  backbone.weights=%s", path.absolute())
    return float("nan")


def trained_on(cfg: DictConfig, pixels: BasePixels) -> dict[str, Any]:
    names = pixels.dataset.classes
    return {
        "dataset": pixels.dataset.name,
        "splits": pixels.dataset.splits,
        "fold": cfg.fold.index,
        "classes": [names[c] for c in pixels.base],
    }
