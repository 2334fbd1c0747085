"""Each benchmark from its publisher's files: prepared, verified, read, drawn from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.benchmarks.chest_xray import ChestXrayDataset
from datamodules.benchmarks.coco import CocoDataset
from datamodules.benchmarks.deepglobe import DeepglobeDataset
from datamodules.benchmarks.fss import FSSDataset
from datamodules.benchmarks.isic import ISICDataset
from datamodules.benchmarks.pascal import PascalDataset
from datamodules.benchmarks.suim import SUIMDataset
from datamodules.errors import DatasetError
from datamodules.prepare.ready import check, prepare
from pmnet.errors import ImageError
from tests.conftest import ROOT, run_module
from tests.data import chest_xray, coco, deepglobe, fss, isic, pascal, suim

PACKAGES = {
    "pascal": (PascalDataset, pascal),
    "coco": (CocoDataset, coco),
    "fss": (FSSDataset, fss),
    "deepglobe": (DeepglobeDataset, deepglobe),
    "isic": (ISICDataset, isic),
    "chest_xray": (ChestXrayDataset, chest_xray),
    "suim": (SUIMDataset, suim),
}


def expected(name: str) -> dict[str, np.ndarray]:
    if name == "pascal":
        return {n: pascal.truth(n) for n in sorted(pascal.VOC_VAL + pascal.VOC_TRAIN + pascal.SBD_ONLY)}
    if name == "coco":
        numbers = {i: coco.number_of(i) for i in range(coco.IMAGES)}
        return {f"{y}/{coco.file_name(y, n)}": coco.truth(i) for y in coco.YEARS for i, n in numbers.items()}
    if name == "fss":
        return {f"{n}/{i}.jpg": fss.truth(n, i) for n in fss.NAMES for i in range(1, 11)}
    if name == "deepglobe":
        places = [(n, i, j) for n in deepglobe.NUMBERS for i in range(6) for j in range(6)]
        return {f"{n}_{i}{j}": deepglobe.tile(n, i, j) for n, i, j in places if deepglobe.kept(n, i, j)}
    if name == "isic":
        return {n: isic.truth(n) for n in isic.NAMES}
    if name == "chest_xray":
        return {n: chest_xray.truth(n) for n in chest_xray.SHENZHEN + chest_xray.MONTGOMERY}
    masks = {suim.name_of(i): suim.truth(i) + 1 for i in range(sum(suim.PARTS.values()))}
    return masks | {suim.name_of(3): masks[suim.name_of(3)][::2, ::2]}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """The publishers' files of each."""
    folders = {name: tmp_path_factory.mktemp(f"published_{name}") for name in PACKAGES}
    return {name: PACKAGES[name][1].write(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def data(published, tmp_path_factory) -> Path:
    """The prepared folder of each."""
    root = tmp_path_factory.mktemp("data")
    for name, (kind, _) in PACKAGES.items():
        prepare(kind, [published[name]], root, None, download=False)
    return root


each = pytest.mark.parametrize("name", PACKAGES)


# What is prepared


@each
def test_prepared_folder_holds_the_published_pixels(name, data):
    dataset = PACKAGES[name][0](str(data / name))
    masks = expected(name)
    assert sorted(dataset.found()) == sorted(masks)
    for image, mask in masks.items():
        assert np.array_equal(dataset.read_index(image).numpy(), mask), image
        assert dataset.read_image(image).dtype == dataset.read_index(image).dtype
    if name != "suim":  # whose masks may have another size
        assert all(dataset.read_image(n).shape[1:] == m.shape for n, m in masks.items())


@each
def test_images_are_those_of_the_publisher(name, published, data, tmp_path):
    """Opened plainly, by another path: the file as it was packed."""
    source = PACKAGES[name][1].write(tmp_path, archives=False)
    dataset = PACKAGES[name][0](str(data / name))
    for image in dataset.found()[::7]:
        if name == "deepglobe":
            number, place = image.split("_")
            i, j = map(int, place)
            whole = np.array(Image.open(next(source.rglob(f"{number}_sat.jpg"))))
            pixels = whole[34 * i : 34 * (i + 1), 34 * j : 34 * (j + 1)]
        else:
            path = dataset.image_path(image)
            folder = path.parent.name
            opened = Image.open(next(p for p in source.rglob(path.name) if p.parent.name == folder))
            if opened.mode.startswith("I"):
                continue
            pixels = np.array(opened.convert("RGB"))
        assert np.array_equal(dataset.read_image(image).permute(1, 2, 0).numpy(), pixels), image


@each
def test_built_lists_follow_the_rule(name, data):
    """Counted from the known masks: an image counts for a class that covers 2,048 pixels of it."""
    dataset, masks = PACKAGES[name][0](str(data / name)), expected(name)
    smallest = {"deepglobe": 1, "isic": 1, "chest_xray": 1}.get(name, 2048)
    for c in range(len(dataset.classes)):
        for split in ("train", "test"):
            found = list(dataset.images_of(c, split))
            if name == "fss":
                assert len(found) == 10
                continue
            wanted = sorted(n for n, m in masks.items() if (m == c + 1).sum() >= smallest)
            if name == "pascal":
                wanted = [n for n in wanted if (n in pascal.VOC_VAL) == (split == "test")]
            if name == "coco":
                wanted = [n for n in wanted if n.startswith("val" if split == "test" else "train")]
            assert sorted(found) == wanted, (c, split)
            assert len(found) >= 2


@each
def test_manifest_says_what_was_done(name, published, data):
    manifest = json.loads((data / name / "manifest.json").read_text())
    archives = {p.name for p in published[name].iterdir()}
    assert {s["name"] for s in manifest["sources"]} == archives
    assert manifest["counts"]["pairs"] == len(expected(name))
    assert manifest["lists"]["origin"].startswith("built: ")
    assert manifest["rules"]
    assert manifest["files"]["count"] == sum(p.is_file() for p in (data / name).rglob("*")) - 2
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "files.sha256"], cwd=data / name, check=False)
    assert sums.returncode == 0
    assert not list(data.glob(".*.part"))


