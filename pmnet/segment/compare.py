"""Which head suits one's own examples? Each example is segmented by the others of its class."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pmnet.errors import SettingError
from pmnet.segment.presence import left_out
from pmnet.segment.recipe import DEFAULT, FLOORS
from pmnet.segment.segmenter import Example, Segmenter

HEADS = (DEFAULT, *FLOORS)
MOST = 8  # examples of a class that are segmented; the rest still serve as supports


def compare(
    supports: Mapping[str, Sequence[Example]],
    heads: Sequence[str | Path] = HEADS,
    device: str = "auto",
    keep_aspect: bool = False,
) -> dict[str, dict[str, float]]:
    """Scores heads by leave-one-out on examples. Nothing is trained.

    Args:
        supports: class -> pairs of an image and its mask, as `Segmenter.fit` takes them. A class with one pair is left
            out, as nothing could segment it.
        heads: as `Segmenter.load` takes them.
        device: see `Segmenter`.
        keep_aspect: see `Segmenter`.

    Returns:
        Head -> class -> IoU in 0..1 over the pixels of its first 8 examples, at the network's size. Each class is
        segmented by itself, whatever its presence score.

    Raises:
        SettingError: no class has two examples; or see `Segmenter.load` and `fit`.
        ImageError: a file cannot be read.

    Example:
        >>> image = torch.zeros(3, 96, 96, dtype=torch.uint8)
        >>> image[:, 32:64] = 255
        >>> compare({"stripe": [(image, image[0]), (image, image[0])]}, ["prototype"])["prototype"]["stripe"] > 0.5
        True
    """
    several = {name: pairs for name, pairs in supports.items() if len(pairs) > 1}
    if not several:
        raise SettingError("To compare heads, give at least two examples of a class: each is segmented by the others.")
    found: dict[str, dict[str, float]] = {}
    work = tqdm(total=len(heads) * len(several), unit="class", disable=None, leave=False)
    with work:
        for head in heads:
            segmenter = Segmenter.load(head, device, keep_aspect)
            found[str(head)] = {}
            for name, pairs in several.items():
                found[str(head)][name] = crossed(segmenter, name, pairs)
                work.update()
    return found


@torch.no_grad()
def crossed(segmenter: Segmenter, name: str, pairs: Sequence[Example]) -> float:
    """The IoU of one class over its examples, each segmented by the others."""
    shown, both, either = segmenter.read(name, pairs, ()), 0, 0
    for k in range(min(len(pairs), MOST)):
        rest = left_out(segmenter, shown, k)
        mask_HW = segmenter.score(segmenter.features(shown.images[k]), rest.seen).cpu() > 0.5
        true_HW = shown.masks[k] == 1
        both += int((mask_HW & true_HW).sum())
        either += int((mask_HW | true_HW).sum())
    return both / either
