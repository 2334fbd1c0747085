"""mIoU and FB-IoU of few-shot segmentation, as in the evaluator that the field has published and uses."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class FewShotIoU(Metric):
    """Sums intersections and unions per class over all episodes. The sums are integers, so they are exact.

    mIoU is the mean of the foreground IoU over `class_ids`. FB-IoU sums pixels over the classes, separately for
    background and foreground, and averages the two IoUs. As in the published evaluator, a class counts as 0 if it has
    no episode, or no pixel in predictions and masks.

    Args:
        class_ids: the classes of the fold.

    Example:
        >>> import torch
        >>> metric = FewShotIoU([3])
        >>> pred, target = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]])
        >>> metric.update(pred, target, torch.tensor([3]))
        >>> round(metric.compute()["miou"].item(), 1)
        50.0
    """

    full_state_update = False
    intersection: Tensor
    union: Tensor

    def __init__(self, class_ids: Sequence[int]) -> None:
        super().__init__()
        self.class_ids = list(class_ids)
        zeros = torch.zeros(len(self.class_ids), 2, dtype=torch.int64)  # class x (background, foreground)
        self.add_state("intersection", zeros, dist_reduce_fx="sum")
        self.add_state("union", zeros.clone(), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor, class_id: Tensor, ignore: Tensor | None = None) -> None:
        """Adds B episodes.

        Args:
            pred: predicted masks (B, H, W), 0 or 1, any dtype.
            target: true masks (B, H, W), 0 or 1, any dtype.
            class_id: classes of the episodes (B,) int64, each one of `class_ids`.
            ignore: (B, H, W), any dtype, nonzero at pixels that do not count; None counts every pixel.

        Raises:
            ValueError: an episode has a class that is not one of `class_ids`.
        """
        place = class_id[:, None] == torch.tensor(self.class_ids, device=class_id.device)
        if not place.any(dim=1).all():
            raise ValueError(f"class_id {class_id.tolist()} must contain only classes of {self.class_ids}")
        intersection, union = areas(pred, target, ignore)
        row = place.int().argmax(dim=1)
        self.intersection.index_add_(0, row, intersection)
        self.union.index_add_(0, row, union)

    def compute(self) -> dict[str, Tensor]:
        """Scores of all episodes of all processes.

        Returns:
            Percentages in [0, 100]: "miou" and "fb_iou" are scalars; "iou_per_class" is a vector in the order of
            `class_ids`.
        """
        return self.running()

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Keeps "iou_per_class" a vector: torchmetrics turns tensors with one element into scalars."""
        wrapped = super()._wrap_compute(compute)

        @wraps(wrapped)
        def keep_axis() -> dict[str, Tensor]:
            scores = wrapped()
            return scores | {"iou_per_class": scores["iou_per_class"].reshape(-1)}

        return keep_axis

    def running(self) -> dict[str, Tensor]:
        """Like `compute`, but for this process's episodes so far, without waiting for other processes."""
        iou = 100 * self.intersection / self.union.clamp(min=1)
        fb_iou = 100 * self.intersection.sum(0) / self.union.sum(0).clamp(min=1)
        return {"miou": iou[:, 1].mean(), "fb_iou": fb_iou.mean(), "iou_per_class": iou[:, 1]}


def areas(pred: Tensor, target: Tensor, ignore: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Counts pixels of background and foreground. Arguments as in `FewShotIoU.update`.

    Returns:
        Intersection and union, each (B, 2) int64: background, foreground.
    """
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else ignore == 0
    pairs = [(~pred.bool(), ~target.bool()), (pred.bool(), target.bool())]
    intersection = torch.stack([(p & t & valid).sum((1, 2)) for p, t in pairs], dim=1)
    union = torch.stack([((p | t) & valid).sum((1, 2)) for p, t in pairs], dim=1)
    return intersection, union
