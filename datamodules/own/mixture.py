"""Several datasets as one: each episode is of one class of one of them."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, Split
from datamodules.episodes.episode import IGNORE
from datamodules.errors import DatasetError
from datamodules.inventory import Pixels


class MixtureDataset(FewShotDataset):
    """A mixture of datasets, whose classes are trained on equally often.

    The i-th fold holds out the classes of every dataset's i-th fold.

    Args:
        sources: name -> dataset. Classes are named "NAME/CLASS", images "NAME:IMAGE".

    Raises:
        DatasetError: there is no dataset, or they have more than 254 classes together.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> mixture = MixtureDataset({n: SyntheticDataset(64, 2, seed) for seed, n in enumerate(["a", "b"])})
        >>> mixture.classes[20], mixture.novel_classes(0), mixture.images_of(20, "test")[0]
        ('b/striped disc', [0, 1, 2, 3, 4, 20, 21, 22, 23, 24], 'b:striped disc 1000000')
    """

    name = "mixture"
    leaves_out_rare = True
    balanced = True

    def __init__(self, sources: Mapping[str, FewShotDataset]) -> None:
        if not sources:
            raise DatasetError(
                "A mixture needs datasets. Set dataset.sources, as conf/experiment/pmnet_lite.yaml does."
            )
        self.sources = dict(sources)
        self.classes = [f"{name}/{c}" for name, source in sources.items() for c in source.classes]
        if len(self.classes) >= IGNORE:
            raise DatasetError(f"A mixture has at most {IGNORE - 1} classes, not {len(self.classes)}.")
        self.first = {name: self.classes.index(f"{name}/{source.classes[0]}") for name, source in sources.items()}
        count = min(len(source.folds) for source in sources.values())
        self.folds = [
            [self.first[name] + c for name, source in sources.items() for c in source.folds[fold]]
            for fold in range(count)
        ]
        self.splits = "; ".join(f"{name}: {source.splits}" for name, source in sources.items())

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        name = self.classes[class_id].partition("/")[0]
        return [f"{name}:{image}" for image in self.sources[name].images_of(class_id - self.first[name], split)]

    def read_image(self, name: str) -> Tensor:
        source, _, image = name.partition(":")
        return self.sources[source].read_image(image)

    def read_index(self, name: str) -> Tensor:
        source, _, image = name.partition(":")
        index = self.sources[source].read_index(image)
        return index + self.first[source] * ((index != 0) & (index != IGNORE)).to(index.dtype)

    def pixels(self, names: Iterable[str]) -> dict[str, Pixels]:
        found: dict[str, Pixels] = {}
        for source, images in self.by_source(names).items():
            for image, counts in self.sources[source].pixels(images).items():
                first = self.first[source]
                found[f"{source}:{image}"] = {
                    value + first * (value not in (0, IGNORE)): number for value, number in counts.items()
                }
        return found

    def by_source(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Source -> its own names of images."""
        groups: dict[str, list[str]] = {source: [] for source in self.sources}
        for name in names:
            source, _, image = name.partition(":")
            groups[source].append(image)
        return groups

    def check(self, names: Iterable[str]) -> None:
        for source, images in self.by_source(names).items():
            self.sources[source].check(images)

    def fingerprint(self) -> str:
        return "; ".join(f"{name}: {source.fingerprint()}" for name, source in self.sources.items())

    @classmethod
    def common_name(cls, name: str) -> str:
        return super().common_name(name.rpartition("/")[2])
