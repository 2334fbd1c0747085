"""Pretrains a backbone by supervised segmentation, for domains without pretrained weights."""

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
from pmnet.replacing import replacing
from pmnet.training.module import steps_of

LAYERS = ("layer2", "layer3", "layer4")


class BackbonePretraining(L.LightningModule):
    """Trains a backbone to classify every pixel into the base classes.

    A linear classifier reads the last block of each of layer2, layer3 and layer4, *before* its last ReLU. PMNet takes
    inner products of the same features, so the pixels of one class learn to point in one direction there.

    Args:
        backbone: a backbone that is not frozen.
        classes: number of classes, including the background.
        optimizer: builds the optimiser from all parameters.
        scheduler: builds the schedule from (optimiser, total_steps=...); it steps after every batch.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from pmnet import SmallBackbone
        >>> sgd, schedule = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
        >>> module = BackbonePretraining(SmallBackbone("none"), 4, sgd, schedule)
        >>> # lightning.Trainer(max_epochs=10).fit(module, batches)
        >>> # module.save_backbone(Path("backbone.safetensors"), {"classes": ["disc", "ring", "square"]})
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
        """The mean cross-entropy of the three classifiers, a scalar.

        Args:
            batch: images (B, 3, H, W) uint8, and classes (B, H, W) uint8 with 0 = background and 255 = ignore.
            batch_index: unused.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        images, classes = batch
        features = self.backbone(images)
        target = F.interpolate(classes[:, None].float(), scale_factor=0.25, mode="nearest")[:, 0].long()
        losses = []
        for layer, classifier in self.classifiers.items():
            logits = F.interpolate(classifier(features[layer][-1]), target.shape[-2:], mode="bilinear")
            counts = target != 255
            summed = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
            losses.append(summed / counts.sum().clamp(min=1))  # a crop may contain only ignored pixels
            accuracy = (logits.argmax(1) == target)[counts].sum() / counts.sum().clamp(min=1)
            self.log(f"train/accuracy_{layer}", accuracy, on_epoch=True, on_step=False)
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss is NaN or infinite in epoch {self.trainer.current_epoch}. The last checkpoint was saved "
                "before that. Lower the learning rate (optimizer.lr)."
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule for Lightning."""
        optimizer = self.make_optimizer(self.parameters())
        schedule = self.make_scheduler(optimizer, total_steps=steps_of(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_backbone(self, path: Path, trained_on: dict[str, Any]) -> None:
        """Writes the backbone without the classifiers, in half precision.

        Args:
            path: the .safetensors file to write; use it with `backbone.weights=PATH`.
            trained_on: plain values that describe the training, such as dataset and classes; they become part of
                `Provenance`.
        """
        state = {k: v.half().contiguous().cpu() for k, v in self.backbone.trunk.state_dict().items()}
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        with replacing(path) as part:
            part.write_bytes(safetensors.torch.save(state, {"trained_on": json.dumps(trained_on)}))
