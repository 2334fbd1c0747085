"""What earlier starts found in masks is used again, and only as long as it is still true."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.inventory import Inventory
from datamodules.own import folder
from datamodules.own.folder import FolderDataset
from pmnet.errors import ImageError
from pmnet.segment.formats import masks
from tests.data.folder import write_indexed


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PMNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    return write_indexed(tmp_path / "photos", classes=["cat", "dog", "bus"], suffix=".png")


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names, examine = [], folder.examine
    monkeypatch.setattr(folder, "examine", lambda each: (names.append(each.name), examine(each))[1])
    return names


def read(root):
    return FolderDataset(str(root), folds=3, min_area=0.01)


def true_counts(root):
    masks = {path.stem: np.asarray(Image.open(path)) for path in (root / "masks").iterdir()}
    return {name: dict(zip(*np.unique(mask, return_counts=True), strict=True)) for name, mask in masks.items()}


def test_second_start_decodes_nothing(root, decoded):
    first = read(root)
    assert sorted(decoded) == sorted(first.files)
    decoded.clear()
    again = read(root)
    assert decoded == []
    assert again.names == first.names
    assert again.counts == first.counts == true_counts(root)


def test_only_new_and_changed_files_are_decoded(root, decoded):
    read(root)
    decoded.clear()
    Image.fromarray(np.full((48, 64), 3, np.uint8)).save(root / "masks" / "004.png")
    Image.new("RGB", (64, 48)).save(root / "images" / "006.png")
    shutil.copy(root / "images" / "001.png", root / "images" / "new.png")
    shutil.copy(root / "masks" / "001.png", root / "masks" / "new.png")
    (root / "images" / "002.png").unlink()
    (root / "masks" / "002.png").unlink()
    assert read(root).counts == true_counts(root)
    assert sorted(decoded) == ["004", "006", "new"]


def test_image_that_broke_since_is_still_named(root):
    read(root)
    (root / "images" / "003.png").write_bytes(b"no image")
    with pytest.raises(Exception, match=r"003\.png"):
        read(root)


def test_what_was_read_before_a_broken_file_is_kept(root, decoded):
    good = (root / "images" / "011.png").read_bytes()
    (root / "images" / "011.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"011\.png"):
        read(root)
    (root / "images" / "011.png").write_bytes(good)
    decoded.clear()
    read(root)
    assert decoded == ["011"]


def test_masks_are_counted_again_if_the_names_of_values_change(root, tmp_path):
    """Of `_classes.csv`, which gives values other numbers with the same names of classes."""
    (root / "classes.txt").unlink()
    (root / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n3, bus\n")
    before = read(root)
    (root / "_classes.csv").write_text("Pixel Value, Class\n0, background\n2, cat\n1, dog\n3, bus\n")
    after = read(root)
    assert after.classes == before.classes
    assert after.images_of(0, "test") == before.images_of(1, "test") != before.images_of(0, "test")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"000": 3}', '{"000": [[1], {"a": 2}]}', '{"000": [null, {}]}'])
def test_damaged_files_are_replaced(root, cache, decoded, content):
    read(root)
    whole = {file: json.loads(file.read_text()) for file in cache.iterdir()}
    for file in whole:
        file.write_text(content)
    assert read(root).counts == true_counts(root)
    assert len(decoded) == 24
    assert {file: json.loads(file.read_text()) for file in cache.iterdir()} == whole


def test_start_does_not_need_the_cache(root, cache):
    cache.write_text("a file where the folder should be")
    assert read(root).counts == true_counts(root)


def test_folders_do_not_share_their_counts(root, cache, tmp_path, decoded):
    read(root)
    files = set(cache.iterdir())
    decoded.clear()
    read(write_indexed(tmp_path / "others", classes=3, seed=1))
    assert len(decoded) == 12
    assert len(files & set(cache.iterdir())) == len(files)


def test_black_and_white_masks_are_decoded_once(tmp_path, monkeypatch):
    """Whether a folder's masks are black and white is told from all of them."""
    root = write_indexed(tmp_path / "photos", classes=1)
    for path in (root / "masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    before = FolderDataset(str(root), folds=1, min_area=0.01)
    monkeypatch.setattr(masks, "index_values", None)
    again = FolderDataset(str(root), folds=1, min_area=0.01)
    assert again.counts == before.counts
    assert before.images_of(0, "train") == again.images_of(0, "train") == ["000", "001", "002", "003"]


def test_masks_that_mean_something_else_now_are_counted_again(tmp_path):
    """One more mask makes 255 "ignore" in a split, and nothing changes in the set of meanings of all splits."""
    for split, white in (("train", 255), ("valid", 255), ("test", 1)):
        root = write_indexed(tmp_path / "photos" / split, classes=["cat"])
        for path in (root / "masks").iterdir():
            index = np.asarray(Image.open(path)) == 1
            Image.fromarray(np.where(index, white, 0).astype(np.uint8)).save(path)
    root = tmp_path / "photos"
    before = FolderDataset(str(root), folds=1, min_area=0.01)
    assert before.images_of(0, "train")
    shutil.copy(root / "train" / "images" / "000.jpg", root / "train" / "images" / "more.jpg")
    shutil.copy(root / "test" / "masks" / "000.png", root / "train" / "masks" / "more.png")
    after = FolderDataset(str(root), folds=1, min_area=0.01)
    for name, counts in after.counts.items():
        values, numbers = after.read_index(name).unique(return_counts=True)
        assert counts == dict(zip(values.tolist(), numbers.tolist(), strict=True)), name


def test_processes_keep_what_others_have_found(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")

    def examine(name):
        Inventory(0).pixels({"b": [file]}, lambda name: {2: 2}, "")  # while this one reads
        return {1: 1}

    Inventory(0).pixels({"a": [file]}, examine, "")
    assert Inventory(0).read().keys() == {"a", "b"}


def test_user_without_a_home_reads_everything(root, monkeypatch):
    monkeypatch.setenv("PMNET_CACHE", "~nobody-of-this-name/cache")
    assert read(root).counts == true_counts(root)


def test_same_size_and_another_time_is_another_file(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert Inventory(0).pixels({"a": [file]}, lambda name: {1: 1}, "") == {"a": {1: 1}}
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 0))
    assert Inventory(0).pixels({"a": [file]}, lambda name: {2: 1}, "") == {"a": {2: 1}}
