"""COCO-20i: the 80 classes of COCO 2014 in four folds of twenty.

Home: https://cocodataset.org. Licence: annotations CC BY 4.0, images under Flickr's terms of use.
82,783 images in train2014, 40,504 in val2014. 80 classes in the order of the category ids, numbered from 0; fold i
holds out classes i, i+4, i+8, ...
Lists: those of HSNet; for each class, images of train2014 to train on and images of val2014 to test on.

As published: train2014.zip, val2014.zip (COCO_train2014_000000000009.jpg), annotations_trainval2014.zip
(annotations/instances_{train,val}2014.json).
Prepared: train2014/*.jpg, val2014/*.jpg; annotations/{train,val}2014/*.png, index masks painted from the annotations
(class id + 1); splits/coco20i.json.gz, {"trn" | "val": {class: [image numbers]}}.

Lin, Maire, Belongie, Hays, Perona, Ramanan, Dollar, Zitnick: Microsoft COCO: Common Objects in Context. ECCV 2014.
Nguyen, Todorovic: Feature Weighting and Boosting for Few-Shot Segmentation. ICCV 2019 (the folds).
"""

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from datamodules.benchmarks.base import MIN_AREA, Areas, Benchmark, stems, write_png
from datamodules.episodes.dataset import Split
from datamodules.episodes.episode import EpisodeSpec
from datamodules.episodes.sampler import Draw, Names, draw_any_class
from datamodules.errors import DatasetError
from datamodules.prepare.download import Download
from datamodules.prepare.lists import hsnet, read_pickle
from datamodules.prepare.source import Source, place_all, visible
from datamodules.progress import track

CLASSES = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|"
    "bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|"
    "skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|"
    "cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|"
    "potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|"
    "refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
).split("|")
YEARS = {"trn": "train2014", "val": "val2014"}
LARGEST_LISTS = 1 << 26  # characters; the published ones have 3 million
LARGEST_SIDE = 1 << 12  # of an image; COCO's have up to 640 pixels
PICKLES = [f"{part}/fold{fold}.pkl" for part in YEARS for fold in range(4)]
Job = tuple[str, int, int, list[tuple[int, Any]]]  # file name, height, width, [(class id, segmentation), ...]


