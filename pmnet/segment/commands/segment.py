"""Segments the images of a folder by a folder of examples.

An interrupted run goes on where it ended.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pmnet.errors import SettingError

if TYPE_CHECKING:
    from pmnet.segment.segmenter import Segmenter

BEST = "best"
HELP = "segment the images of a folder by a folder of examples"


def options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--support", type=Path, help="folder of examples with masks, in any format of the docs' list")
    source.add_argument("--classes", type=Path, help="a class file that --save wrote, instead of examples")
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the masks, overlays and results.csv")
    parser.add_argument(
        "--head",
        help="a run's folder, a checkpoint, a .safetensors file, nearest or prototype; or best, the one of pmnet_lite, "
        "prototype and nearest that segments the examples best by one another",
    )
    parser.add_argument("--negatives", type=Path, help="folder of images that show none of the classes")
    parser.add_argument("--tile", default="auto", help="side of the tiles of large images in pixels, auto or none")
    parser.add_argument("--keep-aspect", action="store_true", help="fit images in instead of squeezing them")
    parser.add_argument("--no-gate", action="store_true", help="keep the masks of classes that seem absent")
    parser.add_argument("--no-overlays", action="store_true", help="write no overlays")
    parser.add_argument("--coco", action="store_true", help="write annotations.json too, in COCO's format")
    parser.add_argument("--save", type=Path, help="write a class file: the method and what it was shown")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if an image failed; the others are done."""
    from pmnet.segment.classfile import check_name
    from pmnet.segment.folder import segment_folder
    from pmnet.segment.recipe import DEFAULT
    from pmnet.segment.segmenter import Segmenter

    tile = tile_of(arguments.tile)
    if arguments.classes and (arguments.head or arguments.negatives or arguments.keep_aspect):
        raise SettingError("A class file holds all this: leave out --head, --negatives and --keep-aspect.")
    if not arguments.images.exists():
        raise SettingError(f"There is no image or folder {arguments.images.absolute()}.")
    if arguments.save:
        check_name(arguments.save)
    without = negatives_of(arguments.negatives)
    head = best(arguments) if arguments.head == BEST else arguments.head
    source = arguments.classes or head or DEFAULT
    segmenter = Segmenter.load(source, arguments.device, True if arguments.keep_aspect else None)
    if arguments.classes and not segmenter.classes:
        raise SettingError(f"{arguments.classes} holds a head, but no classes: pass it as --head, with --support.")
    if arguments.support:
        fit(segmenter, arguments.support, without)
    if arguments.save:
        segmenter.save(arguments.save)
    failed = segment_folder(
        segmenter, arguments.images, arguments.out, tile, not arguments.no_gate, not arguments.no_overlays,
        arguments.coco,
    )  # fmt: skip
    return int(failed > 0)


def best(arguments: argparse.Namespace) -> str:
    """The head that `pmnet compare` names.

    Raises:
        SettingError: no class has two examples, or an example has a mark instead of a mask.
    """
    from pmnet.segment.commands.compare import best_head
    from pmnet.segment.compare import HEADS
    from pmnet.segment.formats import supports_of

    return best_head(supports_of(arguments.support), HEADS, arguments.device, arguments.keep_aspect)


def negatives_of(folder: Path | None) -> list[Path]:
    """The images of a folder; none of None. Raises SettingError if the folder holds no image."""
    from pmnet.segment.images import image_files

    files = image_files(folder) if folder else []
    if folder and not files:
        raise SettingError(f"There is no image in {folder.absolute()}.")
    return files


def fit(segmenter: "Segmenter", support: Path, negatives: list[Path]) -> None:
    """Shows the classes of a folder of examples, and says which.

    Args:
        negatives: images that show none of them.

    Raises:
        SettingError: the folder holds no examples.
        ImageError: a file cannot be read.
    """
    from pmnet.segment.formats import supports_of

    supports = supports_of(support)
    counts = ", ".join(f"{name} ({len(pairs)})" for name, pairs in supports.items())
    print(f"Examples: {counts}; negatives: {len(negatives)}; head: {segmenter.recipe['name']}.", flush=True)
    segmenter.fit(supports, negatives)


def tile_of(text: str) -> int | str | None:
    """Raises SettingError if it is not auto, none or a number."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isdecimal():
        raise SettingError(f"--tile must be auto, none or a side in pixels, not {text!r}.")
    return int(text)
