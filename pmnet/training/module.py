"""The LightningModule: loss, steps, optimiser, and what a checkpoint holds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import CatMetric

from pmnet.errors import CheckpointError, NonFiniteLossError
from pmnet.methods.pmnet.network import PMNet
from pmnet.training.metrics import FewShotIoU, areas

if TYPE_CHECKING:  # batches are read by their fields' names alone
    from datamodules import Episode

IGNORE = 255
BACKBONE = "network.backbone."


@dataclass(frozen=True)
class TestResult:
    """Percentages over all test episodes.

    Attributes:
        scores: "miou", "fb_iou", and "iou_per_class" in the order of the module's class ids.
        all_foreground: the same for a prediction that marks everything.
        episode_iou: place in the episode list -> IoU of the foreground.
    """

    scores: dict[str, Any]
    all_foreground: dict[str, Any]
    episode_iou: dict[int, float]


class FewShotModule(L.LightningModule):
    """Trains and tests a few-shot network.

    Args:
        network: called with (query, support, support_masks); has a frozen `backbone` and a `head`.
        class_ids: the classes that the test takes the mean over.
        loss: of logits (B, 2, H, W) and masks (B, H, W) int64 with 255 = ignore.
        optimizer: makes the optimiser from the head's parameters.
        scheduler: makes a schedule from the optimiser, stepped once an epoch; None keeps the rate.
        record: what the training is made of (plain values); goes into checkpoints.
        val_class_ids: the classes that validation takes the mean over; None for those of the test.
    """

    def __init__(
        self,
        network: PMNet,
        class_ids: Sequence[int],
        loss: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None = None,
        record: dict[str, Any] | None = None,
        val_class_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.record = network, loss, record or {}
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.val_iou = FewShotIoU(class_ids if val_class_ids is None else val_class_ids)
        self.test_iou = FewShotIoU(class_ids)
        self.test_all_foreground = FewShotIoU(class_ids)  # the score of marking everything
        self.test_index, self.test_episode_iou = CatMetric(), CatMetric()

    def forward(self, batch: "Episode") -> Tensor:
        """Logits (B, 2, H, W)."""
        return self.network(batch.query, batch.support, batch.support_masks)

    def training_step(self, batch: "Episode", batch_index: int) -> Tensor:
        """The loss over the pixels not marked 255; as published, 2-way cross-entropy."""
        logits, masks = self(batch).float(), batch.query_mask.long()
        loss = self.loss(logits, masks) if (masks != IGNORE).any() else 0 * logits.sum()
        if not torch.isfinite(loss):
            alone = [self.loss(logits[i : i + 1], masks[i : i + 1]).isfinite() for i in range(len(masks))]
            self.refuse([spec for spec, good in zip(batch.spec, alone, strict=True) if not good] or batch.spec)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.spec))
        return loss

    def refuse(self, specs: list[Any]) -> None:
        episodes = "; ".join(f"query {s.query}, supports {', '.join(s.supports)}, class {s.class_id}" for s in specs)
        raise NonFiniteLossError(
            f"The loss is no finite number in epoch {self.trainer.current_epoch}, step {self.trainer.global_step}. "
            f"Episode: {episodes}. The last checkpoint is from before; look at these images, lower the learning "
            "rate (optimizer.lr) or use trainer.precision=32-true."
        )

    def validation_step(self, batch: "Episode", batch_index: int) -> None:
        pred = self(batch).argmax(dim=1)
        self.val_iou.update(pred, batch.query_mask == 1, batch.class_id, batch.query_mask == IGNORE)
        self.show_running(self.val_iou)

    def on_validation_epoch_end(self) -> None:
        scores = self.val_iou.compute()
        self.log("val/miou", scores["miou"], prog_bar=True)
        self.log("val/fb_iou", scores["fb_iou"])
        self.val_iou.reset()

    def test_step(self, batch: "Episode", batch_index: int) -> None:
        pred, truth, ignore = self(batch).argmax(dim=1), batch.query_mask == 1, batch.query_mask == IGNORE
        self.test_iou.update(pred, truth, batch.class_id, ignore)
        self.test_all_foreground.update(torch.ones_like(pred), truth, batch.class_id, ignore)
        intersection, union = areas(pred, truth, ignore)
        self.test_index.update(batch.index)
        self.test_episode_iou.update(100 * intersection[:, 1] / union[:, 1].clamp(min=1))
        self.show_running(self.test_iou)

    def show_running(self, iou: FewShotIoU) -> None:
        self.log("miou", iou.running()["miou"], prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_test_epoch_start(self) -> None:
        for metric in (self.test_iou, self.test_all_foreground, self.test_index, self.test_episode_iou):
            metric.reset()

    def on_test_epoch_end(self) -> None:
        """Leaves `test_result`, the same on every process, for the runner to write down."""
        scores, all_foreground = self.test_iou.compute(), self.test_all_foreground.compute()
        index, iou = (metric.compute().reshape(-1) for metric in (self.test_index, self.test_episode_iou))
        self.log_dict({"test/miou": scores["miou"], "test/fb_iou": scores["fb_iou"]}, logger=False)
        self.test_result = TestResult(
            scores={name: value.tolist() for name, value in scores.items()},
            all_foreground={name: value.tolist() for name, value in all_foreground.items()},
            episode_iou=dict(zip(index.int().tolist(), iou.tolist(), strict=True)),
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network.head.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    # A checkpoint holds the head alone, and says which backbone it needs.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(BACKBONE)}
        bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
        if bad:
            raise NonFiniteLossError(
                f"Weights became infinite or NaN ({bad[0]}) in epoch {self.trainer.current_epoch}; they are not "
                "saved, the last checkpoint is from before. Lower the learning rate (optimizer.lr)."
            )
        checkpoint["state_dict"], checkpoint["record"] = state, self.record
        checkpoint["backbone"] = self.network.backbone.provenance.as_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        backbone = {k: v for k, v in self.state_dict().items() if k.startswith(BACKBONE)}
        checkpoint["state_dict"] = checkpoint["state_dict"] | backbone

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises CheckpointError where a checkpoint is of another backbone or another network."""
        have = self.network.backbone.provenance
        need = checkpoint.get("backbone")
        wanted = {"backbone", "weights", "source", "sha256"}
        if not isinstance(need, dict) or not wanted <= need.keys() or "state_dict" not in checkpoint:
            raise CheckpointError(
                "This file is no checkpoint of this program (it does not say which backbone it needs). Checkpoints of "
                "the authors' program are read by pmnet.methods.pmnet.release.head_from_release."
            )
        if need["sha256"] != have.sha256:
            raise CheckpointError(
                f"The checkpoint needs backbone {need['backbone']} with weights '{need['weights']}' ({need['source']}, "
                f"sha256 {need['sha256'][:8]}), but this is {have.backbone} with weights '{have.weights}' "
                f"({have.source}, sha256 {have.sha256[:8]}). Choose backbone={need['backbone']} "
                f"backbone.weights={need['weights']}."
            )
        saved = {k: tuple(v.shape) for k, v in checkpoint["state_dict"].items()}
        own = {k: tuple(v.shape) for k, v in self.state_dict().items() if not k.startswith(BACKBONE)}
        if saved != own:
            differ = sorted(k for k in saved.keys() | own.keys() if saved.get(k) != own.get(k))
            raise CheckpointError(
                f"The checkpoint is of another network: {len(differ)} tensors differ (for instance '{differ[0]}': "
                f"{saved.get(differ[0], 'absent')} in the file, {own.get(differ[0], 'absent')} here). "
                "Choose the model it was trained with (model=..., model.b3dconvs=..., backbone=...)."
            )
