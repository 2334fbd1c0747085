"""What reads files and settings from outside: one small function for each reader, from bytes to a call."""

import bz2
import gzip
import json
import lzma
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from datamodules.benchmarks.base import Benchmark, binary_mask
from datamodules.benchmarks.chest_xray import ChestXrayDataset
from datamodules.benchmarks.coco import PICKLES, CocoDataset, jobs_of, paint_images
from datamodules.benchmarks.deepglobe import index_of
from datamodules.benchmarks.fss import FSSDataset
from datamodules.benchmarks.isic import ISICDataset
from datamodules.benchmarks.pascal import LISTS, PascalDataset, sbd_mask
from datamodules.benchmarks.suim import SUIMDataset
from datamodules.command import config
from datamodules.own.folder import class_names
from datamodules.prepare.ready import DIGESTS, MANIFEST, check
from datamodules.prepare.source import Source
from experiments.run import checkpoints, heads
from pmnet.files import read_file
from pmnet.segment import Segmenter
from pmnet.segment.classfile import described
from pmnet.segment.formats import read_folder, supports_of
from pmnet.segment.formats.masks import foreground, index_values
from pmnet.segment.images import load_image, verify
from tests.fuzz import seeds
from tests.fuzz.mutate import Random, change, damage, right_checksums

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """A reader and what it is fed with.

    Attributes:
        read: takes the bytes and an empty folder, in which it may write.
        files: makes sound files, whose bytes are damaged.
        values: makes sound contents, whose values are changed before `dump` turns them into a file.
        dump: turns values into a file.
        wrap: ways to finish a damaged file; one is chosen at random.
        share: how often the reader is fed, relative to the others.
    """

    read: Read
    files: Callable[[], Sequence[bytes]] = tuple
    values: Callable[[], Sequence[Any]] = tuple
    dump: Callable[[Any], bytes] = seeds.as_json
    wrap: Sequence[Callable[[bytes], bytes]] = (bytes,)
    share: float = 1

    def make(self, random: Random) -> bytes:
        """One bad input."""
        values = self.values()
        if values and random.random() < 0.6:
            return dumped(self.dump, change(values[random.integers(len(values))], random))
        files = self.files() or [self.dump(value) for value in values]
        content = damage(files[random.integers(len(files))], random, files)
        return self.wrap[random.integers(len(self.wrap))](content)


def dumped(dump: Callable[[Any], bytes], value: Any) -> bytes:
    try:
        return dump(value)
    except (TypeError, ValueError, AttributeError):  # the format has no such value
        return repr(value).encode("utf-8", "surrogatepass")