def test_notes_tell_what_a_reader_must_know(data):
    rules = {n: " ".join(json.loads((data / n / "manifest.json").read_text())["rules"]) for n in PACKAGES}
    assert f"{len(expected('deepglobe'))} tiles kept of 180; PATNet's paper: 5,666" in rules["deepglobe"]
    assert "2 images without a mask left out: CHNCXR_0900_1, MCUCXR_0901_0" in rules["chest_xray"]
    assert "8 masks named X_mask.png, 6 X.png" in rules["chest_xray"]
    assert "40 masks of SBD, where VOC has none" in rules["pascal"]


@pytest.mark.slow
def test_folders_do_as_well_as_archives(tmp_path, data):
    for name, (kind, package) in PACKAGES.items():
        package.write(tmp_path / name, archives=False)
        manifest = prepare(kind, [tmp_path / name], tmp_path / "data", None, download=False)
        kept = json.loads((data / name / "manifest.json").read_text())
        assert manifest["files"] == kept["files"]
        assert manifest["lists"] == kept["lists"]


def test_published_lists_go_before_built_ones(published, tmp_path):
    fss.write_lists(tmp_path / "splits" / "fss")
    manifest = prepare(FSSDataset, [published["fss"]], tmp_path / "data", tmp_path / "splits", download=False)
    assert "given" in manifest["lists"]["origin"]
    dataset = FSSDataset(str(tmp_path / "data" / "fss"))
    assert dataset.classes == ("abacus", "comb", "radio", "taxi", "handcuff", "mortar", "abe's_flyingfish", "bus")
    assert [len(dataset.base_classes(0)), len(dataset.validation_classes(0)), dataset.novel_classes(0)] == [
        4,
        2,
        [6, 7],
    ]


def test_three_classes_of_isic_need_the_published_table(published, data, tmp_path):
    with pytest.raises(DatasetError, match="three classes need PATNet's list"):
        ISICDataset(str(data / "isic"), classes=3).images_of(0, "test")
    isic.write_lists(tmp_path / "splits" / "isic")
    prepare(ISICDataset, [published["isic"]], tmp_path / "data", tmp_path / "splits", download=False)
    dataset = ISICDataset(str(tmp_path / "data" / "isic"), classes=3)
    for c, name in enumerate(isic.CLASSES):
        assert list(dataset.images_of(c, "test")) == [n for n in isic.NAMES if isic.class_of(n) == name]
        image = dataset.images_of(c, "test")[0]
        assert np.array_equal(dataset.read_mask(image, c).numpy(), isic.truth(image))
        assert np.array_equal(dataset.read_index(image).numpy(), (c + 1) * isic.truth(image))


