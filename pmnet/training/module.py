"""The LightningModule: loss, training and test steps, optimiser, and the content of checkpoints."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import CatMetric

from pmnet.backbones.base import Features, union
from pmnet.errors import CheckpointError, NonFiniteLossError, SettingError
from pmnet.methods.base import IGNORE, Criterion, Method, size_of
from pmnet.training.absent import AbsentScores
from pmnet.training.metrics import FewShotIoU, areas

if TYPE_CHECKING:  # at run time, any object with the fields of an Episode will do
    from datamodules import Episode

PREFIX = "network."
FAIR = 200  # training steps within which a network learns to mark something, if its loss lets it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestResult:
    """Scores of all test episodes, in percent.

    Attributes:
        scores: "miou", "fb_iou", and "iou_per_class" in the order of the module's class ids; with absent episodes also
            "absent", see `AbsentScores`.
        baselines: name -> scores of the baselines on the same episodes: "all_foreground", which marks every pixel, and
            the floors.
        episode_iou: index in the episode list -> foreground IoU.
        absent_marked: index of an absent episode -> share of the query's pixels that are marked.
    """

    scores: dict[str, Any]
    baselines: dict[str, dict[str, Any]]
    episode_iou: dict[int, float]
    absent_marked: dict[int, float] = field(default_factory=dict)


class FewShotModule(L.LightningModule):
    """Trains and tests any method that follows the contract in `pmnet/methods/base.py`.

    Args:
        network: the method.
        class_ids: the classes that the test averages over.
        loss: loss of logits (B, 2, H, W) and masks (B, H, W) int64 with 255 = ignore.
        optimizer: builds the optimiser from the parameters that the method trains.
        scheduler: builds the schedule from the optimiser. None keeps the learning rate. The value "steps" of an
            argument becomes the number of training steps: `partial(PolynomialLR, total_iters="steps")`.
        record: plain values that describe the training; stored in checkpoints.
        val_class_ids: the classes that validation averages over; None uses `class_ids`.
        floors: name -> training-free method on the same backbone, tested on the same episodes as a baseline.
        schedule_interval: "epoch" or "step": after what the schedule steps.
        recipe: how the method is built, see `pmnet/segment/recipe.py`; stored in checkpoints.
        absent_from: index of the first test episode whose query does not show the class; None: there is none. These
            episodes have scores of their own and do not affect the others.

    Raises:
        SettingError: `schedule_interval` is neither.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from pmnet import PMNet, SmallBackbone
        >>> loss = torch.nn.CrossEntropyLoss(ignore_index=255)
        >>> module = FewShotModule(PMNet(SmallBackbone("quickstart")), [3, 5], loss, partial(torch.optim.SGD, lr=1e-3))
        >>> # lightning.Trainer(max_epochs=10).fit(module, datamodule)
    """

    def __init__(
        self,
        network: Method,
        class_ids: Sequence[int],
        loss: Criterion,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        scheduler: Callable[..., Any] | None = None,
        record: dict[str, Any] | None = None,
        val_class_ids: Sequence[int] | None = None,
        floors: Mapping[str, Method] | None = None,
        schedule_interval: str = "epoch",
        recipe: dict[str, Any] | None = None,
        absent_from: int | None = None,
    ) -> None:
        super().__init__()
        if schedule_interval not in ("epoch", "step"):
            raise SettingError(f"scheduler.interval must be one of epoch, step, not {schedule_interval}.")
        self.network, self.loss, self.record, self.recipe = network, loss, record or {}, recipe or {}
        self.make_optimizer, self.make_scheduler, self.schedule_interval = optimizer, scheduler, schedule_interval
        self.floors = dict(floors or {})  # a plain dict, no submodules: they share the backbone and have no weights
        self.val_iou = FewShotIoU(class_ids if val_class_ids is None else val_class_ids)
        self.test_iou = FewShotIoU(class_ids)
        baselines = {name: FewShotIoU(class_ids) for name in ("all_foreground", *self.floors)}
        self.test_baselines: Mapping[str, FewShotIoU] = nn.ModuleDict(baselines)  # type: ignore[assignment]
        self.absent_from = absent_from
        methods = len(self.test_baselines) + 1 if absent_from is not None else 0
        self.test_absent: Iterable[AbsentScores] = nn.ModuleList(AbsentScores() for _ in range(methods))  # type: ignore[assignment]
        self.test_index, self.test_episode_iou = CatMetric(), CatMetric()
        self.warned = False

    def forward(self, batch: "Episode") -> Tensor:
        """Predicts the query masks, (B, H, W) bool."""
        return self.network.predict(batch.query, batch.support, batch.support_masks)

    def training_step(self, batch: "Episode", batch_index: int) -> Tensor:
        """The method's loss, a scalar; by default, cross-entropy over the pixels that are not 255.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the message names the episodes.
        """
        loss = self.network.loss(batch, self.loss)
        if not torch.isfinite(loss):
            self.refuse(batch.spec if isinstance(batch, tuple) else self.bad(batch) or batch.spec)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.spec))
        return loss

    def bad(self, batch: "Episode") -> list[Any]:
        """The episodes of a batch whose own loss is not finite."""
        alone = [self.network.loss(part(batch, i), self.loss).isfinite() for i in range(len(batch.spec))]
        return [spec for spec, good in zip(batch.spec, alone, strict=True) if not good]

    def refuse(self, specs: list[Any]) -> None:
        """Raises NonFiniteLossError with the names of the episodes' images, or of the labelled images."""

        def named(s: Any) -> str:
            return s if isinstance(s, str) else f"query {s.query}, supports {', '.join(s.supports)}, class {s.class_id}"

        kind = "Images" if isinstance(specs[0], str) else "Episodes"
        raise NonFiniteLossError(
            f"The loss is NaN or infinite in epoch {self.trainer.current_epoch}, step {self.trainer.global_step}. "
            f"{kind}: {'; '.join(map(named, specs))}. The last checkpoint was saved before that. Check these images, "
            "lower the learning rate (optimizer.lr), or set trainer.precision=32-true."
        )

    def validation_step(self, batch: "Episode", batch_index: int) -> None:
        """Scores the method on validation episodes."""
        self.val_iou.update(self(batch), batch.query_mask == 1, batch.class_id, batch.query_mask == IGNORE)
        self.show_running(self.val_iou)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation scores and resets the metric."""
        scores = self.val_iou.compute()
        self.log("val/miou", scores["miou"], prog_bar=True)
        self.log("val/fb_iou", scores["fb_iou"])
        self.val_iou.reset()
        self.warn_of_background(float(scores["miou"]))

    def warn_of_background(self, miou: float) -> None:
        """Warns once if the network still predicts only background after a fair number of steps."""
        if miou > 0.5 or self.trainer.global_step < FAIR or self.warned:
            return
        self.warned = True
        log.warning(
            "After %d steps the network still predicts only background (validation mIoU %.1f). Cross-entropy alone "
            "learns slowly where objects are small. Try loss=dice_cross_entropy, optimizer=adamw optimizer.lr=1e-3, or "
            "start from a trained head with ckpt=....",
            *(self.trainer.global_step, miou),
        )

    def test_step(self, batch: "Episode", batch_index: int) -> None:
        """Scores the method and the floors; photos of their own size one at a time."""
        for one in [part(batch, i) for i in range(len(batch.spec))] if batch.truth else [batch]:
            self.score(one)
        self.show_running(self.test_iou)

    def score(self, batch: "Episode") -> None:
        """Adds the masks of a batch to all test metrics, with one forward pass of the backbone for all methods."""
        masks = batch.truth[0][None] if batch.truth else batch.query_mask
        truth, ignore = masks == 1, masks == IGNORE
        images = batch.query, batch.support, batch.support_masks
        self.network.check(*images)
        methods = [self.network, *self.floors.values()]
        passed = self.network.passes(batch.query, batch.support, union(*(method.reads for method in methods)))
        answer = answered if self.absent_from is None else margins
        pred, *floors = (answer(method, passed, batch, size_of(masks)) for method in methods)
        answers = [pred, torch.ones_like(pred), *floors]
        absent = torch.zeros_like(batch.index, dtype=torch.bool)
        if self.absent_from is not None:
            absent = batch.index >= self.absent_from
            for scores, margin in zip(self.test_absent, answers, strict=True):
                scores.update(margin, masks, absent)
            answers = [margin > 0 for margin in answers]
        there = ~absent
        for metric, mask in zip((self.test_iou, *self.test_baselines.values()), answers, strict=True):
            metric.update(mask[there], truth[there], batch.class_id[there], ignore[there])
        intersection, union_ = areas(answers[0], truth, ignore)
        iou = 100 * intersection[:, 1] / union_[:, 1].clamp(min=1)
        marked = 100 * union_[:, 1] / (~ignore).sum((1, 2)).clamp(min=1)  # of an absent query, which has no foreground
        self.test_index.update(batch.index)
        self.test_episode_iou.update(torch.where(absent, marked, iou))

    def show_running(self, iou: FewShotIoU) -> None:
        """Shows the mIoU so far in the progress bar."""
        self.log("miou", iou.running()["miou"], prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_test_epoch_start(self) -> None:
        """Resets all test metrics."""
        scores = self.test_iou, *self.test_baselines.values(), *self.test_absent
        for metric in (*scores, self.test_index, self.test_episode_iou):
            metric.reset()

    def on_test_epoch_end(self) -> None:
        """Sets `test_result`, which is the same on every process."""
        scores = self.test_iou.compute()
        found = [plain(metric.compute()) for metric in (self.test_iou, *self.test_baselines.values())]
        for each, absent in zip(found, self.test_absent, strict=False):
            each["absent"] = plain(absent.compute())
        index, iou = (metric.compute().reshape(-1) for metric in (self.test_index, self.test_episode_iou))
        of_episodes = dict(zip(index.int().tolist(), iou.tolist(), strict=True))
        absent_from = math.inf if self.absent_from is None else self.absent_from
        self.log_dict({"test/miou": scores["miou"], "test/fb_iou": scores["fb_iou"]}, logger=False)
        self.test_result = TestResult(
            scores=found[0],
            baselines=dict(zip(self.test_baselines, found[1:], strict=True)),
            episode_iou={i: iou for i, iou in of_episodes.items() if i < absent_from},
            absent_marked={i: share for i, share in of_episodes.items() if i >= absent_from},
        )

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule for Lightning."""
        optimizer = self.make_optimizer(self.network.learned())
        if self.make_scheduler is None:
            return optimizer
        options: dict[str, Any] = getattr(self.make_scheduler, "keywords", {})
        length = {name: steps_of(self.trainer) for name, value in options.items() if value == "steps"}
        schedule = self.make_scheduler(optimizer, **length)
        if self.schedule_interval == "epoch":
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # A checkpoint contains the trained tensors and names the backbone they need.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Removes the frozen tensors from the checkpoint; adds the record and the source of the backbone's weights.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite.
        """
        frozen = {PREFIX + name for name in set(self.network.state_dict()) - self.network.saved()}
        state = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}
        bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
        if bad:
            raise NonFiniteLossError(
                f"Weights became NaN or infinite ({bad[0]}) in epoch {self.trainer.current_epoch} and are not saved. "
                "The last checkpoint was saved before that. Lower the learning rate (optimizer.lr)."
            )
        checkpoint["state_dict"], checkpoint["record"], checkpoint["recipe"] = state, self.record, self.recipe
        checkpoint["backbone"] = self.network.backbone.provenance.as_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the checkpoint and adds the frozen tensors. Raises CheckpointError if it does not fit."""
        check_checkpoint(checkpoint, self.network)
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]


