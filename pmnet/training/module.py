"""The LightningModule: loss, steps, optimiser, and what a checkpoint holds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import CatMetric

from pmnet.backbones.base import union
from pmnet.errors import CheckpointError, NonFiniteLossError
from pmnet.methods.base import IGNORE, Criterion, Method
from pmnet.training.metrics import FewShotIoU, areas

if TYPE_CHECKING:  # batches are read by their fields' names alone
    from datamodules import Episode

PREFIX = "network."


@dataclass(frozen=True)
class TestResult:
    """Percentages over all test episodes.

    Attributes:
        scores: "miou", "fb_iou", and "iou_per_class" in the order of the module's class ids.
        baselines: the same for what was scored beside the method: "all_foreground" marks everything, then the floors.
        episode_iou: place in the episode list -> IoU of the foreground.
    """

    scores: dict[str, Any]
    baselines: dict[str, dict[str, Any]]
    episode_iou: dict[int, float]


class FewShotModule(L.LightningModule):
    """Trains and tests a method, which it knows by the contract in `pmnet/methods/base.py` alone.

    Args:
        network: the method.
        class_ids: the classes that the test averages over.
        loss: of logits (B, 2, H, W) and masks (B, H, W) int64 with 255 = ignore.
        optimizer: builds the optimiser from the parameters that the method learns.
        scheduler: builds a schedule from the optimiser, stepped once an epoch; None keeps the rate.
        record: what the training is made of (plain values); goes into checkpoints.
        val_class_ids: the classes that validation averages over; None for those of the test.
        floors: methods on the same backbone that learn nothing, tested on the same episodes: name -> method.
    """

    def __init__(
        self,
        network: Method,
        class_ids: Sequence[int],
        loss: Criterion,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None = None,
        record: dict[str, Any] | None = None,
        val_class_ids: Sequence[int] | None = None,
        floors: Mapping[str, Method] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.record = network, loss, record or {}
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.floors = dict(floors or {})  # no submodules: they share the network's backbone and have no weights
        self.val_iou = FewShotIoU(class_ids if val_class_ids is None else val_class_ids)
        self.test_iou = FewShotIoU(class_ids)
        baselines = {name: FewShotIoU(class_ids) for name in ("all_foreground", *self.floors)}
        self.test_baselines: Mapping[str, FewShotIoU] = nn.ModuleDict(baselines)  # type: ignore[assignment]
        self.test_index, self.test_episode_iou = CatMetric(), CatMetric()

    def forward(self, batch: "Episode") -> Tensor:
        """Masks (B, H, W) bool."""
        return self.network.predict(batch.query, batch.support, batch.support_masks)

    def training_step(self, batch: "Episode", batch_index: int) -> Tensor:
        """The method's loss, by default 2-way cross-entropy over the pixels not marked 255."""
        loss = self.network.loss(batch, self.loss)
        if not torch.isfinite(loss):
            alone = [self.network.loss(part(batch, i), self.loss).isfinite() for i in range(len(batch.spec))]
            self.refuse([spec for spec, good in zip(batch.spec, alone, strict=True) if not good] or batch.spec)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.spec))
        return loss

    def refuse(self, specs: list[Any]) -> None:
        episodes = "; ".join(f"query {s.query}, supports {', '.join(s.supports)}, class {s.class_id}" for s in specs)
        raise NonFiniteLossError(
            f"The loss is NaN or infinite in epoch {self.trainer.current_epoch}, step {self.trainer.global_step}. "
            f"Episode: {episodes}. The last checkpoint was saved before this. Look at these images, lower the learning "
            "rate (optimizer.lr) or use trainer.precision=32-true."
        )

    def validation_step(self, batch: "Episode", batch_index: int) -> None:
        self.val_iou.update(self(batch), batch.query_mask == 1, batch.class_id, batch.query_mask == IGNORE)
        self.show_running(self.val_iou)

    def on_validation_epoch_end(self) -> None:
        scores = self.val_iou.compute()
        self.log("val/miou", scores["miou"], prog_bar=True)
        self.log("val/fb_iou", scores["fb_iou"])
        self.val_iou.reset()

    def test_step(self, batch: "Episode", batch_index: int) -> None:
        """Scores the method, and in the same pass of the backbone the floors."""
        truth, ignore = batch.query_mask == 1, batch.query_mask == IGNORE
        images = batch.query, batch.support, batch.support_masks
        self.network.check(*images)
        methods = [self.network, *self.floors.values()]
        passed = self.network.passes(batch.query, batch.support, union(*(method.reads for method in methods)))
        pred, *floors = (
            method.head.predict(*method.chosen(*passed, batch.support, batch.support_masks), batch.support_masks)
            for method in methods
        )
        self.test_iou.update(pred, truth, batch.class_id, ignore)
        for metric, answer in zip(self.test_baselines.values(), (torch.ones_like(pred), *floors), strict=True):
            metric.update(answer, truth, batch.class_id, ignore)
        intersection, union_ = areas(pred, truth, ignore)
        self.test_index.update(batch.index)
        self.test_episode_iou.update(100 * intersection[:, 1] / union_[:, 1].clamp(min=1))
        self.show_running(self.test_iou)

    def show_running(self, iou: FewShotIoU) -> None:
        self.log("miou", iou.running()["miou"], prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_test_epoch_start(self) -> None:
        for metric in (self.test_iou, *self.test_baselines.values(), self.test_index, self.test_episode_iou):
            metric.reset()

    def on_test_epoch_end(self) -> None:
        """Keeps `test_result`, the same on every process, for the runner to write down."""
        scores = self.test_iou.compute()
        index, iou = (metric.compute().reshape(-1) for metric in (self.test_index, self.test_episode_iou))
        self.log_dict({"test/miou": scores["miou"], "test/fb_iou": scores["fb_iou"]}, logger=False)
        self.test_result = TestResult(
            scores=plain(scores),
            baselines={name: plain(metric.compute()) for name, metric in self.test_baselines.items()},
            episode_iou=dict(zip(index.int().tolist(), iou.tolist(), strict=True)),
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network.learned())
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    # A checkpoint holds what is learned, and says which backbone it needs.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {PREFIX + name for name in set(self.network.state_dict()) - self.network.saved()}
        state = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}
        bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
        if bad:
            raise NonFiniteLossError(
                f"Weights became infinite or NaN ({bad[0]}) in epoch {self.trainer.current_epoch}. They are not saved; "
                "the last checkpoint was saved before this. Lower the learning rate (optimizer.lr)."
            )
        checkpoint["state_dict"], checkpoint["record"] = state, self.record
        checkpoint["backbone"] = self.network.backbone.provenance.as_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self.network)
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]


