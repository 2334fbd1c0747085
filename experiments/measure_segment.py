"""Measures what docs/segment.md says of the Segmenter: `python -m experiments.measure_segment DATA`.

DATA is a folder of images with masks, in any format of docs/own-images.md. Of each class, some photos are examples, and
others, half of which show none of the class, are segmented. The IoU of a class adds up the pixels of all its photos;
mIoU is the mean over the classes. The last table compares heads. All draws follow from --seed.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datamodules.progress import track
from pmnet.segment import Box, Points, Segmenter
from pmnet.segment.compare import compare
from pmnet.segment.formats import Annotated, read_folder
from pmnet.segment.images import IGNORE
from pmnet.segment.marks import Mark
from pmnet.segment.presence import PRESENT

LEAST = 0.02  # share of a photo that a class must cover to count as shown
NEGATIVES = 4
SHOTS = (1, 3)
SETTINGS = [(shots, negatives, False) for shots in SHOTS for negatives in (0, NEGATIVES)] + [(1, 0, True)]


class Task(NamedTuple):
    """A class, its value in masks, and the photos drawn for it."""

    value: int
    examples: list[Annotated]
    showing: list[Annotated]
    without: list[Annotated]
    negatives: list[Annotated]


class Seen(NamedTuple):
    """A segmented photo: does it show the class, its presence score, and pixels of mask, truth and both."""

    shows: bool
    presence: float
    mask: int
    truth: int
    both: int


def tasks(folder: Path, classes: int, photos: int, shots: int, seed: int) -> Iterator[Task]:
    """The classes with most photos."""
    images = read_folder(folder)
    random.Random(seed).shuffle(images)
    shares = [np.bincount(mask.ravel(), minlength=256) / mask.size for mask in (each.masks() for each in images)]
    showing = {
        value: [each for each, share in zip(images, shares, strict=True) if share[value] >= LEAST]
        for value in range(1, 1 + len(images[0].classes))
    }
    enough = [value for value in showing if len(showing[value]) >= shots + photos]
    for value in sorted(sorted(enough, key=lambda value: -len(showing[value]))[:classes]):
        absent = [each for each, share in zip(images, shares, strict=True) if not share[value]]
        yield Task(
            value,
            showing[value][:shots],
            showing[value][shots : shots + photos],
            absent[:photos],
            absent[photos : photos + NEGATIVES],
        )


def mask_of(each: Annotated, value: int) -> np.ndarray:
    """(H, W) uint8: 1 = the class, 255 = ignore."""
    index = each.masks()
    return np.where(index == IGNORE, IGNORE, index == value).astype(np.uint8)


def segmented(task: Task, head: str, shots: int, negatives: int, keep_aspect: bool) -> list[Seen]:
    """All photos of a task, whatever their presence score."""
    segmenter = Segmenter.load(head, keep_aspect=keep_aspect)
    examples = [(each.pixels(), mask_of(each, task.value)) for each in task.examples[:shots]]
    segmenter.fit(examples, [each.pixels() for each in task.negatives[:negatives]])
    seen = []
    for number, each in enumerate(task.showing + task.without):
        result, index = segmenter.predict(each.pixels(), gate=False), mask_of(each, task.value)
        mask, truth = (result.mask == 1) & (index != IGNORE), index == 1
        counts = (int(part.sum()) for part in (mask, truth, mask & truth))
        seen.append(Seen(number < len(task.showing), result.presence, *counts))
    return seen


def iou(seen: list[Seen], gate: bool) -> float:
    """Of one class, over all photos; with `gate`, the mask of a photo that seems not to show it is empty."""
    kept = [not gate or each.presence >= PRESENT for each in seen]
    both = sum(each.both for each, keep in zip(seen, kept, strict=True) if keep)
    mask = sum(each.mask for each, keep in zip(seen, kept, strict=True) if keep)
    return both / max(mask + sum(each.truth for each in seen) - both, 1)


def auroc(seen: list[Seen]) -> float:
    """How often a photo with the class has a larger score than one without it, 0..1."""
    score_WO = np.subtract.outer([s.presence for s in seen if s.shows], [s.presence for s in seen if not s.shows])
    return float((score_WO > 0).mean() + (score_WO == 0).mean() / 2)


def summary(of_classes: list[list[Seen]]) -> list[str]:
    """The cells of a line of the table: means over classes, and shares of all photos."""
    seen = [each for of_class in of_classes for each in of_class]
    told = [np.mean([(s.presence >= PRESENT) == shows for s in seen if s.shows == shows]) for shows in (True, False)]
    with_it = [[each for each in of_class if each.shows] for of_class in of_classes]
    ious = [100 * np.mean([iou(s, gate) for s in part]) for part in (with_it, of_classes) for gate in (False, True)]
    area = np.mean([auroc(of_class) for of_class in of_classes])
    return [*(f"{share:.0%}" for share in told), f"{area:.2f}", *(f"{value:.1f}" for value in ious)]


# Marks


def marked(mask: np.ndarray, dice: random.Random) -> dict[str, Mark | np.ndarray]:
    """Marks of one object, a mask (H, W) bool, as a person might set them: points not on the border of the object."""
    y, x = np.nonzero(mask)
    box = Box(int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
    on, beside = (dice.sample(list(zip(*np.nonzero(part)[::-1], strict=True)), 3) for part in (mask, ~mask))
    return {
        "box": box,
        "the whole box": (box.seeds(mask.shape) != 0).numpy(),
        "3 points on it and 3 beside": Points(on, beside),
        "1 point on it and 1 beside": Points(on[:1], beside[:1]),
    }


def of_marks(task: Task, head: str, dice: random.Random) -> Iterator[dict[str, float]]:
    """By kind of mark, the IoU of the mask it stands for with the true one, at the network's size."""
    segmenter = Segmenter.load(head)
    for each in task.showing:
        index, image = mask_of(each, task.value), each.pixels()
        true = segmenter.frame.mask(torch.from_numpy((index == 1).astype(np.uint8)))
        ious = {}
        for kind, mark in marked(index == 1, dice).items():
            grown = segmenter.read(kind, [(image, mark)], ()).masks[0]
            ious[kind] = float((grown & true).sum() / (grown | true).sum())
        yield ious


