"""mIoU and FB-IoU of few-shot segmentation, as the field's published evaluator counts them."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class FewShotIoU(Metric):
    """Sums intersections and unions per class over all episodes; integers, so exact over processes.

    mIoU is the mean over `class_ids` of the foreground IoU. FB-IoU sums background and foreground over the
    classes and takes the mean of the two IoUs. A class without a pixel in prediction and truth, or without
    an episode, counts as 0, as in the published evaluator.

    Args:
        class_ids: the classes of the fold; episodes of others are refused.

    Example:
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
        """
        Args:
            pred: (B, H, W), 0 or 1, any dtype.
            target: (B, H, W), likewise.
            class_id: (B,) of `class_ids`.
            ignore: (B, H, W), nonzero where a pixel does not count.

        Raises:
            ValueError: a class that is not of `class_ids`.
        """
        place = class_id[:, None] == torch.tensor(self.class_ids, device=class_id.device)
        if not place.any(dim=1).all():
            raise ValueError(f"class_id {class_id.tolist()} is not all of {self.class_ids}")
        intersection, union = areas(pred, target, ignore)
        row = place.int().argmax(dim=1)
        self.intersection.index_add_(0, row, intersection)
        self.union.index_add_(0, row, union)

    def compute(self) -> dict[str, Tensor]:
        """Percentages: "miou" and "fb_iou" scalars, "iou_per_class" in the order of `class_ids`."""
        return self.running()

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """torchmetrics makes a scalar of a tensor with one element, and so of the IoUs of a single class."""
        wrapped = super()._wrap_compute(compute)

        @wraps(wrapped)
        def keep_axis() -> dict[str, Tensor]:
            scores = wrapped()
            return scores | {"iou_per_class": scores["iou_per_class"].reshape(-1)}

        return keep_axis

    def running(self) -> dict[str, Tensor]:
        """As `compute`, of this process's episodes so far, without waiting for the others."""
        iou = 100 * self.intersection / self.union.clamp(min=1)
        fb_iou = 100 * self.intersection.sum(0) / self.union.sum(0).clamp(min=1)
        return {"miou": iou[:, 1].mean(), "fb_iou": fb_iou.mean(), "iou_per_class": iou[:, 1]}


def areas(pred: Tensor, target: Tensor, ignore: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Intersection and union in pixels, each (B, 2) int64: background, foreground. Arguments as in `update`."""
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else ignore == 0
    pairs = [(~pred.bool(), ~target.bool()), (pred.bool(), target.bool())]
    intersection = torch.stack([(p & t & valid).sum((1, 2)) for p, t in pairs], dim=1)
    union = torch.stack([((p | t) & valid).sum((1, 2)) for p, t in pairs], dim=1)
    return intersection, union
