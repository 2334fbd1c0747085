"""Scores of test episodes whose query shows none of the class that the supports show."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pmnet.methods.base import IGNORE

OTHER = 2  # query mask value, in an absent episode, of the class that the query shows instead


class AbsentScores(Metric):
    """What a method does where there is nothing to find, and how well it tells whether there is anything.

    An episode's presence score is the largest margin of foreground over background among its pixels. It is positive
    exactly if any pixel is marked. Pixels of value 255 count nowhere. The sums and the ranks of the scores are exact,
    whatever the order of the episodes.

    Example:
        >>> import torch
        >>> metric = AbsentScores()
        >>> margin = torch.tensor([[[0.3, -0.2]], [[0.1, 0.9]], [[-0.5, -0.4]]])
        >>> masks = torch.tensor([[[1, 0]], [[0, 2]], [[2, 0]]])  # the second and the third query do not show the class
        >>> metric.update(margin, masks, absent=torch.tensor([False, True, True]))
        >>> {name: round(value.item(), 1) for name, value in metric.compute().items()}
        {'false_positive': 50.0, 'marked': 50.0, 'confused': 50.0, 'presence_auroc': 50.0, 'presence_accuracy': 66.7}
    """

    full_state_update = False
    pixels: Tensor
    score: list[Tensor]
    absent: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # of absent queries: pixels, marked ones; pixels of the class shown instead, marked ones
        self.add_state("pixels", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("absent", [], dist_reduce_fx="cat")

    def update(self, margin: Tensor, query_mask: Tensor, absent: Tensor) -> None:
        """Adds B episodes.

        Args:
            margin: by how much each pixel's foreground logit exceeds its background logit, (B, H, W); > 0 is marked.
            query_mask: (B, H, W); 255 = ignore; in absent episodes 2 = the class that is shown instead.
            absent: whether the query does not show the class, (B,) bool.
        """
        valid, marked = query_mask != IGNORE, margin > 0
        other = (query_mask == OTHER) & absent[:, None, None]
        empty = valid & absent[:, None, None]
        self.pixels += torch.stack([part.sum() for part in (empty, empty & marked, other, other & marked)])
        self.score.append(margin.masked_fill(~valid, -torch.inf).amax(dim=(1, 2)))
        self.absent.append(absent.to(margin.dtype))

    def compute(self) -> dict[str, Tensor]:
        """Scores of all episodes of all processes.

        Returns:
            Scalars, percentages in [0, 100]:
            "false_positive": marked pixels among those of absent queries;
            "marked": absent queries in which any pixel is marked;
            "confused": marked pixels among those of the class that absent queries show instead;
            "presence_auroc": how often the score of a query that shows the class exceeds that of an absent one;
            "presence_accuracy": episodes with any pixel marked if the class is there, and none if it is absent.
        """
        score, absent = dim_zero_cat(self.score), dim_zero_cat(self.absent) == 1
        empty, empty_marked, other, other_marked = self.pixels
        marked = score > 0
        return {
            "false_positive": 100 * empty_marked / empty.clamp(min=1),
            "marked": 100 * marked[absent].float().mean(),
            "confused": 100 * other_marked / other.clamp(min=1),
            "presence_auroc": auroc(score[~absent], score[absent]),
            "presence_accuracy": 100 * (marked != absent).float().mean(),
        }


def auroc(present: Tensor, absent: Tensor) -> Tensor:
    """Percentage of the pairs of a present and an absent episode in which the present one scores higher.

    Args:
        present: scores of the episodes that show the class, (N,).
        absent: scores of those that do not, (M,).

    Returns:
        A scalar in [0, 100]; pairs with equal scores count half.
    """
    ranked = absent.sort().values
    below, not_above = (torch.searchsorted(ranked, present, right=right).sum() for right in (False, True))
    return 50 * (below + not_above) / (len(present) * len(absent))