# Heads


def of_heads(of_classes: list[Task], shots: int) -> Iterator[tuple[str, float, float]]:
    """Each head, its mIoU by `pmnet compare` on the examples, and its mIoU on the photos that show the class."""
    pairs = {
        str(task.value): [(each.pixels(), mask_of(each, task.value)) for each in task.examples[:shots]]
        for task in of_classes
    }
    for head, scores in compare(pairs).items():
        seen = [segmented(task._replace(without=[]), head, shots, 0, False) for task in of_classes]
        yield head, float(np.mean(list(scores.values()))), float(np.mean([iou(photos, gate=False) for photos in seen]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of images with masks")
    parser.add_argument("--head", default="pmnet_lite", help="as of pmnet segment")
    parser.add_argument("--classes", type=int, default=6, help="the ones with most photos")
    parser.add_argument("--photos", type=int, default=16, help="photos with each class, and as many without it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = list(tasks(options.data, options.classes, options.photos, max(SHOTS), options.seed))
    names = read_folder(options.data)[0].classes
    print(f"{', '.join(names[task.value - 1] for task in chosen)}; {options.photos} photos with and without each\n")
    print("| examples | negatives | sides | with it | without | AUROC | mIoU with | gated | mIoU all | gated |")
    print("| --- " * 10 + "|")
    for shots, negatives, keep_aspect in SETTINGS:
        seen = [segmented(task, options.head, shots, negatives, keep_aspect) for task in track(chosen, "Segmenting")]
        sides = "fitted in" if keep_aspect else "squeezed"
        print("|", " | ".join([str(shots), str(negatives), sides, *summary(seen)]), "|", flush=True)
    print("\n| mark | IoU |\n| --- | --- |")
    dice = random.Random(options.seed)
    ious = [one for task in track(chosen, "Marking") for one in of_marks(task, options.head, dice)]
    for kind in ious[0]:
        print(f"| {kind} | {np.mean([one[kind] for one in ious]):.2f} |")
    print(f"\n| head, {max(SHOTS)} examples | mIoU by pmnet compare | mIoU with |\n| --- | --- | --- |")
    for head, compared, with_it in of_heads(chosen, max(SHOTS)):
        print(f"| {head} | {100 * compared:.1f} | {100 * with_it:.1f} |", flush=True)


if __name__ == "__main__":
    main()
