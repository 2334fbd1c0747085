"""What earlier starts found in masks is used again, and only as long as it is still true."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.inventory import Inventory
from datamodules.own import folder
from datamodules.own.folder import FolderDataset
from pmnet.errors import ImageError
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
def test_damaged_file_is_written_anew(root, cache, decoded, content):
    read(root)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert read(root).counts == true_counts(root)
    assert len(decoded) == 24
    assert file.read_text() == whole


def test_start_does_not_need_the_cache(root, cache):
    cache.write_text("a file where the folder should be")
    assert read(root).counts == true_counts(root)


def test_two_folders_have_an_inventory_each(root, cache, tmp_path):
    read(root)
    read(write_indexed(tmp_path / "others", classes=2))
    assert len(list(cache.iterdir())) == 2


def test_same_size_and_another_time_is_another_file(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert Inventory(0).pixels({"a": [file]}, lambda name: {1: 1}, "") == {"a": {1: 1}}
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 0))
    assert Inventory(0).pixels({"a": [file]}, lambda name: {2: 1}, "") == {"a": {2: 1}}
