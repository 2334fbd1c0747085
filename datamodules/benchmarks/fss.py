"""FSS-1000: 1,000 classes of everyday objects with ten images each.

Home: https://github.com/HKUSTCV/FSS-1000. Licence: none was found; for research.
Classes: 1,000; 520 for training, 240 for validation, 240 for testing; no folds. 10,000 images of 224x224.
Lists: those of HSNet. Their test classes are the official ones; training and validation classes were split at random.

As published: fewshot_data.zip with <class>/1.jpg .. 10.jpg and <class>/1.png .. 10.png (black and white).
Prepared: the same folders; splits/{trn,val,test}.txt.

Li, Wei, Chen, Tai, Tang: FSS-1000: A 1000-Class Dataset for Few-Shot Segmentation. CVPR 2020.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.benchmarks.base import Areas, Benchmark, binary_mask
from datamodules.episodes.dataset import FewShotDataset, Fold, Split
from datamodules.episodes.episode import EpisodeSpec
from datamodules.episodes.sampler import Draw, draw_listed
from datamodules.errors import DatasetError
from datamodules.prepare.lists import hsnet
from datamodules.prepare.source import Source, place_all

PARTS = ("trn", "val", "test")
PER_CLASS = 10


class FSSDataset(Benchmark):
    """FSS-1000. It has one split instead of folds, so the only fold is 0. A mask shows only the class of its folder.

    Args:
        root: the prepared folder.
        splits: folder with lists to use instead of the prepared ones.
    """

    name = "fss"
    title = "FSS-1000"
    test_only = False
    domain = "natural"
    tested_after = ("coco", "pascal")
    test_length = 2400
    obtain = (
        "fewshot_data.zip (or FSS-1000.zip), linked at https://github.com/HKUSTCV/FSS-1000. --download fetches the "
        "lists."
    )
    wanted = ("*/*.jpg", "*/*.png")
    list_rule = "classes sorted by name and split at 52% and 76%; this is not the published split"
    list_downloads = {f"{part}.txt": hsnet(f"fss/{part}.txt") for part in PARTS}
    published = "619c083adcfa74e2e7dc23ba74e94221e70c8010b18132520849d848badf99a7"

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names sorted within each part, in the order of the published class ids."""
        return tuple(name for part in PARTS for name in sorted(self.lists[part]))

    @cached_property
    def folds(self) -> tuple[range, ...]:  # type: ignore[override]
        return (self.ids_of("test"),)

    def ids_of(self, part: str) -> range:
        """Class ids of a part: "trn", "val" or "test"."""
        first = sum(len(self.lists[p]) for p in PARTS[: PARTS.index(part)])
        return range(first, first + len(self.lists[part]))

    def base_classes(self, fold: Fold) -> list[int]:
        return super().base_classes("all") if fold == "all" else list(self.ids_of("trn"))

    def validation_classes(self, fold: Fold) -> list[int]:
        return list(self.ids_of("val"))

    def target_classes(self, source: FewShotDataset, fold: Fold) -> list[int]:
        return list(self.ids_of("test"))

    @classmethod
    def fill(cls, source: Source, ready: Path) -> list[str]:
        classes = {p.parent.name: p.parent for p in sorted(source.files("1.jpg")) if p.name == "1.jpg"}
        if not classes:
            raise DatasetError(f"No <class>/1.jpg in {', '.join(map(str, source.paths))}. Download {cls.obtain}")
        for name, folder in classes.items():
            files = [folder / f"{i}{suffix}" for i in range(1, PER_CLASS + 1) for suffix in (".jpg", ".png")]
            missing = [f.name for f in files if not f.is_file()]
            if missing:
                raise DatasetError(
                    f"{folder} lacks {', '.join(missing)}. Each class has 1 to {PER_CLASS}: download FSS-1000 again."
                )
            place_all(files, ready / name, name)
        return [f"{len(classes)} classes (published: 1,000)"]

    def found(self) -> list[str]:
        return sorted(f"{p.parent.name}/{p.name}" for p in self.root.glob("*/*.jpg"))

    def build_lists(self, areas: Areas) -> Any:
        names = sorted({image.split("/")[0] for image in areas})
        a, b = round(0.52 * len(names)), round(0.76 * len(names))
        return {"trn": names[:a], "val": names[a:b], "test": names[b:]}

    def write_lists(self, lists: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in lists[part]))

    def read_lists(self, folder: Path) -> Any:
        return {part: self.list_text(folder / f"{part}.txt").split("\n")[:-1] for part in PARTS}

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        return [f"{self.classes[class_id]}/{i}.jpg" for i in range(1, PER_CLASS + 1)]

    def draw(
        self, class_ids: Sequence[int], images: dict[int, Sequence[str]], count: int, shot: int, draw: Draw
    ) -> list[EpisodeSpec]:
        """Each image becomes the query once, in the order of the file names: 1.jpg, 10.jpg, 2.jpg, ..."""
        queries = [(name, c) for c in class_ids for name in sorted(images[c])]
        return draw_listed(queries, images, count, shot, draw)

    def image_path(self, name: str) -> Path:
        return self.root / name

    def mask_path(self, name: str) -> Path:
        return (self.root / name).with_suffix(".png")

    def read_index(self, name: str) -> Tensor:
        """(H, W) uint8: 1 = the class of the image's folder, 0 = background; a mask cannot hold 1,000 class ids."""
        return binary_mask(self.mask_path(name))

    def of_class(self, index: Tensor, class_id: int) -> Tensor:
        return index
