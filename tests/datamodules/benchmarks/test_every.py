"""What holds for every benchmark: its publisher's files are prepared, verified and read, or refused with a clear error.

The benchmarks and their fixtures are found by their files; see tests/data/fixture.py.
"""

import json
import shutil
import subprocess

import numpy as np
import pytest
from omegaconf import OmegaConf

from datamodules.benchmarks.base import Benchmark
from datamodules.errors import DatasetError
from datamodules.prepare.ready import check, prepare
from tests.conftest import ROOT
from tests.data.fixture import FIXTURES, KINDS, Fixture


@pytest.fixture(params=FIXTURES)
def name(request) -> str:
    return request.param


@pytest.fixture
def kind(name) -> type[Benchmark]:
    return KINDS[name]


@pytest.fixture
def fixture(name) -> Fixture:
    return FIXTURES[name]


def test_every_benchmark_has_a_fixture():
    missing = [f"tests/data/{name}.py" for name in KINDS.keys() - FIXTURES.keys()]
    assert not missing, f"Write {', '.join(sorted(missing))}: tests/data/fixture.py says what a fixture holds."


def test_fixture_is_complete(name, fixture):
    members = [m for m in (*Fixture.__annotations__, *vars(Fixture)) if not m.startswith("_")]
    missing = [m for m in members if not hasattr(fixture, m)]
    assert not missing, f"tests/data/{name}.py lacks {', '.join(missing)}: see tests/data/fixture.py."


def test_config_names_the_class(name, kind):
    config = OmegaConf.load(ROOT / "conf" / "dataset" / f"{name}.yaml")
    assert config["_target_"] == f"{kind.__module__}.{kind.__name__}"


# What is prepared


def test_prepared_masks_are_the_published_ones(kind, fixture, name, prepared):
    dataset, truth = kind(str(prepared(name))), fixture.truth()
    assert sorted(dataset.found()) == sorted(truth)
    for image, mask in truth.items():
        assert np.array_equal(dataset.read_index(image).numpy(), mask), image
        assert dataset.read_image(image).dtype == dataset.read_index(image).dtype


def test_pixels_of_masks_are_counted_and_kept(kind, fixture, name, prepared, monkeypatch):
    dataset, truth = kind(str(prepared(name))), fixture.truth()
    counts = {image: dict(zip(*np.unique(mask, return_counts=True), strict=True)) for image, mask in truth.items()}
    assert dataset.pixels(truth) == counts
    monkeypatch.setattr(dataset, "read_index", None)  # what is known is not read again
    assert dataset.pixels(list(truth)[::2]) == {image: counts[image] for image in list(truth)[::2]}


def test_prepared_images_are_the_published_ones(kind, fixture, name, published, prepared):
    dataset, source = kind(str(prepared(name))), published(name, archives=False)
    for image in dataset.found():
        pixels = dataset.read_image(image).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, fixture.pixels(source, image)), image


def test_built_lists_follow_the_rule(kind, fixture, name, prepared):
    dataset = kind(str(prepared(name)))
    for c in range(len(dataset.classes)):
        for split in ("train", "test"):
            found = sorted(dataset.images_of(c, split))
            assert found == sorted(fixture.images_of(c, split)), (c, split)
            assert len(found) >= 2


def test_manifest_says_what_was_done(fixture, name, published, prepared):
    ready = prepared(name)
    manifest = json.loads((ready / "manifest.json").read_text())
    archives = {p.name for p in published(name).iterdir()}
    assert {s["name"] for s in manifest["sources"]} == archives
    assert manifest["counts"]["pairs"] == len(fixture.truth())
    assert manifest["lists"]["origin"].startswith("built: ")
    rules = " ".join(manifest["rules"])
    assert [note for note in fixture.NOTES if note not in rules] == [], rules
    assert manifest["files"]["count"] == sum(p.is_file() for p in ready.rglob("*")) - 2
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "files.sha256"], cwd=ready, check=False)
    assert sums.returncode == 0
    assert not list(ready.parent.glob(f".{name}.part"))


def same_files(manifest: dict, kept: dict) -> bool:
    return (manifest["files"], manifest["lists"]) == (kept["files"], kept["lists"])


def test_unpacked_folders_give_the_same_files_as_archives(kind, name, published, prepared, tmp_path):
    manifest = prepare(kind, [published(name, archives=False)], tmp_path, None, download=False)
    assert same_files(manifest, json.loads((prepared(name) / "manifest.json").read_text()))


