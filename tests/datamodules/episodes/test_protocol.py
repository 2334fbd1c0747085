"""The draws, sizes and masks of published tests, against literal loops written from descriptions of their programs."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.command import config
from datamodules.episodes.dataset import FewShotDataset
from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.protocol import HSNET, Protocol
from datamodules.episodes.sampler import list_hash
from datamodules.errors import DatasetError
from datamodules.own.synthetic import SyntheticDataset
from pmnet.methods import all_methods
from tests.datamodules.episodes.test_episodes import SETTING


class Shared(FewShotDataset):
    """Twelve photos of 50x80 or 80x50 pixels; number i shows class i % 4, and class 3 too if i is even."""

    name, splits, classes, folds = "shared", "twelve images", ["a", "b", "c", "d"], [[2, 3], [0, 1]]

    def shows(self, i: int) -> set[int]:
        return {i % 4, 3} if i % 2 == 0 else {i % 4}

    def images_of(self, class_id, split):
        return [f"{i:02d}" for i in range(12) if class_id in self.shows(i)]

    def read_image(self, name):
        return torch.full((3, *self.size(name)), 100, dtype=torch.uint8)

    def read_index(self, name):
        index = torch.zeros(self.size(name), dtype=torch.uint8)
        for c in self.shows(int(name)):
            index[:, 10 * c : 10 * c + 10] = c + 1
        return index

    def size(self, name):
        return (50, 80) if int(name) % 3 else (80, 50)


def test_pfenet_draws_a_class_and_supports_for_each_image():
    data, shot = Shared(), 2
    generator = random.Random(321)
    expected = []
    queries = [f"{i:02d}" for i in range(12) if data.shows(i) & {2, 3}]
    for i in range(20):
        query = queries[i % len(queries)]
        labels = sorted(data.shows(int(query)) & {2, 3})
        chosen = labels[generator.randint(1, len(labels)) - 1]
        files = [f"{k:02d}" for k in range(12) if chosen in data.shows(k)]
        taken: list[int] = []
        for _ in range(shot):
            k = generator.randint(1, len(files)) - 1
            while files[k] == query or k in taken:
                k = generator.randint(1, len(files)) - 1
            taken.append(k)
        expected.append([query, [files[k] for k in taken], chosen])
    drawn = Protocol("pfenet", draw="images", seed=321).sample(data, [2, 3], 20, shot, 321)
    assert [spec.row() for spec in drawn] == expected
    assert list_hash(drawn)[:12] == "d039793c590b"


def test_panet_draws_classes_from_training_images():
    data = SyntheticDataset(size=64, images_per_class=4, seed=0)
    drawn = Protocol("panet", draw="classes", split="train").sample(data, [1, 4], 200, 3, 1234)
    names = {c: set(data.images_of(c, "train")) for c in (1, 4)}
    assert all({s.query, *s.supports} == names[s.class_id] for s in drawn)  # 4 images: each episode has all of them
    assert 70 < sum(s.class_id == 1 for s in drawn) < 130
    assert len({s.query for s in drawn}) == 8


@pytest.mark.slow
def test_files_say_what_is_known_of_the_programs():
    names = sorted(path.stem for path in Path("conf/protocol").glob("*.yaml"))
    assert names == ["hsnet", "panet", "patnet", "pfenet", "ssp"]
    data = {}
    for name in names:
        cfg = config([f"protocol={name}", "dataset=synthetic"])
        data[name] = cfg.protocol
        assert cfg.protocol.name == name
    assert (data["pfenet"].seed, dict(data["pfenet"].episodes)) == (321, {"pascal": 5000, "coco": 20000})
    assert (data["panet"].seed, data["panet"].lists, data["panet"].episodes) == (1234, 5, 1000)


def test_first_list_is_the_benchmarks_and_each_further_one_has_its_own_seed():
    dataset = SyntheticDataset(size=64, images_per_class=5, seed=0)
    data = FewShotDataModule(dataset, **SETTING, test_seeds=3)
    assert data.test_specs == dataset.test_episodes(dataset.novel_classes(0), 11, 2)
    assert list(data.test_lists) == [0, 1, 2]
    assert len({list_hash(specs) for specs in data.test_lists.values()}) == 3
    data.test_seed = 2
    assert data.test_specs == dataset.test_episodes(dataset.novel_classes(0), 11, 2, seed=2)


@pytest.mark.parametrize("name, inner", [("01", (40, 64)), ("03", (64, 40))])
def test_padded_images_keep_their_aspect_ratio(name, inner):
    """Of 50x80, the longer side becomes 64, the other 40, a multiple of 8; the rest is black, and 255 in masks."""
    data = FewShotDataModule(
        Shared(), **SETTING | {"image_size": 64}, protocol=Protocol("p", fit="pad", scored="photo")
    )
    episodes = data.test_dataset()
    image, mask = episodes.read(name, 1)
    assert image.shape == (3, 64, 64)
    assert (image[:, : inner[0], : inner[1]] == 100).all()
    assert image.sum() == 3 * 100 * inner[0] * inner[1]
    assert ((mask == 255).sum(), (mask[: inner[0], : inner[1]] == 255).sum()) == (64 * 64 - 40 * 64, 0)
    plain = Image.fromarray(Shared().read_mask(name, 1).numpy()).resize(inner[::-1], Image.Resampling.NEAREST)
    assert (mask[: inner[0], : inner[1]].numpy() == np.asarray(plain)).mean() > 0.97  # they round half pixels otherwise
    spec = episodes[0].spec[0]
    (truth,) = episodes[0].truth
    h, w = Shared().size(spec.query)
    assert truth.shape == (80, 80)
    assert torch.equal(truth[:h, :w], Shared().read_mask(spec.query, spec.class_id))
    assert (truth == 255).sum() == 80 * 80 - h * w


def test_published_sides_of_a_photo():
    """473 pixels: 500x375 becomes 472x352 (473 and 354.75, truncated, rounded down to multiples of 8)."""

    class Photo(Shared):
        def size(self, name):
            return (375, 500)

    data = FewShotDataModule(Photo(), **SETTING | {"image_size": 473}, protocol=Protocol("p", fit="pad"))
    image, mask = data.test_dataset().read("01", 1)
    assert (int((mask != 255).any(1).sum()), int((mask != 255).any(0).sum())) == (352, 472)
    assert image.shape == (3, 473, 473)


def test_images_with_novel_pixels_can_be_removed():
    data = FewShotDataModule(Shared(), **SETTING | {"novel_pixels": "remove", "fold": 1})  # trains on c and d
    assert data.show_novel == {f"{i:02d}" for i in (0, 4, 8)}  # of class d, which show class a
    assert data.train_lists == {"c": ["02", "06", "10"], "d": ["02", "03", "06", "07", "10", "11"]}
    assert not {s.query for s in map(data.train_specs.__getitem__, [(0, i) for i in range(9)])} & data.show_novel
    kept = FewShotDataModule(Shared(), **SETTING | {"fold": 1})
    assert kept.train_lists["d"] == ["00", "02", "03", "04", "06", "07", "08", "10", "11"]
    assert data.training_record["images"] == 6
    assert kept.training_record["train_lists_sha256"] != data.training_record["train_lists_sha256"]


def test_nothing_left_to_train_on_is_one_message():
    data = FewShotDataModule(
        Shared(), **SETTING | {"novel_pixels": "remove", "fold": 0}
    )  # d is with a, and in half of b
    with pytest.raises(DatasetError, match=r"'a' has 0.*novel_pixels=ignore"):
        data.setup("fit")


@pytest.mark.parametrize(
    "value, message",
    [
        ({"draw": "lots"}, "draw must be one of benchmark, images, classes"),
        ({"fit": "crop"}, "fit must be one of squeeze, pad"),
        ({"scored": "screen"}, "scored must be one of network, photo"),
        ({"lists": 0}, "lists must be 1 or more"),
    ],
)
def test_other_values_are_refused(value, message):
    with pytest.raises(DatasetError, match=message):
        Protocol("p", **value)


def test_default_changes_nothing_that_was_recorded_before():
    data = FewShotDataModule(SyntheticDataset(size=64, images_per_class=5, seed=0), **SETTING)
    assert data.protocol is HSNET
    assert data.provenance["episode_list_sha256"] == list_hash(data.test_specs)
    assert not data.test_dataset()[0].truth


def test_methods_name_protocols_that_exist():
    names = {path.stem for path in Path("conf/protocol").glob("*.yaml")}
    named = {name: method.protocol for name, method in all_methods().items()}
    assert set(named.values()) == names | {""}
    assert {name for name, protocol in named.items() if protocol == "pfenet"} == {
        *("pfenet", "asgnet", "scl", "ntrenet", "cyctr"),
    }
