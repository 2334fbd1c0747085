"""Links in --source: those in folders are followed, those in archives are not."""

import os
from pathlib import Path

import pytest

from datamodules.errors import DatasetError
from datamodules.prepare.ready import prepare
from datamodules.prepare.source import Source, place, walk
from tests.data.fixture import FIXTURES, KINDS


def tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    return root


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def visited(root: Path) -> dict[str, list[str]]:
    return {str(at.relative_to(root)): sorted(files) for at, files in walk(root)}


def link_folders(real: Path, linked: Path) -> None:
    """Every folder at the second level is a link."""
    for path in real.iterdir():
        if path.is_dir():
            for inner in path.iterdir():
                link(linked / path.name / inner.name, inner)
        else:
            link(linked / path.name, path)


def link_files(real: Path, linked: Path) -> None:
    """Every folder is real, and every file in it is a relative link."""
    for path in real.rglob("*"):
        if path.is_file():
            to = linked / path.relative_to(real)
            link(to, Path(os.path.relpath(path, to.parent)))


@pytest.mark.parametrize("by", [link_folders, link_files])
@pytest.mark.parametrize("name", FIXTURES)
def test_linked_source_gives_the_same_files(tmp_path, name, by):
    real = FIXTURES[name].write(tmp_path / "real", archives=False)
    by(real, tmp_path / "linked")
    link(tmp_path / "source", tmp_path / "linked")
    expected = prepare(KINDS[name], [real], tmp_path / "a", None, download=False)
    manifest = prepare(KINDS[name], [tmp_path / "source"], tmp_path / "b", None, download=False)
    assert (manifest["files"], manifest["rules"]) == (expected["files"], expected["rules"])
    assert not any(p.is_symlink() for p in (tmp_path / "b" / name).rglob("*"))


def test_link_to_an_archive_is_unpacked(tmp_path):
    archives = FIXTURES["suim"].write(tmp_path / "real", archives=True)
    for path in archives.iterdir():
        link(tmp_path / "source" / path.name, path)
    manifest = prepare(KINDS["suim"], [tmp_path / "source"], tmp_path / "data", None, download=False)
    assert {source["name"] for source in manifest["sources"]} == {path.name for path in archives.iterdir()}


def test_walk_visits_linked_folders(tmp_path):
    tree(tmp_path / "disk", "JPEGImages/1.jpg", "deep/a/2.jpg")
    tree(tmp_path / "source", "3.jpg")
    link(tmp_path / "source" / "VOC" / "JPEGImages", tmp_path / "disk" / "JPEGImages")
    link(tmp_path / "source" / "more", tmp_path / "disk" / "deep")
    assert visited(tmp_path / "source") == {
        ".": ["3.jpg"],
        "VOC": [],
        "VOC/JPEGImages": ["1.jpg"],
        "more": [],
        "more/a": ["2.jpg"],
    }


@pytest.mark.parametrize("root", ["source", "."])
def test_loops_end(tmp_path, monkeypatch, root):
    source = tree(tmp_path / "source", "a/1.jpg", "b/2.jpg")
    link(source / "self", source)
    link(source / "a" / "up", source)
    link(source / "a" / "root", Path("/"))
    link(source / "a" / "to_b", source / "b")
    link(source / "b" / "to_a", source / "a")
    link(source / "b" / "it", source / "b" / "it")  # a link to itself
    monkeypatch.chdir(tmp_path if root == "source" else source)
    assert {at: files for at, files in visited(Path(root)).items() if at != "."} == {
        "a": ["1.jpg"],
        "b": ["2.jpg", "it"],
        "a/to_b": ["2.jpg", "it"],
        "b/to_a": ["1.jpg"],
    }


def test_folder_with_two_names_is_found_by_each_and_read_once(tmp_path):
    source = tree(tmp_path / "source", "photos/1.jpg", "train/images/2.jpg")
    link(source / "JPEGImages", source / "photos")
    link(source / "current", source / "train")
    found = Source([source], ["*"], tmp_path / "out")
    assert found.need("JPEGImages", ".jpg", of="VOC") == source / "JPEGImages"
    assert found.need("photos", ".jpg", of="VOC") == source / "photos"
    assert list(found.folders("images", ".jpg")) == [source / "current" / "images"]


def test_link_to_a_missing_file_is_named(tmp_path):
    link(tmp_path / "1.jpg", tmp_path / "gone.jpg")
    with pytest.raises(DatasetError, match=r"1\.jpg is a link to a file that does not exist"):
        place(tmp_path / "1.jpg", tmp_path / "out" / "1.jpg")
    assert not (tmp_path / "out" / "1.jpg").exists()