def test_files_that_a_mac_adds_are_ignored(kind, fixture, name, prepared, tmp_path):
    source = fixture.write(tmp_path / "source", archives=False)
    for path in [p for p in source.rglob("*") if p.is_file()][::9]:
        (path.parent / f"._{path.name}").write_bytes(b"Mac OS X")
        junk = source / "__MACOSX" / path.relative_to(source)
        junk.parent.mkdir(parents=True, exist_ok=True)
        junk.write_bytes(b"Mac OS X")
    manifest = prepare(kind, [source], tmp_path / "data", None, download=False)
    assert same_files(manifest, json.loads((prepared(name) / "manifest.json").read_text()))


# Repeated, checked


def test_preparing_again_changes_nothing(kind, name, published, prepared):
    ready = prepared(name)
    before = {p: p.stat().st_mtime_ns for p in ready.rglob("*")}
    manifest = prepare(kind, [published(name)], ready.parent, None, download=False)
    assert manifest == json.loads((ready / "manifest.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in ready.rglob("*")} == before


def test_check_finds_missing_changed_and_added_files(kind, name, prepared, tmp_path):
    ready = tmp_path / name
    shutil.copytree(prepared(name), ready)
    check(kind, ready)
    dataset = kind(str(ready))
    image = dataset.image_path(dataset.found()[0])
    kept = image.read_bytes()
    image.write_bytes(kept[:-40] + bytes(40))
    with pytest.raises(DatasetError, match=rf"{image.name} was changed \(1 such"):
        check(kind, ready)
    image.unlink()
    with pytest.raises(DatasetError, match=rf"{image.name} is missing"):
        check(kind, ready)
    image.write_bytes(kept)
    check(kind, ready)
    (ready / "splits" / "new.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"splits/new.txt was added"):
        check(kind, ready)
    (ready / "files.sha256").write_text("")
    with pytest.raises(DatasetError, match=r"files.sha256 was changed"):
        check(kind, ready)


# Missing and broken sources


def test_error_without_a_source_says_what_to_download(kind, tmp_path):
    with pytest.raises(DatasetError) as error:
        prepare(kind, [], tmp_path, None, download=False)
    assert kind.obtain in str(error.value)


def test_error_without_lists_says_where_and_what_to_do(kind, name, tmp_path):
    with pytest.raises(DatasetError, match=rf"{tmp_path}.*datamodules.prepare {name}"):
        _ = kind("nowhere", str(tmp_path)).lists


def test_folder_of_something_else_is_refused(kind, fixture, refuses, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("nothing")
    error = refuses(kind, tmp_path / "source")
    assert fixture.NEEDED in error
    assert str(tmp_path / "source") in error


@pytest.mark.parametrize(
    "name, gone", [(name, gone) for name, fixture in FIXTURES.items() for gone in getattr(fixture, "PARTIAL", ())]
)
def test_partial_source_is_refused(kind, fixture, gone, refuses, tmp_path):
    source = fixture.write(tmp_path / "source", archives=False)
    for path in list(source.rglob(gone)):
        path.unlink()
    refuses(kind, source, fixture.PARTIAL[gone])


@pytest.mark.parametrize("size", [0, 300])
def test_broken_image_is_named_and_leaves_nothing_behind(
    kind, fixture, name, size, refuses, published, prepared, tmp_path
):
    wrong = fixture.write(tmp_path / "wrong", archives=False)
    file = fixture.file_of(wrong, next(iter(fixture.truth())))
    file.write_bytes(file.read_bytes()[:size] or b"broken")
    error = refuses(kind, wrong)
    assert file.name in error
    assert str(wrong) in error
    manifest = prepare(kind, [published(name)], tmp_path / "data", None, download=False)
    assert same_files(manifest, json.loads((prepared(name) / "manifest.json").read_text()))


def test_other_folder_in_the_place_is_left_alone(kind, name, published, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="no manifest"):
        prepare(kind, [published(name)], tmp_path, None, download=False)
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


# Published lists


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.published])
def test_published_lists_are_recognised(kind, name, shared):
    if not (shared / "splits" / name).is_dir():
        pytest.skip(f"../shared/splits has no lists of {name}")
    assert kind("nowhere", str(shared / "splits")).splits == "published lists"
