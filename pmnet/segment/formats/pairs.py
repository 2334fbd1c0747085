"""Which files of a folder belong together: each image with its mask. Files are only listed, never opened.

One mask for all classes, with the same sub-folders in both folders:

    root/images/NAME.jpg      or JPEGImages/NAME.jpg, of any suffix below
    root/masks/NAME.png       or NAME_mask.png; or SegmentationClass/NAME.png, labels/NAME.png, ...

One folder per class, as in FSS-1000, with the masks under one of three names:

    root/CLASS/NAME.jpg       root/CLASS/NAME.png          the image has another suffix than .png
    root/CLASS/NAME.png       root/CLASS/NAME_mask.png     of any suffixes
    root/CLASS/NAME.png       root/CLASS/masks/NAME.png    of any suffixes; the image may be in CLASS/images/

Links to files and to folders are followed.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pmnet.errors import SettingError
from pmnet.segment.images import SUFFIXES

IMAGES = ("images", "jpegimages", "imgs", "image", "img")
MASKS = ("masks", "mask", "segmentationclass", "segmentationclasspng", "labels", "annotations")
MASK = "_mask"  # ends the name of a mask
NAMES = (
    "Understood names of an image and its mask: images/NAME.* and masks/NAME.* or masks/NAME_mask.*; or in a folder "
    "per class, CLASS/NAME.jpg and CLASS/NAME.png, or CLASS/NAME.* and CLASS/NAME_mask.* or CLASS/masks/NAME.* "
    f"(* is any of {', '.join(sorted(s[1:] for s in SUFFIXES))})."
)


class Pair(NamedTuple):
    """The files of an image and its mask."""

    image: Path
    mask: Path


def mask_folders(root: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks for all classes, if there are both."""
    folders = {p.name.lower(): p for p in sorted(root.iterdir()) if p.is_dir()}
    images = next((folders[name] for name in IMAGES if name in folders), None)
    masks = next((folders[name] for name in MASKS if name in folders and holds_masks(folders[name])), None)
    return (images, masks) if images and masks else None


def holds_masks(folder: Path) -> bool:
    """Whether a folder of one of these names is meant for masks; YOLO and COCO have labels/ and annotations/ too."""
    return folder.name.lower() not in ("labels", "annotations") or any(is_image(path) for path in walk(folder))


def pairs_of_folders(images: Path, masks: Path) -> dict[str, Pair]:
    """The pairs of two folders.

    Args:
        images: the folder of images.
        masks: the folder of masks. If it is VOC's SegmentationClass, images without a mask are left out.

    Returns:
        NAME -> pair, sorted by name.

    Raises:
        SettingError: there are no images, or a file has no partner or more than one.
    """
    found: dict[str, list[Path]] = by_name((p for p in walk(images) if is_image(p)), images)
    of_masks = by_name((p for p in walk(masks) if is_image(p)), masks)
    if not found:
        raise SettingError(f"{images} contains no images. {NAMES}")
    if masks.name.lower().startswith("segmentationclass"):
        found = {name: files for name, files in found.items() if name in of_masks or name + MASK in of_masks}
    return dict(match(found, of_masks))


def pairs_by_class(root: Path) -> dict[str, Pair]:
    """The pairs of the layout with one folder per class.

    Args:
        root: folder that contains the class folders; hidden folders are skipped.

    Returns:
        "CLASS/NAME" -> pair, sorted by class and name; empty if no folder has images.

    Raises:
        SettingError: a file has no partner or more than one.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return {f"{folder.name}/{name}": pair for folder in folders for name, pair in pairs_of_one(folder).items()}


def pairs_of_one(folder: Path) -> dict[str, Pair]:
    """The pairs of one folder, in which images and masks lie together or masks in masks/.

    Returns:
        NAME -> pair, sorted by name; empty if there are no images.

    Raises:
        SettingError: a file has no partner or more than one.
    """
    images = by_name(image_files(folder / "images"), folder / "images")
    masks = by_name(image_files(folder / "masks"), folder / "masks")
    for name, files in (groups := by_name(image_files(folder), folder)).items():
        png = [p for p in files if p.suffix.lower() == ".png"]
        if len(files) == 2 and len(png) == 1:  # NAME.jpg and NAME.png
            images[name] += [p for p in files if p not in png]
            masks[name] += png
        elif name.endswith(MASK) and name.removesuffix(MASK) in groups:
            masks[name] += files
        else:
            images[name] += files
    return dict(match(images, masks))


Groups = defaultdict[str, list[Path]]  # name without suffix -> the files of this name


def match(images: dict[str, list[Path]], masks: Groups) -> Iterator[tuple[str, Pair]]:
    """NAME and pair of each image, sorted by name. Raises SettingError for a file without exactly one partner."""
    masks_of = Groups(list)
    for name, files in masks.items():
        masks_of[name if name in images else name.removesuffix(MASK)] += files
    for what, groups in (("images", images), ("masks", masks_of)):
        for name, paths in groups.items():
            if len(paths) > 1:
                first, second = sorted(paths)[:2]
                raise SettingError(
                    f"{first} and {second} are both {what} of the name {name}. Keep one of them. {NAMES}"
                )
    alone = sorted(images.keys() ^ masks_of.keys())
    if alone:
        (file,) = images.get(alone[0]) or masks_of[alone[0]]
        raise SettingError(
            f"{file} has no partner: an image needs a mask, and a mask its image ({len(alone)} such files in this "
            f"folder). {NAMES} Add the missing file, or remove this one."
        )
    for name in sorted(images):
        yield name, Pair(images[name][0], masks_of[name][0])


def by_name(files: Iterable[Path], folder: Path) -> Groups:
    """The files by their path in a folder, without suffix."""
    groups = Groups(list)
    for path in files:
        groups[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    return groups


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder itself, sorted, without hidden ones; none if there is no such folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in files if is_image(p) and not p.name.startswith("."))


def walk(root: Path) -> list[Path]:
    """All files of a folder and of those below it, sorted, without hidden ones; none if there is no such folder."""
    found, seen = list[str](), set[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        found += [os.path.join(folder, name) for name in files if not name.startswith(".") and real not in seen]
        seen.add(real)
    return sorted(map(Path, found))