def test_one_hospital_of_the_chest_x_rays_can_be_chosen(data):
    dataset = ChestXrayDataset(str(data / "chest_xray"), prefix="CHNCXR")
    assert list(dataset.images_of(0, "test")) == chest_xray.SHENZHEN


def test_16_bit_image_is_scaled_and_not_clipped(data):
    image = ChestXrayDataset(str(data / "chest_xray")).read_image(chest_xray.MONTGOMERY[1])
    assert 40 < image.float().mean() < 200
    assert image.unique().numel() > 20


# Repeated, interrupted, checked


@each
def test_repeating_changes_nothing(name, published, data):
    before = {p: p.stat().st_mtime_ns for p in (data / name).rglob("*")}
    manifest = prepare(PACKAGES[name][0], [published[name]], data, None, download=False)
    assert manifest == json.loads((data / name / "manifest.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in (data / name).rglob("*")} == before


@each
def test_check_finds_what_is_missing_changed_or_broken(name, data, tmp_path):
    kind = PACKAGES[name][0]
    ready = tmp_path / name
    shutil.copytree(data / name, ready)
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


@pytest.mark.slow
def test_killed_preparation_is_gone_on_with(tmp_path, data):
    """Killed as soon as the first files are in their places, again and again, until it comes through."""
    pascal.write(tmp_path / "source")
    words = ["pascal", "--source", str(tmp_path / "source"), "--root", str(tmp_path / "data")]
    command = [sys.executable, "-m", "datamodules.prepare", *words]
    ready = tmp_path / "data" / "pascal"
    for wait in (0.0, 0.15, 0.3):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and not list((tmp_path / "data").glob(".pascal.part/ready/JPEGImages/*")):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not ready.exists() or (ready / "manifest.json").exists()
    done = run_module("datamodules.prepare", *words)
    assert done.returncode == 0, done.stderr
    kept = json.loads((data / "pascal" / "manifest.json").read_text())
    manifest = json.loads((ready / "manifest.json").read_text())
    assert (manifest["files"], manifest["lists"], manifest["rules"]) == (kept["files"], kept["lists"], kept["rules"])


@each
@pytest.mark.slow
def test_nothing_of_a_failed_attempt_stays(name, tmp_path, data):
    """Other sources first, of which one file is broken; then the right ones."""
    kind, package = PACKAGES[name]
    wrong = package.write(tmp_path / "wrong", archives=False)
    image = next(iter(expected(name)))
    file = f"{image.split('_')[0]}_sat.jpg" if name == "deepglobe" else kind("").image_path(image).name
    for path in wrong.rglob(file):
        path.write_bytes(b"broken")
    with pytest.raises((DatasetError, ImageError)):
        prepare(kind, [wrong], tmp_path / "data", None, download=False)
    manifest = prepare(kind, [package.write(tmp_path / "right")], tmp_path / "data", None, download=False)
    assert manifest["files"] == json.loads((data / name / "manifest.json").read_text())["files"]


# The command


def test_command_prepares_and_checks(published, tmp_path):
    words = ["deepglobe", "--root", str(tmp_path)]
    done = run_module("datamodules.prepare", *words, "--source", str(published["deepglobe"] / "archive.zip"))
    assert done.returncode == 0, done.stderr
    assert "PATNet's paper: 5,666" in done.stdout
    assert run_module("datamodules.prepare", *words, "--check").returncode == 0
    (tmp_path / "deepglobe" / "manifest.json").unlink()
    done = run_module("datamodules.prepare", *words, "--check")
    assert done.returncode == 1
    assert "has no manifest" in done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        ("isic", "ISIC2018_Task1-2_Training_Input.zip"),
        ("deepglobe --download", "kaggle.com/datasets/balraj98"),
        ("coco --source nowhere", "There is no .*nowhere: check --source"),
        ("suim --check", "SUIM is not at"),
    ],
)
def test_command_says_what_it_needs(words, says, tmp_path):
    import re

    done = run_module("datamodules.prepare", *words.split(), "--root", str(tmp_path))
    assert done.returncode == 1
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr


