"""Which files of a folder belong together: each image with its mask. Files are only listed, never opened.

Index masks, as in CamVid and Cityscapes and as written by most labelling tools:

    root/images/NAME.jpg      of any suffix below
    root/masks/NAME.png       or NAME_mask.png

One folder per class, as in FSS-1000, with the masks under one of three names:

    root/CLASS/NAME.jpg       root/CLASS/NAME.png          the image has another suffix than .png
    root/CLASS/NAME.png       root/CLASS/NAME_mask.png     of any suffixes
    root/CLASS/NAME.png       root/CLASS/masks/NAME.png    of any suffixes

Links to files and to folders are followed.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import DatasetError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
MASK = "_mask"  # ends the name of a mask
UNDERSTOOD = (
    "Understood names of an image and its mask: images/NAME.* and masks/NAME.* or masks/NAME_mask.*; or in a folder "
    "per class, CLASS/NAME.jpg and CLASS/NAME.png, or CLASS/NAME.* and CLASS/NAME_mask.* or CLASS/masks/NAME.* "
    f"(* is any of {', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))})."
)


class Pair(NamedTuple):
    """The files of an image and its mask."""

    image: Path
    mask: Path


def has_index_masks(root: Path) -> bool:
    """Whether a folder has the layout with index masks."""
    return (root / "images").is_dir() and (root / "masks").is_dir()


def pairs_of_index_masks(root: Path) -> dict[str, Pair]:
    """The pairs of the layout with index masks.

    Args:
        root: folder that contains images/ and masks/.

    Returns:
        NAME -> pair, sorted by name.

    Raises:
        DatasetError: there are no images, or a file has no partner or more than one.
    """
    images = image_files(root / "images")
    if not images:
        raise DatasetError(f"{root / 'images'} contains no images. {UNDERSTOOD}")
    return dict(match(images, image_files(root / "masks")))


def pairs_by_class(root: Path) -> dict[str, Pair]:
    """The pairs of the layout with one folder per class.

    Args:
        root: folder that contains the class folders; hidden folders are skipped.

    Returns:
        "CLASS/NAME" -> pair, sorted by class and name.

    Raises:
        DatasetError: there are no pairs, or a file has no partner or more than one.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    pairs = {f"{folder.name}/{name}": pair for folder in folders for name, pair in pairs_of_class(folder)}
    if not pairs:
        raise DatasetError(
            f"{root.absolute()} has neither images/ and masks/ nor folders of classes with images and masks. "
            f"{UNDERSTOOD} Rename or move the files, or check dataset.root."
        )
    return pairs


def pairs_of_class(folder: Path) -> Iterator[tuple[str, Pair]]:
    """NAME and pair of each image in the folder of one class."""
    images, masks = [], image_files(folder / "masks")
    for stem, files in (groups := by_stem(image_files(folder))).items():
        png = [p for p in files if p.suffix.lower() == ".png"]
        if len(files) == 2 and len(png) == 1:  # NAME.jpg and NAME.png
            images += [p for p in files if p not in png]
            masks += png
        elif stem.endswith(MASK) and stem.removesuffix(MASK) in groups:
            masks += files
        else:
            images += files
    return match(images, masks)


def match(images: Sequence[Path], masks: Sequence[Path]) -> Iterator[tuple[str, Pair]]:
    """NAME and pair of each image, sorted by name. Raises DatasetError for a file without exactly one partner."""
    images_of, masks_of = by_stem(images), defaultdict[str, list[Path]](list)
    for path in sorted(masks):
        masks_of[path.stem if path.stem in images_of else path.stem.removesuffix(MASK)].append(path)
    for what, files in (("images", images_of), ("masks", masks_of)):
        for name, paths in files.items():
            if len(paths) > 1:
                first, second = paths[:2]
                raise DatasetError(
                    f"{first} and {second} are both {what} of the name {name}. Keep one of them. {UNDERSTOOD}"
                )
    alone = sorted(images_of.keys() ^ masks_of.keys())
    if alone:
        (file,) = images_of.get(alone[0]) or masks_of[alone[0]]
        raise DatasetError(
            f"{file} has no partner: an image needs a mask, and a mask its image ({len(alone)} such files in this "
            f"folder). {UNDERSTOOD} Add the missing file, or remove this one."
        )
    for name in sorted(images_of):
        yield name, Pair(images_of[name][0], masks_of[name][0])


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, sorted, without hidden ones; none if there is no such folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def by_stem(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Stem -> the files with this stem."""
    groups = defaultdict[str, list[Path]](list)
    for path in files:
        groups[path.stem].append(path)
    return groups
