"""Which head suits your examples? Each example is segmented by the others of its class."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pmnet.errors import SettingError
from pmnet.segment.images import IGNORE, as_image, as_mask
from pmnet.segment.marks import Mark
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

    Each example is segmented as `Segmenter.predict` with `gate=False` does, by the others of its class, and each class
    by itself.

    Args:
        supports: class -> pairs of an image and its mask, as `Segmenter.fit` takes them, but without marks. A class
            with one pair is left out, as nothing could segment it.
        heads: as `Segmenter.load` takes them.
        device: see `Segmenter`.
        keep_aspect: see `Segmenter`.

    Returns:
        Head -> class -> IoU in 0..1 over the pixels of its first 8 examples; pixels marked 255 do not count.

    Raises:
        SettingError: no class has two examples, a mask is a mark; or see `Segmenter.load` and `fit`.
        WeightsError, CheckpointError: see `Segmenter.load`.
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
    segmenters = {str(head): Segmenter.load(head, device, keep_aspect) for head in heads}
    found: dict[str, dict[str, float]] = {head: {} for head in segmenters}
    photos = sum(min(len(pairs), MOST) for pairs in several.values())
    with tqdm(total=photos * len(segmenters), unit="photo", disable=None, leave=False) as bar:
        for name, pairs in several.items():
            for head, segmenter in segmenters.items():
                both = either = 0
                for k in range(min(len(pairs), MOST)):
                    counts = overlap(segmenter, name, pairs, k)
                    both, either = both + counts[0], either + counts[1]
                    bar.update()
                found[head][name] = both / max(either, 1)
    return found


def means(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Head -> the mean over classes of what `compare` returns, the best head first."""
    of_head = {head: sum(of_class.values()) / len(of_class) for head, of_class in found.items()}
    return dict(sorted(of_head.items(), key=lambda pair: -pair[1]))


@torch.no_grad()
def overlap(segmenter: Segmenter, name: str, pairs: Sequence[Example], k: int) -> tuple[int, int]:
    """The pixels of intersection and union in the k-th example, segmented by the others."""
    image_of, mask_of = pairs[k]
    if isinstance(mask_of, Mark):
        raise SettingError(f"To compare heads, give masks of {name!r}, not boxes, points or scribbles.")
    others = segmenter.read(name, [pairs[i] for i in range(len(pairs)) if i != k], ())
    segmenter.see(others)
    segmenter.shown = {name: others}
    image = as_image(image_of)
    mask_HW = as_mask(mask_of, (image.shape[-2], image.shape[-1])).numpy()
    found_HW, true_HW = segmenter.predict(image, gate=False).mask == 1, mask_HW == 1
    return int((found_HW & true_HW).sum()), int(((found_HW | true_HW) & (mask_HW != IGNORE)).sum())
