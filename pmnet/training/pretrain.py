"""Pre-training of a backbone by supervised segmentation, for domains without pre-trained weights."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from pmnet.backbones import Backbone
from pmnet.errors import NonFiniteLossError

LAYERS = ("layer2", "layer3", "layer4")


class BackbonePretraining(L.LightningModule):
    """Teaches a backbone to tell the base classes apart at every pixel.

    A linear classifier reads each of layer2, layer3 and layer4 *before* the last ReLU, where PMNet takes its
    inner products, so that pixels of one class come to lie in one direction there.

    Args:
        backbone: not frozen yet.
        classes: number of classes, background included.
        optimizer: makes the optimiser from all parameters.
        scheduler: makes a schedule from (optimiser, total_steps), stepped every batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.classifiers = nn.ModuleDict({m: nn.Conv2d(backbone.channels[m], classes, 1) for m in LAYERS})
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """(B, 3, H, W) uint8 images, (B, H, W) uint8 classes with 255 = ignore."""
        images, classes = batch
        features = self.backbone(images)
        target = F.interpolate(classes[:, None].float(), scale_factor=0.25, mode="nearest")[:, 0].long()
        losses = []
        for layer, classifier in self.classifiers.items():
            logits = F.interpolate(classifier(features[layer][-1]), target.shape[-2:], mode="bilinear")
            counts = target != 255
            summed = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
            losses.append(summed / counts.sum().clamp(min=1))  # a crop may show novel classes alone
            accuracy = (logits.argmax(1) == target)[counts].sum() / counts.sum().clamp(min=1)
            self.log(f"train/accuracy_{layer}", accuracy, on_epoch=True, on_step=False)
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss is no finite number in epoch {self.trainer.current_epoch}; the last checkpoint is from "
                "before. Lower the learning rate (optimizer.lr)."
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        schedule = self.make_scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_backbone(self, path: Path, trained_on: dict[str, Any]) -> None:
        """Writes the backbone alone, in half precision, with what it was trained on."""
        state = {k: v.half().contiguous().cpu() for k, v in self.backbone.trunk.state_dict().items()}
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        path.write_bytes(safetensors.torch.save(state, {"trained_on": json.dumps(trained_on)}))
