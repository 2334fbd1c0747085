"""Which files of a folder belong together, by their names."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from datamodules.own.layouts import UNDERSTOOD, pairs_by_class, pairs_of_index_masks
from tests.data.folder import write_by_class, write_indexed


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(pairs, root: Path) -> dict[str, tuple[str, str]]:
    return {name: tuple(str(path.relative_to(root)) for path in pair) for name, pair in pairs.items()}


# One folder per class


@pytest.mark.parametrize(
    "image, mask",
    [
        ("1.jpg", "1.png"),
        ("1.JPG", "1.PNG"),
        ("1.webp", "1.png"),
        ("1.gif", "1.png"),
        ("1.tiff", "1.png"),
        ("1.png", "1_mask.png"),
        ("1.jpg", "1_mask.png"),
        ("1.jpg", "1_mask.jpg"),
        ("1.bmp", "1_mask.gif"),
        ("1.png", "masks/1.png"),
        ("1.tif", "masks/1.png"),
        ("1.jpg", "masks/1_mask.png"),
    ],
)
def test_names_of_a_pair(tmp_path, image, mask):
    touch(tmp_path, f"cat/{image}", f"cat/{mask}")
    assert found(pairs_by_class(tmp_path), tmp_path) == {"cat/1": (f"cat/{image}", f"cat/{mask}")}


def test_each_pair_has_its_own_names(tmp_path):
    files = "a.jpg a.png b.png b_mask.png c.gif masks/c.png face.jpg face.png face_mask.jpg face_mask.png".split()
    touch(tmp_path, *(f"cat/{file}" for file in files))
    assert found(pairs_by_class(tmp_path), tmp_path) == {
        "cat/a": ("cat/a.jpg", "cat/a.png"),
        "cat/b": ("cat/b.png", "cat/b_mask.png"),
        "cat/c": ("cat/c.gif", "cat/masks/c.png"),
        "cat/face": ("cat/face.jpg", "cat/face.png"),
        "cat/face_mask": ("cat/face_mask.jpg", "cat/face_mask.png"),
    }


def test_other_and_hidden_files_are_skipped(tmp_path):
    touch(tmp_path, "cat/1.jpg", "cat/1.png", "cat/._1.jpg", "cat/notes.txt", ".git/1.jpg", "SOURCE.txt")
    assert list(pairs_by_class(tmp_path)) == ["cat/1"]


@pytest.mark.parametrize(
    "files, named",
    [
        (["1.png"], r"cat/1\.png has no partner.* \(1 such"),
        (["1.jpg", "2.jpg"], r"cat/1\.jpg has no partner.* \(2 such"),
        (["1_mask.png"], r"1_mask\.png has no partner"),
        (["masks/1.png"], r"masks/1\.png has no partner"),
        (["1.jpg", "1.png", "2.png"], r"2\.png has no partner"),
        (["1.jpg", "1.png", "2_mask.png"], r"2_mask\.png has no partner"),
        (["1.jpg", "1.png", "1_mask.png"], r"1\.png and .*1_mask\.png are both masks of the name 1\."),
        (["1.jpg", "1.png", "masks/1.png"], r"cat/1\.png and .*masks/1\.png are both masks of the name 1\."),
        (["1.png", "1_mask.png", "masks/1.png"], r"1_mask\.png and .*masks/1\.png are both masks of the name 1\."),
        (["1.jpg", "1.bmp", "1_mask.png"], r"1\.bmp and .*1\.jpg are both images of the name 1\."),
        (["1.jpg", "1.bmp", "1.png"], r"1\.bmp and .*1\.jpg are both images of the name 1\."),
    ],
)
def test_missing_and_ambiguous_names_are_one_message(tmp_path, files, named):
    touch(tmp_path, *(f"cat/{file}" for file in files))
    with pytest.raises(DatasetError, match=named) as error:
        pairs_by_class(tmp_path)
    assert UNDERSTOOD in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("mask", ["{}_mask.png", "masks/{}.png"])
def test_content_is_the_same_under_any_name(tmp_path, suffix, mask):
    plain = write_by_class(tmp_path / "plain", classes=2, image="{}.bmp")
    other = write_by_class(tmp_path / "other", classes=2, image=f"{{}}.{suffix}", mask=mask)
    a, b = (FolderDataset(str(root), folds=2, min_area=0.01) for root in (plain, other))
    assert (a.classes, a.names) == (b.classes, b.names)
    for name in a.files:
        assert torch.equal(a.read_index(name), b.read_index(name))
        lossy = suffix in ("gif", "webp")
        assert (a.read_image(name).int() - b.read_image(name).int()).abs().float().mean() < (40 if lossy else 1e-6)


def test_png_pairs_of_real_photos(shared):
    root = shared / "data" / "import_formats" / "png_pairs"
    data = FolderDataset(str(root), folds=4, min_area=0.01)
    assert data.classes == ["cat", "cow", "dog", "horse"]
    assert [len(data.images_of(c, "test")) for c in range(4)] == [3, 3, 3, 3]
    for name in data.files:
        class_id = data.classes.index(name.split("/")[0])
        assert np.array_equal(data.read_mask(name, class_id), np.array(Image.open(root / f"{name}_mask.png")) == 255)
        assert np.array_equal(data.read_image(name).permute(1, 2, 0), np.array(Image.open(root / f"{name}.png")))


# Index masks


@pytest.mark.parametrize("mask", ["1.png", "1_mask.png", "1_mask.gif"])
def test_names_of_an_index_mask(tmp_path, mask):
    touch(tmp_path, "images/1.png", f"masks/{mask}")
    assert found(pairs_of_index_masks(tmp_path), tmp_path) == {"1": ("images/1.png", f"masks/{mask}")}


@pytest.mark.parametrize(
    "files, named",
    [
        (["images/1.png", "masks/2_mask.png"], r"images/1\.png has no partner.* \(2 such"),
        (["images/1.png", "masks/1.png", "masks/2_mask.png"], r"masks/2_mask\.png has no partner.* \(1 such"),
        (["images/1.png", "images/1.jpg", "masks/1.png"], r"1\.jpg and .*1\.png are both images of the name 1\."),
        (["images/1.png", "masks/1.png", "masks/1.bmp"], r"1\.bmp and .*1\.png are both masks of the name 1\."),
        (["images/1.png", "masks/1.png", "masks/1_mask.png"], r"1\.png and .*1_mask\.png are both masks of the name 1"),
    ],
)
def test_missing_and_ambiguous_names_of_index_masks(tmp_path, files, named):
    with pytest.raises(DatasetError, match=named) as error:
        pairs_of_index_masks(touch(tmp_path, *files))
    assert UNDERSTOOD in str(error.value)


# Links


@pytest.mark.parametrize("write", [write_indexed, write_by_class])
def test_links_to_folders_and_files_are_followed(tmp_path, write):
    real, linked = write(tmp_path / "real", classes=3), tmp_path / "linked"
    linked.mkdir()
    first, *others = sorted(p for p in real.iterdir() if p.is_dir())
    for path in (*others, *(p for p in real.iterdir() if p.is_file())):
        (linked / path.name).symlink_to(path)
    (linked / first.name).mkdir()
    for path in first.iterdir():
        (linked / first.name / path.name).symlink_to(os.path.relpath(path, linked / first.name))
    a, b = (FolderDataset(str(root), folds=3, min_area=0.01) for root in (real, linked))
    assert (a.classes, a.names) == (b.classes, b.names)
    assert all(torch.equal(a.read_index(name), b.read_index(name)) for name in a.files)
