"""What a test is: which episodes are drawn, what size their images get, where masks are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from datamodules.episodes.episode import EpisodeSpec
from datamodules.episodes.sampler import PythonDraw, draw_any_class, draw_each_image
from datamodules.errors import DatasetError

if TYPE_CHECKING:
    from datamodules.episodes.dataset import FewShotDataset


@dataclass(frozen=True)
class Protocol:
    """The conventions of a published test. `conf/protocol/` has one file for each.

    Attributes:
        name: name of the convention.
        draw: "benchmark": the list of the benchmark that is tested, as its programs draw it, see `sampler.py`;
            "images": every image is a query in turn, its class is drawn among the tested ones that it shows;
            "classes": a class is drawn, then a query and supports among its images.
        split: the images that "images" and "classes" draw from, "test" or "train".
        episodes: number of episodes in a list, or dataset -> number; None, or a dataset that is not named: as many as
            in the published test of the dataset.
        seed: seed of the first list; each further list has the next one.
        lists: number of lists. Scores are means over them.
        fit: how images get the network's size. "squeeze" resizes them to it. "pad" keeps their aspect ratio: the longer
            side becomes the network's side, both sides are rounded down to a multiple of 8, and what remains below and
            to the right is black, and marked 255 in masks.
        scored: where masks are compared: at the "network"'s size, or at the "photo"'s own, to which logits are resized.

    Raises:
        DatasetError: a value is not one of the above.

    Example:
        >>> from datamodules.own.synthetic import SyntheticDataset
        >>> dataset = SyntheticDataset(size=64, images_per_class=3, seed=0)
        >>> pfenet = Protocol("pfenet", draw="images", episodes={"pascal": 5000}, seed=321)
        >>> pfenet.count(dataset), len(pfenet.sample(dataset, [0, 1], 4, shot=1, seed=321))
        (1000, 4)
    """

    name: str
    draw: str = "benchmark"
    split: Literal["train", "test"] = "test"
    episodes: int | Mapping[str, int] | None = None
    seed: int = 0
    lists: int = 1
    fit: str = "squeeze"
    scored: str = "network"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "draw": ("benchmark", "images", "classes"),
            "split": ("test", "train"),
            "fit": ("squeeze", "pad"),
            "scored": ("network", "photo"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise DatasetError(f"protocol.{name} must be one of {', '.join(known)}, not {getattr(self, name)}.")
        if self.lists < 1:
            raise DatasetError(f"protocol.lists must be 1 or more, not {self.lists}.")

    def count(self, dataset: "FewShotDataset") -> int:
        """Number of episodes in a test list of a dataset."""
        numbers = self.episodes
        return (numbers.get(dataset.name) if isinstance(numbers, Mapping) else numbers) or dataset.test_length

    def sample(
        self,
        dataset: "FewShotDataset",
        class_ids: Sequence[int],
        count: int,
        shot: int,
        seed: int,
        repeats: bool | None = None,
    ) -> list[EpisodeSpec]:
        """Samples a list of test episodes. Arguments as of `FewShotDataset.test_episodes`.

        Raises:
            DatasetError: a class has too few images and may not be left out, or no class is left.
        """
        if self.draw == "benchmark":
            return dataset.test_episodes(class_ids, count, shot, repeats, seed)
        draw = PythonDraw(bool(repeats), seed)
        images = dataset.images(class_ids, self.split, 1 if draw.repeats else shot)
        return (draw_each_image if self.draw == "images" else draw_any_class)(images, count, shot, draw)

    def record(self) -> dict[str, Any]:
        """What it does, as plain values for `results.json`."""
        return {name: getattr(self, name) for name in ("name", "draw", "split", "fit", "scored")}


HSNET = Protocol("hsnet")
