"""PASCAL-5i: the 20 classes of PASCAL VOC 2012 in four folds of five.

Home: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/; SBD: http://home.bharathh.info/pubs/codes/SBD/download.html.
Licence: images under Flickr's terms of use, for research. 20 classes; fold i holds out classes 5i .. 5i+4.
Lists: those of HSNet; over all folds, 13,680 (image, class) pairs to train on and 1,868 to test on.

As published: VOCtrainval_11-May-2012.tar (VOCdevkit/VOC2012/: JPEGImages/*.jpg, SegmentationClass/*.png,
ImageSets/Segmentation/*.txt) and SBD's benchmark.tgz (benchmark_RELEASE/dataset/cls/*.mat, train.txt, val.txt).
Prepared: JPEGImages/*.jpg; SegmentationClassAug/*.png, index masks with 255 = ignore, from VOC if it has one, else
from SBD; splits/{trn,val}/foldN.txt with a line IMAGE__CC for each image and class (CC from 01).

Everingham, Van Gool, Williams, Winn, Zisserman: The PASCAL Visual Object Classes (VOC) Challenge. IJCV 2010.
Hariharan, Arbelaez, Bourdev, Maji, Malik: Semantic Contours from Inverse Detectors. ICCV 2011.
Shaban, Bansal, Liu, Essa, Boots: One-Shot Learning for Semantic Segmentation. BMVC 2017 (the folds).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.benchmarks.base import MIN_AREA, Areas, Benchmark, stems, write_png
from datamodules.episodes.dataset import FewShotDataset, Fold, Split
from datamodules.episodes.episode import EpisodeSpec
from datamodules.episodes.sampler import Draw, Names, draw_listed
from datamodules.errors import DatasetError
from datamodules.prepare.download import Download
from datamodules.prepare.lists import hsnet
from datamodules.prepare.matlab import fields, numbers, variables
from datamodules.prepare.source import Source, place_all, visible
from datamodules.progress import track

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
LISTS = [f"{part}/fold{fold}.txt" for part in ("trn", "val") for fold in range(4)]


class PascalDataset(Benchmark):
    """PASCAL-5i.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
        coco_folds: which classes to test after training on fold i of COCO-20i. "repri": the classes that the COCO fold
            holds out, so no test class was trained on (RePRI and later work). "standard": the classes of fold i of
            PASCAL-5i, most or all of which were trained on; table 2 of the paper seems to do this.

    Raises:
        DatasetError: `coco_folds` is neither "repri" nor "standard".
    """

    name = "pascal"
    title = "PASCAL-5i"
    test_only = False
    domain = "natural"
    tested_after = ("coco",)
    test_length = 1000
    same_size = True
    classes = tuple(CLASSES)
    folds = tuple(range(5 * fold, 5 * fold + 5) for fold in range(4))
    synonyms = {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
        "pottedplant": "potted plant",
        "sofa": "couch",
        "tvmonitor": "tv",
    }
    obtain = (
        "VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and benchmark.tgz from "
        "http://home.bharathh.info/pubs/codes/SBD/download.html. --download fetches them (2.0, 1.4 GB) and the lists."
    )
    wanted = (
        "*JPEGImages/*.jpg",
        "*SegmentationClass*/*.png",
        "*ImageSets/Segmentation/*.txt",
        "*dataset/cls/*.mat",
        "*dataset/*.txt",
    )
    downloads = (
        Download(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),
        Download(
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            "md5:82b4d87ceb2ed10f6038a1cba92111cb",
        ),
    )
    list_rule = f"{Benchmark.list_rule}; VOC's val for testing, all others for training"
    list_downloads = {path: hsnet(f"pascal/{path}") for path in LISTS}
    published = "8a4800f6cc60e947833ec34d918468e7165eac50e3bd5d08ec6d38a57c85a107"

    def __init__(
        self, root: str, splits: str | None = None, coco_folds: Literal["repri", "standard"] = "repri"
    ) -> None:
        super().__init__(root, splits)
        if coco_folds not in ("repri", "standard"):
            raise DatasetError(f"coco_folds of {self.title} must be one of repri, standard, not {coco_folds}.")
        self.coco_folds = coco_folds

    def target_classes(self, source: FewShotDataset, fold: Fold) -> list[int]:
        if fold == "all" or source.name != "coco":
            return super().target_classes(source, fold)
        if self.coco_folds == "standard":
            return self.novel_classes(fold)
        held_out = {source.common_name(source.classes[c]) for c in source.novel_classes(fold)}
        return [c for c, name in enumerate(self.classes) if self.common_name(name) in held_out]

    # Lists

    @cached_property
    def pairs(self) -> dict[str, list[list[tuple[str, int]]]]:
        """Part -> for each fold, the pairs (image, class id) in the published order."""

        def parse(line: str) -> tuple[str, int]:
            image, _, number = line.rpartition("__")
            if not image or not (number.isdecimal() and len(number) < 3) or not 1 <= int(number) <= len(self.classes):
                raise DatasetError(
                    f"'{line}' in a list of {self.title} ({self.list_folder}) is not IMAGE__CC with CC from 01 to 20. "
                    "Download the lists again."
                )
            return image, int(number) - 1

        return {part: [[parse(line) for line in fold] for fold in folds] for part, folds in self.lists.items()}

    @cached_property
    def by_class(self) -> dict[str, dict[int, Names]]:
        """Part -> class id -> names of its images."""
        return {
            part: {c: Names([n for fold in folds for n, k in fold if k == c]) for c in range(len(self.classes))}
            for part, folds in self.pairs.items()
        }

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return self.by_class["trn" if split == "train" else "val"][class_id]

    def draw(
        self, class_ids: Sequence[int], images: dict[int, Sequence[str]], count: int, shot: int, draw: Draw
    ) -> list[EpisodeSpec]:
        queries = [pair for fold in self.pairs["val"] for pair in fold if pair[1] in class_ids]
        return draw_listed(queries, images, count, shot, draw)

    def read_lists(self, folder: Path) -> Any:
        lines = {path: self.list_text(folder / path).split("\n")[:-1] for path in LISTS}
        return {part: [lines[f"{part}/fold{fold}.txt"] for fold in range(4)] for part in ("trn", "val")}

    def write_lists(self, lists: Any, folder: Path) -> None:
        for part, folds in lists.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            for fold, lines in enumerate(folds):
                (folder / part / f"fold{fold}.txt").write_text("".join(f"{line}\n" for line in lines))

    def build_lists(self, areas: Areas) -> Any:
        to_test = set((self.root / "voc_val.txt").read_text().split())
        lists: dict[str, list[list[str]]] = {"trn": [[], [], [], []], "val": [[], [], [], []]}
        for image, found in areas.items():
            for c in sorted(c for c, pixels in found.items() if pixels >= MIN_AREA):
                lists["val" if image in to_test else "trn"][c // 5].append(f"{image}__{c + 1:02d}")
        return lists

    # Files

    def image_path(self, name: str) -> Path:
        return self.root / "JPEGImages" / f"{name}.jpg"

    def mask_path(self, name: str) -> Path:
        return self.root / "SegmentationClassAug" / f"{name}.png"

    def found(self) -> list[str]:
        return stems(self.root / "SegmentationClassAug", ".png")

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        voc, sbd = "VOC 2012 (VOCtrainval_11-May-2012.tar)", "SBD (benchmark.tgz)"
        images = place_all(visible(source.need("JPEGImages", ".jpg", of=voc), ".jpg"), ready / "JPEGImages", "images")
        to_test = source.need("ImageSets/Segmentation", ".txt", of=voc) / "val.txt"
        if not to_test.is_file():
            raise DatasetError(f"There is no {to_test}. It is part of {voc}: download it again.")
        place_all([to_test], ready, "list")
        (ready / "val.txt").rename(ready / "voc_val.txt")
        masks = ready / "SegmentationClassAug"
        whole = next(source.folders("SegmentationClassAug", ".png"), None)
        if whole:
            count = place_all(visible(whole, ".png"), masks, "masks")
            return [f"{images} images", f"{count} masks of SegmentationClassAug, used unchanged"]
        own = source.need("SegmentationClass", ".png", of=voc)
        place_all(visible(own, ".png"), masks, "VOC's masks")
        mats = visible(source.need("dataset/cls", ".mat", of=sbd), ".mat")
        have = set(stems(own, ".png"))
        added = [mat for mat in mats if mat.stem not in have]
        for mat in track(added, "Converting SBD's masks"):
            write_png(sbd_mask(mat), masks / f"{mat.stem}.png")
        return [f"{images} images", f"{len(have)} masks of VOC 2012", f"{len(added)} masks of SBD, where VOC has none"]


def sbd_mask(path: Path) -> np.ndarray:
    """Reads a mask of SBD: (H, W) uint8, class id + 1, 0 = background; SBD has no ignored pixels."""
    try:
        index = numbers(fields(variables(path.read_bytes())["GTcls"])["Segmentation"])
        if index.ndim != 2 or index.size == 0 or not np.isin(index, range(len(CLASSES) + 1)).all():
            raise ValueError("it is not a matrix of the values 0 to 20")
        return index.astype(np.uint8)
    except Exception as error:  # a damaged file can raise anything
        raise DatasetError(
            f"{path} is not an SBD mask ({error or type(error).__name__}). Download SBD again."
        ) from error