def check_checkpoint(checkpoint: dict[str, Any], network: Method) -> None:
    """Raises CheckpointError where a checkpoint is of another backbone or another network."""
    have = network.backbone.provenance
    need = checkpoint.get("backbone")
    wanted = {"backbone", "weights", "source", "sha256"}
    if not isinstance(need, dict) or not wanted <= need.keys() or "state_dict" not in checkpoint:
        raise CheckpointError(
            "This file is not a checkpoint of this program: it does not say which backbone it needs. Checkpoints "
            "of a method's authors are read by pmnet.methods.from_release(name, state_dict)."
        )
    if need["sha256"] != have.sha256:
        raise CheckpointError(
            f"The checkpoint needs backbone {need['backbone']} with weights '{need['weights']}' ({need['source']}, "
            f"sha256 {need['sha256'][:8]}), but this is {have.backbone} with weights '{have.weights}' "
            f"({have.source}, sha256 {have.sha256[:8]}). Choose backbone={need['backbone']} "
            f"backbone.weights={need['weights']}."
        )
    state = network.state_dict()
    own = {PREFIX + name: tuple(state[name].shape) for name in network.saved()}
    saved = {k: tuple(v.shape) for k, v in checkpoint["state_dict"].items() if k.startswith(PREFIX)}
    if saved != own:
        differ = sorted(k for k in saved.keys() | own.keys() if saved.get(k) != own.get(k))
        raise CheckpointError(
            f"The checkpoint is of another network than {type(network).__name__} as configured: {len(differ)} tensors "
            f"differ (for instance '{differ[0]}': {saved.get(differ[0], 'absent')} in the file, "
            f"{own.get(differ[0], 'absent')} here). Choose the model it was trained with (model=..., "
            "model.b3dconvs=..., backbone=...)."
        )


def part(batch: "Episode", i: int) -> "Episode":
    """The batch of one episode of a batch."""
    names = ("query", "query_mask", "support", "support_masks", "class_id", "index")
    return replace(batch, **{name: getattr(batch, name)[i : i + 1] for name in names}, spec=batch.spec[i : i + 1])


def plain(scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """Scores as plain numbers and lists."""
    return {name: value.tolist() for name, value in scores.items()}