def written(content: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Images and masks


def read_image(content: bytes, folder: Path) -> None:
    path = written(content, folder / "a.jpg")
    verify(path)
    load_image(path)


def read_mask(reader: Callable[[Path], object], content: bytes, folder: Path) -> None:
    reader(written(content, folder / "a.png"))


def read_pascal_mask(content: bytes, folder: Path) -> None:
    dataset = PascalDataset(str(folder))
    written(content, dataset.mask_path("a"))
    dataset.read_index("a")


def read_suim_mask(content: bytes, folder: Path) -> None:
    dataset = SUIMDataset(str(folder))
    written(content, dataset.mask_path("a"))
    dataset.read_index("a")


# Annotations and lists


def read_annotations(content: bytes, folder: Path) -> None:
    paint_images(folder, jobs_of(written(content, folder / "instances.json")))


def read_mat(content: bytes, folder: Path) -> None:
    sbd_mask(written(content, folder / "a.mat"))


def read_pickles(content: bytes, folder: Path) -> None:
    sound = pickle.dumps(seeds.coco_pickle())
    for path in PICKLES:
        written(content if path == PICKLES[-1] else sound, folder / path)
    use(CocoDataset("absent", str(folder)))


def read_lists(dataset: type[Benchmark], names: Sequence[str], content: bytes, folder: Path) -> None:
    for name in names:
        written(content, folder / name)
    use(dataset("absent", str(folder)))


def use(dataset: Benchmark) -> None:
    """Reads the lists of a benchmark as a run does."""
    for class_id in range(len(dataset.classes)):
        list(dataset.images_of(class_id, "test"))
    assert dataset.splits


def read_manifest(content: bytes, folder: Path) -> None:
    written(b"", folder / DIGESTS)
    written(content, folder / MANIFEST)
    check(ChestXrayDataset, folder)


def read_digests(content: bytes, folder: Path) -> None:
    """A manifest that vouches for a damaged list of digests."""
    import hashlib

    written(content, folder / DIGESTS)
    digest = hashlib.sha256(content.decode("utf-8", "replace").encode()).hexdigest()
    manifest = {"dataset": "chest_xray", "version": 1, "files": {"sha256": digest}}
    written(json.dumps(manifest).encode(), folder / MANIFEST)
    check(ChestXrayDataset, folder)


# One's own images


def read_own(name: str, beside: Callable[[], dict[str, bytes]], content: bytes, folder: Path) -> None:
    """Reads a folder as `pmnet segment` and `dataset=folder` do.

    Args:
        name: of the file that holds the content.
        beside: the sound files beside it.
    """
    for path, given in (beside() | {name: content}).items():
        written(given, folder / path)
    for supports in supports_of(folder).values():
        for _ in supports:
            pass
    for each in read_folder(folder):
        each.pixels()


def photos() -> dict[str, bytes]:
    return {"a.jpg": seeds.images()[1], "b.jpg": seeds.images()[1]}


def with_labels() -> dict[str, bytes]:
    return photos() | {"b.txt": seeds.own_texts()["yolo"][1]}


def with_names() -> dict[str, bytes]:
    return photos() | {"classes.txt": b"cat\ndog\n"}


def indexed() -> dict[str, bytes]:
    """Index masks."""
    return {"images/a.jpg": seeds.images()[1], "masks/a.png": seeds.masks()[0], "classes.txt": b"cat\ndog\n"}


def coloured() -> dict[str, bytes]:
    """Masks in the colours of a label map."""
    return {"images/a.jpg": seeds.images()[1], "masks/a.png": seeds.colour_mask()} | {
        "labelmap.txt": seeds.own_texts()["labelmap"][0]
    }


def by_class() -> dict[str, bytes]:
    files = {"1.jpg": seeds.images()[1], "1.png": seeds.masks()[2]}
    return {f"{name}/{file}": content for name in ("cat", "dog") for file, content in files.items()}


def read_head(content: bytes, folder: Path) -> None:
    path = written(content, folder / "a.safetensors")
    Segmenter.load(path, "cpu")
    heads.load(path, seeds.module().network)


def read_class_file(content: bytes, folder: Path) -> None:
    path = written(content, folder / "a.safetensors")
    Segmenter.load(path, "cpu")
    described(path)


# Weights and checkpoints


def read_checkpoint(content: bytes, folder: Path) -> None:
    checkpoint = checkpoints.read(written(content, folder / "checkpoints" / "best.ckpt"))
    checkpoint.check_network(seeds.module().network)
    checkpoint.check_training(seeds.checkpoints()[0]["record"])
    assert checkpoint.val_miou != 0


def read_weights(name: str, content: bytes, folder: Path) -> None:
    read_file(written(content, folder / name))


# Archives


def unpack(name: str, content: bytes, folder: Path) -> None:
    source = Source([written(content, folder / "in" / name)], ["*.jpg"], folder / "out")
    list(source.files(".jpg"))


def unpack_tar(content: bytes, folder: Path) -> None:
    starts = {b"\x1f\x8b": "a.tgz", b"BZ": "a.tar.bz2", b"\xfd7": "a.tar.xz"}
    unpack(starts.get(content[:2], "a.tar"), content, folder)


# Settings


def compose(content: bytes, folder: Path) -> None:
    config(content.decode("utf-8", "replace").split("\n"))


def compose_file(content: bytes, folder: Path) -> None:
    written(content, folder / "experiment" / "own.yaml")
    config([f"hydra.searchpath=[file://{folder}]", "experiment=own"])


def with_footer(content: bytes) -> bytes:
    """A safetensors header whose length is right again, whatever happened to it."""
    header = content[8:].split(b"}}", 1)
    text = header[0] + b"}}"
    return len(text).to_bytes(8, "little") + text + (header[1] if len(header) > 1 else b"")


TARGETS: dict[str, Target] = {
    "image": Target(read_image, seeds.images, wrap=(bytes, right_checksums), share=4),
    "mask, own images": Target(partial(read_mask, index_values), seeds.masks, wrap=(bytes, right_checksums)),
    "mask, per class": Target(partial(read_mask, foreground), seeds.masks, wrap=(bytes, right_checksums)),
    "mask, black and white": Target(partial(read_mask, binary_mask), seeds.masks, wrap=(bytes, right_checksums)),
    "mask, Deepglobe": Target(partial(read_mask, index_of), seeds.masks, wrap=(bytes, right_checksums)),
    "mask, PASCAL": Target(read_pascal_mask, seeds.masks, wrap=(bytes, right_checksums)),
    "mask, SUIM": Target(read_suim_mask, seeds.masks, wrap=(bytes, right_checksums)),
    "labelme json": Target(
        partial(read_own, "c.json", photos), values=lambda: seeds.own_annotations()["labelme"], share=3
    ),
    "COCO json, own images": Target(
        partial(read_own, "instances.json", photos), values=lambda: seeds.own_annotations()["coco"], share=3
    ),
    "YOLO labels": Target(partial(read_own, "a.txt", with_names), lambda: seeds.own_texts()["yolo"], share=2),
    "YOLO data.yaml": Target(partial(read_own, "data.yaml", with_labels), lambda: seeds.own_texts()["data.yaml"]),
    "labelmap.txt": Target(partial(read_own, "labelmap.txt", coloured), lambda: seeds.own_texts()["labelmap"]),
    "_classes.csv": Target(partial(read_own, "_classes.csv", indexed), lambda: seeds.own_texts()["csv"]),
    "index mask in a folder": Target(
        partial(read_own, "masks/a.png", indexed), seeds.masks, wrap=(bytes, right_checksums)
    ),
    "colour mask in a folder": Target(
        partial(read_own, "masks/a.png", coloured), lambda: [seeds.colour_mask()], wrap=(bytes, right_checksums)
    ),
    "mask in a folder per class": Target(
        partial(read_own, "cat/1.png", by_class), seeds.masks, wrap=(bytes, right_checksums)
    ),
    "classes.txt": Target(partial(read_mask, class_names), lambda: seeds.text_lists()["classes"]),
    "COCO annotations": Target(read_annotations, values=seeds.coco_annotations, share=3),
    "SBD .mat": Target(read_mat, seeds.matlab, share=2),
    "pickled lists": Target(
        read_pickles, seeds.pickles, values=lambda: [seeds.coco_pickle()], dump=pickle.dumps, share=2
    ),
    "lists, COCO": Target(
        partial(read_lists, CocoDataset, ["coco20i.json.gz"]),
        values=lambda: [seeds.lists()["coco"]],
        dump=seeds.as_json_gz,
    ),
    "lists, test.json": Target(
        partial(read_lists, ChestXrayDataset, ["test.json"]), values=lambda: [seeds.lists()["chest_xray"]]
    ),
    "lists, PASCAL": Target(partial(read_lists, PascalDataset, LISTS), lambda: seeds.text_lists()["pascal"]),
    "lists, FSS": Target(
        partial(read_lists, FSSDataset, ["trn.txt", "val.txt", "test.txt"]), lambda: seeds.text_lists()["fss"]
    ),
    "lists, ISIC": Target(
        partial(read_lists, partial(ISICDataset, classes=3), ["class_id.csv"]), lambda: seeds.text_lists()["isic"]
    ),
    "manifest.json": Target(
        read_manifest, values=lambda: [{"dataset": "chest_xray", "version": 1, "files": {"sha256": "e3b0"}}]
    ),
    "files.sha256": Target(read_digests, lambda: [b"e3b0c442  images/1.png\n27ae41e4  masks/1.png\n"]),
    "checkpoint": Target(read_checkpoint, values=seeds.checkpoints, dump=seeds.torch_saved, share=2),
    "weights .pth": Target(partial(read_weights, "a.pth"), seeds.tensor_files, share=2),
    "weights .safetensors": Target(
        partial(read_weights, "a.safetensors"), seeds.safetensors_files, wrap=(bytes, with_footer), share=2
    ),
    "head .safetensors": Target(
        read_head, values=seeds.head_recipes, dump=seeds.head_file, wrap=(bytes, with_footer), share=0.4
    ),
    "class file": Target(
        read_class_file,
        values=lambda: [seeds.class_file_parts()[1]],
        dump=seeds.class_file,
        wrap=(bytes, with_footer),
        share=0.4,
    ),
    "archive .zip": Target(partial(unpack, "a.zip"), seeds.zips, share=2),
    "archive .tar": Target(unpack_tar, seeds.tars, wrap=(bytes, gzip.compress, bz2.compress, lzma.compress), share=2),
    "overrides": Target(compose, seeds.overrides, share=2),
    "settings .yaml": Target(
        compose_file,
        seeds.settings,
        values=lambda: [yaml.safe_load(text) for text in seeds.settings()],
        dump=lambda value: b"# @package _global_\n" + yaml.safe_dump(value).encode(),
        share=1,
    ),
}