def test_full_disk_is_one_message_and_the_same_command_goes_on(published, tmp_path):
    words = ["fss", "--root", str(tmp_path), "--source", str(published["fss"])]
    command = f"ulimit -f 4; {sys.executable} -m datamodules.prepare {' '.join(words)}"  # no file over 4 kB
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the same command goes on" in done.stderr or "cannot be unpacked" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "fss").exists()
    assert run_module("datamodules.prepare", *words).returncode == 0


def test_command_warns_where_lists_are_not_the_published_ones(published, tmp_path):
    done = run_module("datamodules.prepare", "isic", "--root", str(tmp_path), "--source", str(published["isic"]))
    assert done.returncode == 0, done.stderr
    assert "do not compare with published ones" in done.stdout


# Wrong files


def refused(kind, source, root, words):
    with pytest.raises((DatasetError, ImageError), match=words):
        prepare(kind, [source], root, None, download=False)
    assert not (root / kind.name).exists()


@each
def test_folder_of_something_else_is_refused(name, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("nothing")
    kind = PACKAGES[name][0]
    refused(kind, tmp_path / "source", tmp_path / "data", "no folder|No folder|No <id>|No images|check --source")


@pytest.mark.parametrize(
    "name, gone, says",
    [
        ("pascal", "2007_000100.jpg", "No such image: .*2007_000100.jpg"),
        ("pascal", "val.txt", "val.txt"),
        ("coco", "instances_val2014.json", "no instances_val2014.json"),
        ("coco", coco.file_name("val2014", coco.number_of(3)), "No such image"),
        ("fss", "abacus/7.png", "lacks 7.png"),
        ("deepglobe", "2334_sat.jpg", "No such image"),
        ("isic", "ISIC_0000006.jpg", "No such image"),
    ],
)
def test_partial_folder_is_refused(name, gone, says, tmp_path):
    kind, package = PACKAGES[name]
    source = package.write(tmp_path / "source", archives=False)
    for path in source.rglob("*"):
        if str(path).endswith(gone) and path.is_file():
            path.unlink()
    refused(kind, source, tmp_path / "data", says)


@pytest.mark.parametrize(
    "colour, says", [((10, 200, 30), r"\(10, 200, 30\) at row 5, column 9"), ((255, 0, 0), r"\(255, 0, 0\)")]
)
def test_unknown_colour_of_a_mask_is_shown(colour, says, tmp_path):
    source = deepglobe.write(tmp_path / "source", archives=False)
    path = next(source.rglob("855_mask.png"))
    mask = np.array(Image.open(path))
    mask[5, 9] = colour
    Image.fromarray(mask).save(path)
    refused(DeepglobeDataset, source, tmp_path / "data", f"855_mask.png has the colour {says}.*urban")


def test_unknown_value_of_an_index_mask_is_shown(tmp_path):
    source = pascal.write(tmp_path / "source", archives=False)
    path = next(source.rglob("SegmentationClass/2007_000103.png"))
    mask = np.array(Image.open(path))
    mask[5, 9] = 77
    Image.fromarray(mask).save(path)
    refused(PascalDataset, source, tmp_path / "data", "2007_000103.png has the value 77")


def test_broken_image_is_named(tmp_path):
    source = suim.write(tmp_path / "source", archives=False)
    path = next(source.rglob("d_r_2_.jpg"))
    path.write_bytes(path.read_bytes()[:300])
    refused(SUIMDataset, source, tmp_path / "data", r"d_r_2_.jpg cannot be read .*mend the file in .*source")


def test_mask_of_another_size_is_refused_or_noted(tmp_path, data):
    source = pascal.write(tmp_path / "source", archives=False)
    path = next(source.rglob("SegmentationClass/2007_000103.png"))
    Image.open(path).resize((20, 20)).save(path)
    refused(PascalDataset, source, tmp_path / "data", "2007_000103.jpg and .*2007_000103.png differ in size")
    rules = json.loads((data / "suim" / "manifest.json").read_text())["rules"]
    assert f"1 masks of another size than their image, resized apart: {suim.name_of(3)}" in rules


@pytest.mark.slow
def test_what_a_mac_adds_is_passed_over(tmp_path, data):
    for name, (kind, package) in PACKAGES.items():
        source = package.write(tmp_path / name, archives=False)
        for path in [p for p in source.rglob("*") if p.is_file()][::9]:
            (path.parent / f"._{path.name}").write_bytes(b"Mac OS X")
            junk = source / "__MACOSX" / path.relative_to(source)
            junk.parent.mkdir(parents=True, exist_ok=True)
            junk.write_bytes(b"Mac OS X")
        manifest = prepare(kind, [source], tmp_path / "data", None, download=False)
        assert manifest["files"] == json.loads((data / name / "manifest.json").read_text())["files"]


def test_damaged_annotations_and_matlab_files_are_named(tmp_path):
    source = coco.write(tmp_path / "coco", archives=False)
    path = next(source.rglob("instances_train2014.json"))
    path.write_text(path.read_text()[:5000])
    refused(CocoDataset, source, tmp_path / "data", "instances_train2014.json is no annotation file")
    source = pascal.write(tmp_path / "pascal", archives=False)
    next(source.rglob(f"{pascal.SBD_ONLY[3]}.mat")).write_bytes(b"MATLAB no more")
    refused(PascalDataset, source, tmp_path / "data", f"{pascal.SBD_ONLY[3]}.mat is no mask of SBD")


def test_list_that_names_an_image_that_is_not_there_is_refused(published, tmp_path):
    fss.write_lists(tmp_path / "fss")
    (tmp_path / "fss" / "test.txt").write_text("bus\nunicorn\n")
    with pytest.raises(DatasetError, match=r"given .* name 'unicorn/1.jpg', but 1.jpg is not in .*published_fss"):
        prepare(FSSDataset, [published["fss"]], tmp_path / "data", tmp_path / "fss", download=False)
    assert not (tmp_path / "data" / "fss").exists()


def test_pickled_lists_are_read_or_refused(published, tmp_path):
    import pickle

    for part in ("trn", "val"):
        year = {"trn": "train2014", "val": "val2014"}[part]
        (tmp_path / "coco" / part).mkdir(parents=True)
        for fold in range(4):
            ids = [c for c in range(80) if (c % 4 == fold) == (part == "val")]
            images = {c: [f"{year}/{coco.file_name(year, coco.number_of(i))}" for i in (9, 2, 5)] for c in ids}
            (tmp_path / "coco" / part / f"fold{fold}.pkl").write_bytes(pickle.dumps(images))
    prepare(CocoDataset, [published["coco"]], tmp_path / "data", tmp_path, download=False)
    dataset = CocoDataset(str(tmp_path / "data" / "coco"))
    assert list(dataset.images_of(7, "test")) == [
        f"val2014/{coco.file_name('val2014', coco.number_of(i))}" for i in (9, 2, 5)
    ]
    (tmp_path / "coco" / "trn" / "fold2.pkl").write_bytes(pickle.dumps({0: Path("x")}))
    with pytest.raises(DatasetError, match=r"fold2.pkl is not read: it asks for pathlib"):
        prepare(CocoDataset, [published["coco"]], tmp_path / "other", tmp_path, download=False)


def test_other_folder_in_the_place_is_left_alone(published, tmp_path):
    (tmp_path / "suim").mkdir(parents=True)
    (tmp_path / "suim" / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="has no manifest"):
        prepare(SUIMDataset, [published["suim"]], tmp_path, None, download=False)
    assert (tmp_path / "suim" / "mine.txt").read_text() == "mine"


# Real files


def test_real_suim_goes_through(shared, tmp_path):
    prepare(SUIMDataset, [shared / "data" / "suim"], tmp_path, None, download=False)
    dataset = SUIMDataset(str(tmp_path / "suim"))
    assert len(dataset.found()) == 8
    for name in dataset.found():
        rgb = np.array(Image.open(shared / "data" / "suim" / "masks" / f"{name}.bmp").convert("RGB")) > 127
        code = 4 * rgb[..., 0] + 2 * rgb[..., 1] + rgb[..., 2]
        assert np.array_equal(dataset.read_index(name).numpy(), code + 1)
    assert dataset.target_classes(dataset, "all") == [0, 1, 3, 4, 5, 6]


# Looking


def test_contact_sheet_and_table(data, tmp_path):
    done = run_module("datamodules.show", "dataset=pascal", "fold=1", f"data={data}", "--out", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert "images to train" in done.stdout
    assert "7 cat" in done.stdout
    picture = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape[0] > 1000
    outline = (np.abs(picture.astype(int) - (255, 255, 60)).sum(axis=2) < 40).mean()
    assert 0.001 < outline < 0.2
