"""Does an image show a class at all?

Evidence: the cosine of the mean feature of what was marked in the image and that of the supports' foreground, in the
deepest stage of the backbone. A logistic function turns it into a score; its threshold lies between the evidence of
images that show the class and that of images that do not:

- with it: each support, segmented by the other supports;
- without it: the negatives, and the supports of other classes; if there are none, what would be marked in the supports
  beside the object.

With a single support, the threshold is a share of that support's own evidence, or the evidence of images that do not
show the class if that is larger.

The choice among several kinds of evidence and of thresholds is measured in `docs/segment.md`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pmnet.segment.segmenter import Segmenter, Shown

PRESENT = 0.5  # from this score on, the class counts as present
MOST = 8  # images of each kind that are looked at
ALONE = 0.45  # of one support: the threshold's share of the support's own evidence
BESIDE = 0.4  # where the threshold lies between "without" and "with", if "without" is not measured on images
LIKELY = 0.8  # score of the mean image that shows the class


@dataclass(frozen=True)
class Presence:
    """A logistic function of the evidence.

    Attributes:
        threshold: the evidence that gives 0.5.
        slope: how fast the score grows with the evidence.
    """

    threshold: float
    slope: float

    def __call__(self, evidence: float) -> float:
        return float(torch.sigmoid(torch.tensor(self.slope * (evidence - self.threshold))))


def between(present: float, absent: float, share: float) -> Presence:
    """The function whose threshold lies at `share` of the way from `absent` to `present`."""
    return scaled(present, present - (1 - share) * max(present - absent, 0.05))


def scaled(present: float, threshold: float) -> Presence:
    """The function that gives `LIKELY` at `present`."""
    return Presence(threshold, float(torch.logit(torch.tensor(LIKELY))) / max(present - threshold, 0.025))


def evidence(score_HW: Tensor, feature_Chw: Tensor, prototype_C: Tensor) -> float:
    """The cosine of what is marked with the supports' foreground.

    Args:
        score_HW: probability of the class; where it is > 0.5 the class is marked. If that is nowhere, the positions
            with the largest score count.
        feature_Chw: of the deepest stage.
        prototype_C: the supports' mean foreground feature.
    """
    score_hw = F.interpolate(score_HW[None, None], feature_Chw.shape[-2:], mode="area")[0, 0]
    marked_hw = score_hw >= score_hw.max().clamp(max=0.5)
    mean_C = (F.normalize(feature_Chw.float(), dim=0) * marked_hw).sum((1, 2))
    return float(F.cosine_similarity(mean_C, prototype_C, dim=0))


def prototype(feature_KChw: Tensor, masks_KHW: Tensor) -> Tensor:
    """The mean (C,) of the foreground's features, each of length 1."""
    share_K1hw = F.interpolate(masks_KHW[:, None].float(), feature_KChw.shape[-2:], mode="area")
    return (F.normalize(feature_KChw.float(), dim=1) * share_K1hw).sum((0, 2, 3))


def calibrated(segmenter: "Segmenter", shown: "Shown", others: list["Shown"]) -> Presence:
    """Calibrates the score of a class on its supports and negatives, and on the supports of other classes."""
    positive = [k for k in range(len(shown.images)) if shown.masks[k].any()]
    negative = shown.images[len(shown.images) - shown.negatives :]
    apart = [other.images[k] for other in others for k in range(len(other.images)) if other.masks[k].any()]
    ours = {image.numpy().tobytes() for image in shown.images}
    apart = [image for image in apart if image.numpy().tobytes() not in ours]
    without = [of(segmenter, image, shown) for image in [*negative[:MOST], *apart[:MOST]]]
    if len(positive) == 1:
        alone = of(segmenter, shown.images[positive[0]], shown)
        return scaled(alone, max(ALONE * alone, mean(without) if without else 0.0))
    with_it = mean([of(segmenter, shown.images[k], left_out(segmenter, shown, k)) for k in positive[:MOST]])
    if without:
        return between(with_it, mean(without), 0.5)
    beside = [of(segmenter, shown.images[k], shown, away_from(shown.masks[k])) for k in positive[:MOST]]
    return between(with_it, mean(beside), BESIDE)


def of(segmenter: "Segmenter", image: Tensor, shown: "Shown", where_HW: Tensor | None = None) -> float:
    """The evidence of a class in an image (3, H, W) at the network's size; in a part of it, if `where_HW` is given."""
    feats = segmenter.features(image)
    score_HW = segmenter.score(feats, shown.seen)
    if where_HW is not None:
        score_HW = score_HW * where_HW.to(score_HW.device)
    return evidence(score_HW, segmenter.deepest(feats)[0], shown.prototype)


def away_from(mask_HW: Tensor) -> Tensor:
    """(H, W) bool: where a mask is not even near, so that no feature sees it as well."""
    near = 2 * (min(mask_HW.shape) // 24) + 1
    return F.max_pool2d(mask_HW[None].float(), near, 1, near // 2)[0] == 0


def left_out(segmenter: "Segmenter", shown: "Shown", k: int) -> "Shown":
    """The same class without its k-th image, which is no negative."""
    keep = [i for i in range(len(shown.images)) if i != k]
    rest = type(shown)(shown.images[keep], shown.masks[keep], shown.side, shown.negatives)
    segmenter.see(rest)
    return rest


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