class CocoDataset(Benchmark):
    """COCO-20i. Training samples the class first, as published.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
    """

    name = "coco"
    title = "COCO-20i"
    test_only = False
    domain = "natural"
    balanced = True  # classes have from 53 to 40,118 training images
    test_length = 1000
    same_size = True
    classes = tuple(CLASSES)
    folds = tuple(range(fold, 80, 4) for fold in range(4))
    obtain = (
        "train2014.zip, val2014.zip and annotations_trainval2014.zip from https://cocodataset.org/#download. "
        "--download fetches these files (13, 6 and 0.2 GB) and the lists."
    )
    wanted = ("*train2014/*.jpg", "*val2014/*.jpg", "*annotations/instances_*2014.json")
    downloads = (
        Download("http://images.cocodataset.org/zips/train2014.zip", "md5:0da8c0bd3d6becc4dcb32757491aca88"),
        Download("http://images.cocodataset.org/zips/val2014.zip", "md5:a3d79f5ed8d289b7a7554ce06a5782b3"),
        Download(
            "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
            "md5:0a379cfc70b0e71301e0f377548639bd",
        ),
    )
    list_downloads = {path: hsnet(f"coco/{path}") for path in PICKLES}
    published = "14c842b5bd707c2b8d0e1757f3a4d8de2b08389cec67c418403954006df8252b"

    # Lists

    @cached_property
    def by_class(self) -> dict[str, dict[int, Names]]:
        names = {y: f"{year}/COCO_{year}_{{:012d}}.jpg".format for y, year in YEARS.items()}
        return {
            part: {int(c): Names([names[part](number) for number in numbers]) for c, numbers in lists.items()}
            for part, lists in self.lists.items()
        }

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self.by_class["trn" if split == "train" else "val"][class_id]

    def draw(
        self, class_ids: Sequence[int], images: dict[int, Sequence[str]], count: int, shot: int, draw: Draw
    ) -> list[EpisodeSpec]:
        return draw_any_class(images, count, shot, draw)

    def read_lists(self, folder: Path) -> Any:
        """Reads coco20i.json.gz or the published pickles. Raises DatasetError if there are no valid lists."""
        path = folder / "coco20i.json.gz"
        if not path.exists() and (folder / PICKLES[0]).exists():
            return merge({pickle: read_pickle(folder / pickle) for pickle in PICKLES})
        try:
            with gzip.open(path, "rt") as file:
                lists = json.loads(file.read(LARGEST_LISTS))
            lists = {part: {str(c): lists[part].get(str(c), []) for c in range(len(CLASSES))} for part in YEARS}
            if not all(type(number) is int for part in lists.values() for n in part.values() for number in n):
                raise ValueError("it must hold the numbers of the images of each class")
        except FileNotFoundError as error:
            raise self.absent(path) from error
        except Exception as error:  # a damaged file can raise anything
            raise self.invalid(path, error) from error
        return lists

    def write_lists(self, lists: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(lists, separators=(",", ":"))
        (folder / "coco20i.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))

    def build_lists(self, areas: Areas) -> Any:
        lists: dict[str, dict[str, list[int]]] = {part: {str(c): [] for c in range(len(CLASSES))} for part in YEARS}
        for image, found in areas.items():
            part = "trn" if image.startswith("train") else "val"
            for c, pixels in found.items():
                if pixels >= MIN_AREA:
                    lists[part][str(c)].append(number_of(image))
        return lists

    # Files

    def image_path(self, name: str) -> Path:
        return self.root / name

    def mask_path(self, name: str) -> Path:
        return self.root / "annotations" / f"{name[:-4]}.png"

    def found(self) -> list[str]:
        folder = self.root / "annotations"
        return [f"{year}/{stem}.jpg" for year in YEARS.values() for stem in stems(folder / year, ".png")]

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        notes = []
        for year in YEARS.values():
            images = place_all(visible(source.need(year, ".jpg", of=f"{year}.zip"), ".jpg"), ready / year, year)
            annotations = next(source.files(f"instances_{year}.json"), None)
            if annotations is None:
                raise DatasetError(f"There is no instances_{year}.json. It is part of annotations_trainval2014.zip.")
            masks = paint(annotations, ready / "annotations" / year)
            notes.append(f"{year}: {images} images, {masks} with annotations")
        return [*notes, "masks: class id + 1; annotations painted in their order, later over earlier, crowds included"]


def paint(annotations: Path, folder: Path) -> int:
    """Paints the index mask of every annotated image, on all CPU cores.

    Args:
        annotations: instances_*2014.json.
        folder: where to write the masks; it is created if missing.

    Returns:
        Number of masks.

    Raises:
        DatasetError: the file is not a COCO annotation file.
    """
    jobs = jobs_of(annotations)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [jobs[i : i + 200] for i in range(0, len(jobs), 200)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for _ in track(pool.map(partial(paint_images, folder), chunks), f"Painting {folder.name}", len(chunks)):
            pass
    return len(jobs)


def jobs_of(annotations: Path) -> list[Job]:
    """The annotated images in a file. Raises DatasetError if it is not a COCO annotation file."""
    try:
        content = json.loads(annotations.read_bytes())
        class_ids = {k["id"]: CLASSES.index(k["name"]) for k in content["categories"]}
        of_image = defaultdict(list)
        for a in content["annotations"]:
            of_image[a["image_id"]].append((class_ids[a["category_id"]], a["segmentation"]))
        return [(i["file_name"], *size_of(i), of_image[i["id"]]) for i in content["images"] if i["id"] in of_image]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{annotations} is not a COCO annotation file ({error!r}). Download it again.") from error


def size_of(image: dict[str, Any]) -> tuple[int, int]:
    """Height and width that the annotations give for an image. Raises ValueError if no photo has such a size."""
    height, width = image["height"], image["width"]
    if not (type(height) is type(width) is int and 0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE):
        raise ValueError(f"{image['file_name']} has {height} x {width} pixels")
    return height, width


def paint_images(folder: Path, jobs: Sequence[Job]) -> None:
    """Paints the masks of some images. Raises DatasetError if an annotation is invalid."""
    for file_name, height, width, segments in jobs:
        index = np.zeros((height, width), np.uint8)
        try:
            path = folder / f"{Path(file_name).stem}.png"
            for class_id, segmentation in segments:
                index[outlined(segmentation, height, width)] = class_id + 1
            write_png(index, path)
        except Exception as error:  # a damaged file can make pycocotools raise anything
            raise DatasetError(
                f"The annotations of {file_name} cannot be painted ({error!r}). Download annotations_trainval2014.zip "
                "again, and check free space and permissions."
            ) from error


def outlined(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Where an annotation is, (height, width) bool. Raises ValueError for what pycocotools would read beyond memory."""
    if isinstance(segmentation, list):
        if any(not np.all(np.abs(np.array(polygon, float)) <= 2 * LARGEST_SIDE) for polygon in segmentation):
            raise ValueError("a polygon lies far outside the image")
        packed = rle.merge(rle.frPyObjects(segmentation, height, width))
    else:
        if segmentation["size"] != [height, width]:
            raise ValueError(f"a mask has the size {segmentation['size']}, the image {[height, width]}")
        runs = segmentation["counts"]
        if isinstance(runs, list) and (min(runs) < 0 or sum(runs) != height * width):
            raise ValueError("the runs of a mask do not add up to the image")
        packed = rle.frPyObjects(segmentation, height, width) if isinstance(runs, list) else segmentation
    return rle.decode(packed) > 0


def number_of(image: str) -> int:
    """The number in an image's name.

    Example:
        >>> number_of("train2014/COCO_train2014_000000000009.jpg")
        9
    """
    return int(image[-16:-4])


def merge(pickles: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Merges the published pickles: path -> {class id: [image, ...]} to part -> class id -> image numbers."""
    lists: dict[str, dict[str, list[int]]] = {part: {str(c): [] for c in range(len(CLASSES))} for part in YEARS}
    for path, content in pickles.items():
        try:
            for class_id, images in content.items():
                lists[path.split("/")[0]][str(range(len(CLASSES))[class_id])] = [number_of(image) for image in images]
        except (AttributeError, ValueError, TypeError, LookupError) as error:
            raise DatasetError(
                f"{path} is not a list of COCO-20i, {{class id: [image, ...]}} ({error!r}). Download it again."
            ) from error
    return lists
