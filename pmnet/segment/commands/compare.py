"""Compares heads on a folder of examples: each example is segmented by the others of its class."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pmnet.errors import SettingError

HELP = "which head suits your examples best: each is segmented by the others"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--support", type=Path, required=True, help="folder of examples with masks, in any format of the docs' list"
    )
    parser.add_argument(
        "--heads", nargs="+", metavar="HEAD",
        help="each as for pmnet segment --head (default: pmnet_lite prototype nearest)",
    )  # fmt: skip
    parser.add_argument("--keep-aspect", action="store_true", help="fit images in instead of squeezing them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def run(arguments: argparse.Namespace) -> int:
    from pmnet.segment.compare import HEADS
    from pmnet.segment.formats import supports_of

    heads = arguments.heads or HEADS
    if "best" in heads:
        raise SettingError("best is a choice of pmnet segment, not a head. A folder of that name is ./best.")
    best = best_head(supports_of(arguments.support), heads, arguments.device, arguments.keep_aspect)
    if len(set(heads)) > 1:
        words = ["pmnet", "segment", "--head", best, "--support", str(arguments.support)]
        print(f"Best mean: {best}. With few examples, a few points mean little. To use it:")
        print(shlex.join([*words, *(["--keep-aspect"] if arguments.keep_aspect else [])]), "--images ... --out ...")
    return 0


def best_head(supports: Mapping[str, Sequence], heads: Sequence[str | Path], device: str, keep_aspect: bool) -> str:
    """Prints the table of `compare` and returns the head with the best mean. Raises what `compare` raises."""
    from pmnet.segment.compare import MOST, compare, means

    found = compare(supports, heads, device, keep_aspect)
    classes, mean = list(next(iter(found.values()))), means(found)
    width = max(len(name) for name in ["class", *classes])
    print(f"IoU in percent; up to {MOST} examples of a class are each segmented by the others:")
    print("class".ljust(width), "examples", *found, sep="  ")
    for name in classes:
        cells = (f"{100 * found[head][name]:.1f}".rjust(len(head)) for head in found)
        print(name.ljust(width), f"{len(supports[name]):8}", *cells, sep="  ")
    print("mean".ljust(width), " " * 8, *(f"{100 * mean[head]:.1f}".rjust(len(head)) for head in found), sep="  ")
    if alone := [name for name in supports if name not in classes]:
        print(f"Left out, as they have one example: {', '.join(alone)}.")
    return next(iter(mean))
