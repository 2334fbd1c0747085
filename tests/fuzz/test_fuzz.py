"""Bad input: a few hundred new inputs each time, and the worst known ones."""

import base64
import faulthandler
import gzip
import io
import json
import mmap
import os
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from datamodules.benchmarks.pascal import sbd_mask
from datamodules.errors import DatasetError
from datamodules.prepare.source import Source
from pmnet.segment.images import load_image
from tests.fuzz import seeds
from tests.fuzz.attempt import Outcome, outcomes
from tests.fuzz.mutate import right_checksums
from tests.fuzz.targets import TARGETS

INPUTS = 300


class Evil:
    """Unpickling this runs a command that writes a file."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def large(image: Image.Image, kind: str, width: int, height: int) -> bytes:
    """A small image file whose header promises more."""
    content = seeds.saved(image, kind)
    old, new = (struct.pack(">II" if kind == "PNG" else "<HH", *size) for size in (image.size, (width, height)))
    return right_checksums(content.replace(old, new, 1))


def solid(side: int) -> bytes:
    return seeds.saved(Image.new("1", (side, side)), "PNG")


def coco(**changes: object) -> bytes:
    """Annotations of one image, with one changed entry."""
    entry = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]], "iscrowd": 0}
    image = {"id": 1, "file_name": "a_1.jpg", "height": 8, "width": 8}
    for name, value in changes.items():
        (image if name in image else entry)[name] = value
    content = {"images": [image], "annotations": [entry], "categories": [{"id": 1, "name": "person"}]}
    return json.dumps(content).encode()


def matlab(**content: object) -> bytes:
    file = io.BytesIO()
    savemat(file, content, do_compression=True)
    return file.getvalue()


def tar_of_one(**fields: object) -> bytes:
    """A tar archive with one header and no content."""
    member = tarfile.TarInfo("images/1.jpg")
    for name, value in fields.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def zip_that_claims(size: int) -> bytes:
    """A zip archive whose directory gives its only file a false size."""
    content = bytearray(seeds.zipped({"images/1.jpg": b"1" * 100}, zipfile.ZIP_STORED))
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 24, size)
    return bytes(content)


def compressed_checkpoint() -> bytes:
    """64 MB of zeros that torch.load would unpack from 100 kB."""
    buffer, whole = io.BytesIO(), io.BytesIO(seeds.torch_saved({"w": torch.zeros(1 << 24)}))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def checkpoint_of(content: bytes) -> bytes:
    """A checkpoint with other pickled content."""
    buffer, whole = io.BytesIO(), io.BytesIO(seeds.torch_saved({}))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else old.read(entry))
    return buffer.getvalue()


def safetensors_of(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


TWO_GIGABYTES = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
LYING = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'
NEST = 100_000
EPS = seeds.saved(Image.new("L", (9, 9)), "EPS")
HUGE = {"_target_": "pmnet.PMNet", "evidence": 7, "dropout": "x"}


def crop_of(png: bytes) -> dict[str, object]:
    corners = [[1, 1], [6, 6]]
    return {"label": "cat", "points": corners, "shape_type": "mask", "mask": base64.b64encode(png).decode()}


def held(image: bytes) -> dict[str, object]:
    """The entries of a labelme file that holds the image itself."""
    return {"imagePath": "absent.jpg", "imageData": base64.b64encode(image).decode()}


def labelme_of(**changed: object) -> bytes:
    return seeds.as_json(seeds.own_annotations()["labelme"][0] | changed)


def coco_of(segmentation: object = None, **changed: object) -> bytes:
    content = seeds.own_annotations()["coco"][0] | changed
    if segmentation:
        content["annotations"] = [content["annotations"][0] | {"segmentation": segmentation}]
    return seeds.as_json(content)


REFUSED: dict[str, list[tuple[str, Callable[[], bytes]]]] = {
    "image": [
        ("empty", bytes),
        ("text", lambda: b"not an image"),
        ("PNG of 4 gigapixels", lambda: large(Image.new("L", (9, 9)), "PNG", 65535, 65535)),
        ("GIF of 170 megapixels", lambda: large(Image.new("P", (9, 9)), "GIF", 13000, 13000)),
        ("170 megapixels in 20 kB", lambda: solid(13000)),
        ("EPS, a program", lambda: EPS),
    ],
    "mask, Deepglobe": [("170 megapixels", lambda: solid(13000))],
    "classes.txt": [("not text", lambda: b"\xff\xfe\xfd"), ("empty", bytes), ("twice", lambda: b"cat\ncat\n")],
    "COCO annotations": [
        ("deep", lambda: b"[" * NEST),
        ("a list", lambda: b"[]"),
        ("10^12 pixels", lambda: coco(height=10**6, width=10**6)),
        ("negative size", lambda: coco(height=-8)),
        ("a name with a null", lambda: coco(file_name="a\0b.jpg")),
        ("a polygon at infinity", lambda: coco(segmentation=[[1e308, 1, 5, 1, 5, 5]])),
        ("NaN", lambda: coco(segmentation=[[float("nan")] * 6])),
        ("runs beyond the image", lambda: coco(segmentation={"counts": [0, 10**6], "size": [8, 8]})),
        ("runs of another size", lambda: coco(segmentation={"counts": "T3R1Z>0", "size": [9999, 9999]})),
        ("no polygon", lambda: coco(segmentation=7)),
    ],
    "SBD .mat": [
        ("empty", bytes),
        ("no mask", lambda: matlab(x=1)),
        ("a number", lambda: matlab(GTcls={"Segmentation": 7.5})),
        ("text", lambda: matlab(GTcls={"Segmentation": "abc"})),
        ("HDF5", lambda: b"MATLAB 7.3".ljust(124) + struct.pack("<HH", 0x0200, 0x4D49)),
        ("a type that scipy has no room for", lambda: seeds.matlab()[1].replace(b"\2\0\0\0@\2", b"B\0\0\0@\2")),
        ("1 GB of zeros", lambda: matlab(GTcls={"Segmentation": np.zeros((1 << 14, 1 << 14), np.uint8)})),
    ],
    "pickled lists": [
        ("a command", lambda: pickle.dumps(Evil())),
        ("eval", lambda: b'cbuiltins\neval\n(S\'open("canary","w")\'\ntR.'),
        ("16 GB of memory", lambda: b"\x80\x02]r\xff\xff\xff\x3f."),
        ("a string of 8 EB", lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"."),
        ("no lists", lambda: pickle.dumps([1, 2])),
        ("an unknown class", lambda: pickle.dumps({10**9: ["a"]})),
    ],
    "lists, test.json": [
        ("deep", lambda: b"[" * NEST),
        ("a list", lambda: b"[]"),
        ("no class", lambda: b"{}"),
        ("half a character", lambda: b'{"lung": ["\\ud800"]}'),
        ("numbers", lambda: b'{"lung": [1, 2]}'),
        ("not text", lambda: b'{"lung": ["\xff"]}'),
    ],
    "lists, COCO": [
        ("not gzip", lambda: b"{}"),
        ("damaged", lambda: gzip.compress(b"{}" * 99)[:30] + b"\xff" * 30),
        ("400 MB of spaces", lambda: gzip.compress(b" " * (400 << 20), 1)),
        ("text", lambda: seeds.as_json_gz({"trn": {"0": ["a"]}, "val": {}})),
        ("no parts", lambda: seeds.as_json_gz([])),
    ],
    "lists, PASCAL": [
        ("5,000 digits", lambda: b"2007__" + b"9" * 5000 + b"\n"),
        ("a superscript", lambda: "2007__²\n".encode()),
        ("not text", lambda: b"2007__01\n\xff"),
        ("class 21", lambda: b"2007__21\n"),
    ],
    "lists, FSS": [("not text", lambda: b"bus\n\xff\n")],
    "lists, ISIC": [("not text", lambda: b"\xff"), ("200 kB of one field", lambda: b"a," + b"b" * 200_000)],
    "manifest.json": [("deep", lambda: b"[" * NEST), ("a number", lambda: b"7")],
    "files.sha256": [("a line without a path", lambda: b"e3b0c442\n")],
    "checkpoint": [
        ("a command", lambda: pickle.dumps(Evil())),
        ("a command inside", lambda: seeds.torch_saved({"record": Evil()})),
        ("compressed zeros", compressed_checkpoint),
        ("a list", lambda: seeds.torch_saved([])),
    ],
    "weights .pth": [
        ("a command", lambda: seeds.torch_saved(Evil())),
        ("compressed zeros", compressed_checkpoint),
        ("2 GB of memory", lambda: checkpoint_of(TWO_GIGABYTES)),
        ("2 GB of memory, old format", lambda: TWO_GIGABYTES),
    ],
    "weights .safetensors": [
        ("a header of 8 EB", lambda: safetensors_of(b"{}", 2**63)),
        ("more elements than bytes", lambda: safetensors_of(LYING % (b"1000", b"0,16"))),
        ("bytes beyond the end", lambda: safetensors_of(LYING % (b"1000", b"0,4000"))),
        ("an overflow", lambda: safetensors_of(LYING % (b"4294967296,4294967296", b"0,16"))),
        ("backwards", lambda: safetensors_of(LYING % (b"4", b"16,0"))),
        ("deep", lambda: safetensors_of(b"[" * NEST)),
    ],
    "labelme json": [
        ("a list", lambda: b"[]"),
        ("deep", lambda: b"[" * NEST),
        ("a name of 5,000 letters", lambda: labelme_of(imagePath="x" * 5000, shapes=[])),
        ("an image of another shape", lambda: labelme_of(imageHeight=[24])),
        ("a mask of 170 megapixels", lambda: labelme_of(shapes=[crop_of(solid(13000))])),
        ("a mask that is a program", lambda: labelme_of(shapes=[crop_of(EPS)])),
        ("an image that is a program", lambda: labelme_of(**held(EPS))),
        ("an image of 170 megapixels", lambda: labelme_of(imageHeight=13000, imageWidth=13000, **held(solid(13000)))),
        ("half an image", lambda: labelme_of(**held(seeds.images()[1][:500]))),
        ("a mask that is no image", lambda: labelme_of(shapes=[crop_of(b"PNG")])),
        ("a shape beyond all numbers", lambda: labelme_of(shapes=[{"label": "cat", "points": [[1e39, 1]] * 3}])),
    ],
    "COCO json, own images": [
        ("a name of 5,000 letters", lambda: coco_of(images=[{"id": 0, "file_name": "x" * 5000}])),
        ("runs of 4 billion", lambda: coco_of(segmentation={"counts": [2**32 - 1] * 3, "size": [24, 24]})),
        ("an image of 10 gigapixels", lambda: coco_of(segmentation={"counts": [10**10], "size": [10**5, 10**5]})),
        ("an id that is a list", lambda: coco_of(categories=[{"id": [], "name": "cat"}])),
    ],
    "YOLO labels": [
        ("a box", lambda: b"0 0.1 0.1 0.9 0.9\n"),
        ("5,000 digits", lambda: b"9" * 5000 + b" .1 .1 .9 .1 .9 .9\n"),
        ("not a number", lambda: b"0 nan nan 1 1 0 1\n"),
        ("not text", lambda: b"0 .1 .1 .9 .1 .9 .9\n\xff\n"),
    ],
    "YOLO data.yaml": [("a command", lambda: b"names: !!python/object/apply:os.system ['touch canary']\n")],
    "labelmap.txt": [
        ("colours of 5,000 digits", lambda: b"cat:" + b"9" * 5000 + b",0,0::\n"),
        ("not text", lambda: b"\xff"),
    ],
    "head .safetensors": [
        ("a list", lambda: seeds.head_file([])),
        ("nothing", lambda: seeds.head_file({})),
        ("no side", lambda: seeds.head_file(seeds.head_recipes()[0] | {"image_size": [64]})),
        ("another class", lambda: seeds.head_file(seeds.head_recipes()[0] | {"model": {"_target_": "os.system"}})),
        ("odd options", lambda: seeds.head_file(seeds.head_recipes()[0] | {"model": HUGE})),
        ("deep", lambda: safetensors_of(b'{"__metadata__": {"pmnet": "' + b"[" * NEST + b'"}}')),
    ],
    "class file": [
        ("no classes", lambda: seeds.class_file(seeds.class_file_parts()[1] | {"classes": 3})),
        ("no recipe", lambda: seeds.class_file({"classes": []})),
        ("a class without a name", lambda: seeds.class_file(seeds.class_file_parts()[1] | {"classes": [{}]})),
    ],
    "archive .zip": [
        ("absolute", lambda: seeds.zipped({"/tmp/canary.jpg": b"1"})),
        ("up", lambda: seeds.zipped({"../../canary.jpg": b"1"})),
        ("up, Windows", lambda: seeds.zipped({"..\\..\\canary.jpg": b"1"})),
        ("a file and a folder of one name", lambda: seeds.zipped({"a.jpg": b"1", "a.jpg/b.jpg": b"2"})),
        ("a name of 5,000 letters", lambda: seeds.zipped({"a" * 5000 + ".jpg": b"1"})),
        ("damaged LZMA", lambda: seeds.zipped(seeds.MEMBERS, zipfile.ZIP_LZMA).replace(b"\x5d\0\0", b"\xff\0\0")),
        ("encrypted", lambda: seeds.zipped({"a.jpg": b"1"}).replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")),
    ],
    "archive .tar": [
        ("absolute", lambda: seeds.tarred({"/tmp/canary.jpg": b"1"})),
        ("up", lambda: seeds.tarred({"a/../../canary.jpg": b"1"})),
        ("1 PB", lambda: tar_of_one(size=10**15)),
        ("a header of 8 GB", lambda: gzip.compress(tar_of_one(type=tarfile.XHDTYPE, size=8 << 30))),
        ("a name of 3 GB", lambda: gzip.compress(tar_of_one(type=tarfile.GNUTYPE_LONGNAME, size=3 << 30))),
    ],
    "overrides": [
        ("deep", lambda: b"x=" + b"[" * 3000),
        ("no file name", lambda: b"dataset=" + b"9" * 5000),
        ("a null", lambda: b"dataset=a\0b"),
        ("an environment variable", lambda: b"seed=${oc.env:NO_SUCH_VARIABLE_HERE"),
    ],
    "settings .yaml": [
        ("a command", lambda: b"x: !!python/object/apply:os.system ['touch canary']\n"),
        ("not text", lambda: b"\xff\xff"),
        ("a null", lambda: b"x: a\0b\n"),
        ("a null key", lambda: b"# @package _global_\nnull: {a: ${seed}}\n"),
        ("open brackets", lambda: b"x: [1, {2"),
    ],
}
READ: dict[str, list[tuple[str, Callable[[], bytes]]]] = {
    "archive .tar": [
        ("a link out", lambda: seeds.tarred(seeds.MEMBERS, link=("images/9.jpg", "/etc/passwd", tarfile.SYMTYPE))),
        ("a hard link out", lambda: seeds.tarred(seeds.MEMBERS, link=("images/9.jpg", "/etc/passwd", tarfile.LNKTYPE))),
        ("a device", lambda: seeds.tarred(seeds.MEMBERS, link=("images/9.jpg", "", tarfile.CHRTYPE))),
        ("a pipe", lambda: seeds.tarred(seeds.MEMBERS, link=("images/9.jpg", "", tarfile.FIFOTYPE))),
    ],
    "archive .zip": [
        ("20,000 names", lambda: seeds.zipped({f"{i}.txt": b"" for i in range(20_000)})),
        ("a false size of 4 GB", lambda: zip_that_claims(2**32 - 2)),
    ],
}
CASES = [
    pytest.param(name, kind, make, id=f"{name}-{what}")
    for kind, cases in (("refused", REFUSED), ("read", READ))
    for name, files in cases.items()
    for what, make in files
]


def one(name: str, content: bytes) -> Outcome:
    [(_, outcome)] = outcomes(name, [(0, content)])
    return outcome


@pytest.mark.parametrize("name, kind, make", CASES)
def test_worst_known_input(name, kind, make):
    outcome = one(name, make())
    assert outcome.kind == kind, outcome.detail
    assert not Path("canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_every_sound_file_is_read(name):
    """Else the damaged ones would prove nothing."""
    target = TARGETS[name]
    sound = [*target.files(), *(target.dump(value) for value in target.values())]
    found = [outcome.kind for _, outcome in outcomes(name, list(enumerate(sound)))]
    assert "failed" not in found
    assert "read" in found or name in ("manifest.json", "files.sha256")  # these vouch for files that are not there


def fill(memory: mmap.mmap) -> None:
    """Touches every page, at once; a bytearray may reuse memory that this process, and so its fork, already holds."""
    memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)


@pytest.mark.slow
def test_watch_sees_escapes_hangs_memory_and_crashes(monkeypatch, tmp_path):
    """The limits themselves: one reader that breaks each."""
    bad: dict[str, Callable[[bytes, Path], object]] = {
        "escape": lambda content, folder: (tmp_path / "out").write_bytes(content),
        "escape: os.system": lambda content, folder: os.system("true"),
        "memory": lambda content, folder: fill(mmap.mmap(-1, 3 << 29)),
        "crash": lambda content, folder: (faulthandler.disable(), os.abort()),
        "error: ZeroDivisionError": lambda content, folder: 1 / 0,
        "hang": lambda content, folder: time.sleep(9),
    }
    for what, read in bad.items():
        monkeypatch.setattr("tests.fuzz.attempt.PATIENCE", 1 if what == "hang" else 30)
        monkeypatch.setitem(TARGETS, "image", type(TARGETS["image"])(read))
        outcome = one("image", b"")
        assert outcome.kind == "failed"
        assert outcome.detail.startswith(what), outcome.detail


@pytest.mark.parametrize(
    "name, make",
    [
        ("a.zip", lambda: seeds.zipped({"a.jpg": bytes(1 << 24)})),
        ("a.tgz", lambda: gzip.compress(seeds.tarred({"a.jpg": bytes(1 << 24)}))),
    ],
)
def test_archive_that_holds_more_than_the_disk_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name, make):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DatasetError, match=r"holds 0\.0 GB to unpack, but the disk"):
        Source([tmp_path / name], ["*.jpg"], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jpg"))


@pytest.mark.parametrize("name, make", [("a.zip", seeds.zipped), ("a.tar", seeds.tarred)])
def test_archive_of_too_many_files_is_refused(tmp_path, monkeypatch, name, make):
    monkeypatch.setattr("datamodules.prepare.source.MOST_FILES", 99)
    for count, refused in ((99, False), (100, True)):
        (tmp_path / name).write_bytes(make({f"{i}.jpg": b"" for i in range(count)}))
        with pytest.raises(DatasetError, match="more than 99 files") if refused else nullcontext():
            Source([tmp_path / name], ["*.jpg"], tmp_path / f"out{count}")


@pytest.mark.slow
def test_new_bad_input_each_time():
    seed = int(os.environ.get("FUZZ_SEED") or time.time_ns() % 10**6)
    print(f"FUZZ_SEED={seed}")
    share = sum(target.share for target in TARGETS.values())
    for name, target in TARGETS.items():
        inputs = [(number, seed) for number in range(round(INPUTS * target.share / share))]
        failed = [f"{name} {n}: {o.detail}" for n, o in outcomes(name, inputs) if o.kind == "failed"]
        assert not failed, f"FUZZ_SEED={seed}: {failed[0]} ({len(failed)} such inputs)"


def test_masks_of_sbd_are_what_scipy_reads(tmp_path):
    for content in seeds.matlab():
        (tmp_path / "a.mat").write_bytes(content)
        expected = loadmat(tmp_path / "a.mat")["GTcls"]["Segmentation"][0, 0]
        found = sbd_mask(tmp_path / "a.mat")
        assert np.array_equal(found, expected)
        assert found.dtype == np.uint8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"])
def test_image_read_in_strips_is_the_whole_image(tmp_path, mode):
    image = Image.effect_noise((30, 1100), 90).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = np.array(Image.open(path).convert("RGB"))
    assert np.array_equal(load_image(path).permute(1, 2, 0).numpy(), expected)


def test_checksums_are_corrected():
    content = bytearray(seeds.saved(Image.new("L", (3, 3)), "PNG"))
    content[16:24] = struct.pack(">II", 5, 7)
    chunk = right_checksums(bytes(content))[12:33]
    assert zlib.crc32(chunk[:-4]) == struct.unpack(">I", chunk[-4:])[0]