def steps_of(trainer: L.Trainer) -> int:
    """The number of steps of the whole training. Raises SettingError if nothing limits it."""
    steps = trainer.estimated_stepping_batches
    # The Trainer has made the loader for that. It has to make it again once a checkpoint has told it the place in the
    # epoch: one that is there already would begin at the first batch.
    trainer.fit_loop._combined_loader = None
    if not 0 < steps < float("inf"):
        raise SettingError("A schedule over all steps needs their number: set trainer.max_epochs or max_steps.")
    return int(steps)


def check_checkpoint(checkpoint: dict[str, Any], network: Method) -> None:
    """Checks that a checkpoint fits a network.

    Args:
        checkpoint: the content of a file that `FewShotModule` saved.
        network: the method to load it into.

    Raises:
        CheckpointError: the checkpoint is from another program, or needs another backbone or another network.
    """
    have = network.backbone.provenance
    need = checkpoint.get("backbone")
    wanted = {"backbone", "weights", "source", "sha256"}
    if not isinstance(need, dict) or not wanted <= need.keys() or "state_dict" not in checkpoint:
        raise CheckpointError(
            "This file is not a checkpoint of this program: it does not name the backbone that it needs. To load a "
            "checkpoint of a method's authors, call pmnet.methods.from_release(name, state_dict)."
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
            f"The checkpoint belongs to another network than {type(network).__name__} as configured: {len(differ)} "
            f"tensors differ (for example '{differ[0]}': {saved.get(differ[0], 'absent')} in the file, "
            f"{own.get(differ[0], 'absent')} here). Choose the model that it was trained with (model=..., "
            "model.b3dconvs=..., backbone=...)."
        )


def answered(method: Method, passed: tuple[Features, Features], batch: "Episode", size: tuple[int, int]) -> Tensor:
    """A method's masks (B, *size) bool, given the backbone's features of queries and supports."""
    query_feats, support_feats = method.chosen(*passed, batch.support, batch.support_masks)
    return method.head.mask(query_feats, method.head.see(support_feats, batch.support_masks), size)


def margins(method: Method, passed: tuple[Features, Features], batch: "Episode", size: tuple[int, int]) -> Tensor:
    """Like `answered`, by how much each pixel's foreground exceeds its background; (B, *size), > 0 is marked."""
    query_feats, support_feats = method.chosen(*passed, batch.support, batch.support_masks)
    return method.head.margin(query_feats, method.head.see(support_feats, batch.support_masks), size)


def part(batch: "Episode", i: int) -> "Episode":
    """A batch of only the i-th episode of a batch."""
    names = ("query", "query_mask", "support", "support_masks", "class_id", "index")
    rows = {name: getattr(batch, name)[i : i + 1] for name in (*names, "spec", "truth")}
    return replace(batch, **rows)


def plain(scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """Scores as plain numbers and lists."""
    return {name: value.tolist() for name, value in scores.items()}
