"""Compares heads on a folder of examples: each example is segmented by the others of its class."""

import argparse
from pathlib import Path

HELP = "which head suits your examples best: each is segmented by the others"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--support", type=Path, required=True, help="folder of examples with masks, as of segment")
    parser.add_argument(
        "--heads", nargs="+", help="heads as of segment --head; the shipped one, prototype and nearest if not given"
    )
    parser.add_argument("--keep-aspect", action="store_true", help="fit images in instead of squeezing them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def run(arguments: argparse.Namespace) -> int:
    from pmnet.segment.compare import HEADS, compare
    from pmnet.segment.formats import supports_of

    supports = supports_of(arguments.support)
    found = compare(supports, arguments.heads or HEADS, arguments.device, arguments.keep_aspect)
    classes = list(next(iter(found.values())))
    means = {head: sum(of_class.values()) / len(of_class) for head, of_class in found.items()}
    print("IoU in percent of each example, segmented by the others of its class; few examples say little:")
    width, headers = max(map(len, found)), ["mean", *(f"{name} ({len(supports[name])})" for name in classes)]
    print(" " * width, *headers, sep="  ")
    for head, of_class in found.items():
        cells = zip(headers, (means[head], *of_class.values()), strict=True)
        print(head.ljust(width), *(f"{iou:.1%}".rstrip("%").rjust(len(header)) for header, iou in cells), sep="  ")
    if alone := [name for name in supports if name not in classes]:
        print(f"Left out, as they have one example: {', '.join(alone)}.")
    best = max(means, key=lambda head: means[head])
    print(f"Best: {best}. Use it: pmnet segment --head {best} --support {arguments.support} ...")
    return 0
