"""The page of `pmnet serve`, and what stands behind it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import Headers

from pmnet.errors import ImageError, SettingError
from pmnet.segment.page import MAX_BYTES, MAX_TOTAL, MEGABYTE, Guard, listening
from pmnet.segment.segmenter import Segmenter
from pmnet.segment.session import MAX_FILES, Category, Example, Photo, Session
from tests.chromium import Tab, chromium


@pytest.fixture(scope="module")
def nearest() -> Segmenter:
    return Segmenter.load("nearest", device="cpu")


@pytest.fixture
def session(nearest, tmp_path: Path) -> Session:
    return Session(nearest, tmp_path / "session", Lock())


RED = (220, 30, 30)


def scene(
    path: Path, size: tuple[int, int], box: tuple[int, int, int, int], colour: tuple[int, int, int] = RED
) -> Path:
    """A noisy photo of `size` (width, height) with a box."""
    noise = np.random.default_rng(0).integers(90, 160, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    photo.paste(colour, box)
    photo.save(path)
    return path


def blank(width: int, height: int) -> Example:
    return Example("a.jpg", Path("a.jpg"), (height, width), Image.new("RGB", (width, height)))


# Behind the page


def test_brush_paints_all_that_is_near_its_line() -> None:
    example, (height, width) = blank(200, 120), (120, 200)
    example.strokes.append({"tool": "brush", "size": 0.1, "points": [(0.2, 0.3), (0.6, 0.7), (0.8, 0.2)]})
    y, x = np.mgrid[:height, :width]
    ends = np.array([(0.2, 0.3), (0.6, 0.7), (0.8, 0.2)]) * (width, height)
    near = np.full((height, width), np.inf)
    for a, b in pairwise(ends):
        along = (((x - a[0]) * (b - a)[0] + (y - a[1]) * (b - a)[1]) / ((b - a) ** 2).sum()).clip(0, 1)
        near = np.minimum(near, np.hypot(x - a[0] - along * (b - a)[0], y - a[1] - along * (b - a)[1]))
    mask = example.mask()
    assert set(np.unique(mask)) == {0, 1}
    assert mask[near < 9].all()
    assert not mask[near > 11.5].any()


def test_outline_is_filled_and_eraser_takes_away() -> None:
    example = blank(200, 100)
    example.strokes.append({"tool": "outline", "size": 0.1, "points": [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)]})
    assert int(example.mask().sum()) == pytest.approx(160 * 80, abs=300)
    example.strokes.append({"tool": "erase", "size": 0.2, "points": [(0.5, 0.5)]})
    assert int(example.mask().sum()) == pytest.approx(160 * 80 - np.pi * 20**2, abs=300)
    example.strokes.append({"tool": "brush", "size": 0.2, "points": [(0.5, 0.5)]})
    assert int(example.mask().sum()) == pytest.approx(160 * 80, abs=300)


@pytest.mark.slow
def test_masks_follow_the_threshold_without_predicting(session, tmp_path: Path, monkeypatch) -> None:
    example = scene(tmp_path / "one.png", (160, 120), (40, 30, 100, 90))
    session.add_examples(session.categories[0], [("one.png", example)])
    session.examples[0].strokes.append(
        {"tool": "outline", "size": 0.05, "points": [(0.25, 0.25), (0.625, 0.25), (0.625, 0.75), (0.25, 0.75)]}
    )
    sizes = [(150, 110), (333, 97)]
    photos = [scene(tmp_path / f"{k}.png", size, (20, 20, 70, 80)) for k, size in enumerate(sizes)]
    session.add_photos([(path.name, path) for path in photos])
    assert not session.ready
    session.fit()
    for photo in session.photos:
        session.segment(photo)

    again = Segmenter.load("nearest", device="cpu").fit([(example, session.examples[0].mask())])
    scores = [again.predict(path, gate=False).score for path in photos]
    monkeypatch.setattr(Segmenter, "features", lambda *_, **__: pytest.fail("predicted again"))
    for threshold in (0.3, 0.5, 0.6):
        with zipfile.ZipFile(session.masks(threshold, absent=True)) as archive:
            assert archive.namelist() == ["0.png", "1.png"]
            for k, score in enumerate(scores):
                mask = np.asarray(Image.open(archive.open(f"{k}.png")))
                assert mask.shape == sizes[k][::-1]
                clear = np.abs(score - threshold) > 1e-3  # where rounding cannot decide
                np.testing.assert_array_equal(mask[clear], score[clear] > threshold)
                assert threshold != 0.5 or np.array_equal(mask, score > 0.5)
    shares = [session.photos[0].overlay(threshold, absent=True)[1][0] for threshold in (0.3, 0.5, 0.7)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    session.photos[0].presences = [0.2]
    assert session.photos[0].overlay(0.3)[1] == [0]
    assert not session.photos[0].mask(0.3).any()


def test_class_file_segments_as_the_page_does(session, tmp_path: Path) -> None:
    example = scene(tmp_path / "one.png", (160, 120), (40, 30, 100, 90))
    mask = np.zeros((120, 160), np.uint8)
    mask[30:90, 40:100] = 255
    Image.fromarray(mask).save(tmp_path / "one_mask.png")
    session.categories[0].name = "red box/1"
    session.add_examples(session.categories[0], [("one_mask.png", tmp_path / "one_mask.png"), ("one.png", example)])
    assert [e.name for e in session.examples] == ["one.png"]
    np.testing.assert_array_equal(session.examples[0].mask(), mask > 0)
    loaded = Segmenter.load(session.class_file(), device="cpu")
    assert loaded.classes == ("red box/1",)
    photo = scene(tmp_path / "two.png", (140, 100), (20, 20, 70, 80))
    session.add_photos([("two.png", photo)])
    session.segment(session.photos[0])
    np.testing.assert_array_equal(
        session.photos[0].mask(0.5, absent=True), loaded.predict(photo, gate=False).score > 0.5
    )
    other = Session(loaded, tmp_path / "other", Lock())  # serve --head FILE
    assert other.ready
    assert other.categories[0].name == "red box/1"


@pytest.mark.slow
def test_several_classes_are_those_of_the_segmenter(session, nearest, tmp_path: Path) -> None:
    """The masks of a tab are those of a Segmenter that was shown the same, whichever classes seem absent."""
    boxes = {"red": (220, 30, 30), "blue": (30, 60, 220)}
    mask = np.zeros((120, 160), np.uint8)
    mask[30:90, 40:100] = 1
    session.add_category()
    for category, (name, colour) in zip(session.categories, boxes.items(), strict=True):
        category.name = name
        session.add_examples(
            category, [("a.png", scene(tmp_path / f"{name}.png", (160, 120), (40, 30, 100, 90), colour))]
        )
        category.examples[0].base = mask
    two = Image.open(scene(tmp_path / "two.png", (200, 150), (20, 20, 70, 80)))
    two.paste(boxes["blue"], (110, 40, 180, 120))
    two.save(tmp_path / "two.png")
    session.add_photos([("two.png", tmp_path / "two.png")])
    session.fit()
    session.segment(session.photos[0])

    photo, again = session.photos[0], Segmenter.load("nearest", device="cpu")
    again.fit({name: [(tmp_path / f"{name}.png", mask)] for name in boxes})
    for gate in (True, False):
        np.testing.assert_array_equal(photo.mask(0.5, absent=not gate), again.predict(two, gate=gate).mask)
    assert photo.presences == pytest.approx(list(again.predict(two).presences.values()))
    for absent in ([0.1, 0.9], [0.9, 0.1], [0.1, 0.1]):
        photo.presences = absent
        assert set(np.unique(photo.mask(0.2))) == {0, *(k for k, value in enumerate(absent, start=1) if value > 0.5)}
    with zipfile.ZipFile(session.masks(0.5, absent=True)) as archive:
        assert archive.namelist() == ["two.png", "classes.txt"]
        assert archive.read("classes.txt") == b"red\nblue\n"
        np.testing.assert_array_equal(
            np.asarray(Image.open(archive.open("two.png"))), again.predict(two, gate=False).mask
        )

    session.categories[0].name = "crimson"  # segmented photos keep their masks
    assert Segmenter.load(session.class_file(), device="cpu").classes == ("crimson", "blue")
    assert photo.pieces
    session.remove_category(session.categories[0])
    assert not photo.pieces
    session.fit()
    assert session.segmenter.classes == ("blue",)


@pytest.mark.slow
def test_large_photos_are_cut_as_the_segmenter_cuts_them(session, tmp_path: Path) -> None:
    mask = np.zeros((96, 128), np.uint8)
    mask[24:72, 32:80] = 1
    session.add_examples(session.categories[0], [("a.png", scene(tmp_path / "a.png", (128, 96), (32, 24, 80, 72)))])
    session.categories[0].examples[0].base = mask
    large = scene(tmp_path / "large.png", (300, 210), (200, 100, 260, 160))
    session.add_photos([("large.png", large)])
    session.fit()
    session.segment(session.photos[0])
    again = Segmenter.load("nearest", device="cpu").fit([(tmp_path / "a.png", mask)])
    assert len(session.photos[0].pieces) > 4
    np.testing.assert_array_equal(session.photos[0].mask(0.5, absent=True), again.predict(large, gate=False).mask)
    assert session.photos[0].presences == pytest.approx([again.predict(large).presence])


@pytest.mark.slow
def test_examples_join_the_classes_of_a_class_file(session, tmp_path: Path) -> None:
    mask = np.zeros((120, 160), np.uint8)
    mask[30:90, 40:100] = 1
    red = scene(tmp_path / "red.png", (160, 120), (40, 30, 100, 90))
    blue = scene(tmp_path / "blue.png", (160, 120), (40, 30, 100, 90), (30, 60, 220))
    loaded = Segmenter.load("nearest", device="cpu").fit({"red": [(red, mask)]})
    given = loaded.shown["red"].presence
    other = Session(loaded, tmp_path / "other", Lock())
    other.add_category()
    other.categories[1].name = "blue"
    other.add_examples(other.categories[1], [("blue.png", blue)])
    other.categories[1].examples[0].base = mask
    other.fit()
    want = Segmenter.load("nearest", device="cpu").fit({"red": [(red, mask)], "blue": [(blue, mask)]})
    assert other.segmenter.classes == ("red", "blue")
    for name, shown in want.shown.items():
        assert other.segmenter.shown[name].presence == shown.presence
    assert loaded.shown["red"].presence == given  # other tabs have it


def test_names_of_classes_are_checked(session, tmp_path: Path) -> None:
    example = scene(tmp_path / "one.png", (160, 120), (40, 30, 100, 90))
    session.add_category()
    session.add_category()
    assert [category.name for category in session.categories] == ["object", "object 2", "object 3"]
    for category in session.categories[:2]:
        session.add_examples(category, [("one.png", example)])
        category.examples[0].base = np.ones((120, 160), np.uint8)
    with pytest.raises(SettingError, match="Add at least one example of 'object 3'"):
        session.fit()
    session.remove_category(session.categories[2])
    session.categories[1].name = " object "
    with pytest.raises(SettingError, match="Two classes have the name object"):
        session.fit()
    session.categories[0].name = "  "
    with pytest.raises(SettingError, match="Class 1 has no name"):
        session.fit()
    assert session.changed


def test_messages_name_the_upload_not_the_place(session, tmp_path: Path) -> None:
    good = scene(tmp_path / "good.png", (160, 120), (40, 30, 100, 90)).rename(tmp_path / "0001")
    broken, small = tmp_path / "0002", tmp_path / "0003"
    broken.write_bytes(good.read_bytes()[:500])
    Image.new("L", (80, 60), 255).save(tmp_path / "small.png")
    (tmp_path / "small.png").rename(small)

    with pytest.raises(SettingError, match="Add at least one example"):
        session.fit()
    session.add_examples(session.categories[0], [("cow.jpg", good)])
    with pytest.raises(SettingError, match=r"^cow.jpg has no mask: paint the object, or upload its mask.$"):
        session.fit()
    with pytest.raises(ImageError, match=r"^barn.jpg cannot be read") as error:
        session.add_photos([("barn.jpg", broken)])
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(SettingError, match=r"^mask.png has 60 x 80 pixels, its image 120 x 160") as error:
        session.add_mask(session.examples[0], "mask.png", small)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(SettingError, match="no masks yet"):
        session.masks(0.5)
    session.photos = [Photo("p.jpg", good, (120, 160), Image.new("RGB", (160, 120)))] * MAX_FILES
    with pytest.raises(SettingError, match=f"At most {MAX_FILES} photos fit: last.jpg"):
        session.add_photos([("last.jpg", good)])
    session.categories.append(Category("more", session.examples * (MAX_FILES - 1)))
    with pytest.raises(SettingError, match=f"At most {MAX_FILES} examples fit: last.jpg"):
        session.add_examples(session.categories[0], [("last.jpg", good)])


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "127.0.0.1:7860"}, None),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, None),
        ({"host": "localhost", "content-length": "1000"}, None),
        ({"host": "[::1]:7860"}, None),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "https://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "content-length": str(MAX_TOTAL + 2 * MEGABYTE)}, 413),
        ({"host": "127.0.0.1:7860", "transfer-encoding": "chunked"}, 413),
    ],
)
def test_guard_refuses_other_sites_and_huge_requests(headers: dict[str, str], status: int | None) -> None:
    refusal = Guard(None, ("127.0.0.1", "localhost", "::1")).refusal(Headers(headers))
    assert (refusal and refusal.status_code) == status


def test_taken_port_is_one_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"Cannot listen at 127.0.0.1, port {port}: .*--port"
        with pytest.raises(SettingError, match=message), listening("127.0.0.1", port):
            pass


# In a process of its own


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs `pmnet serve` in an empty folder; its address and the process."""
    for name in ("work", "temporary"):
        (folder / name).mkdir()
    # nicegui waits for its own test server where it finds pytest
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    environment |= {"TMPDIR": str(folder / "temporary"), "HOME": str(folder / "work"), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "pmnet", "serve", "--no-browser", "--port", "0", "--device", "cpu", *arguments]
    with subprocess.Popen(
        command, cwd=folder / "work", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("The page is at http://127.0.0.1:"), line + process.stdout.read()
            yield line.split()[4], process
        finally:
            process.kill()


def ends(process: subprocess.Popen, sent: signal.Signals) -> str:
    """What it prints after a signal; it must end, with exit code 0."""
    process.send_signal(sent)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def left_behind(folder: Path) -> list[Path]:
    """Files that the server left; torch keeps an empty folder for its compiler."""
    return [path for name in ("work", "temporary") for path in (folder / name).rglob("*") if path.is_file()]


@pytest.mark.slow
def test_server_serves_itself_alone_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    with served(tmp_path, "--head", "nearest") as (address, process):
        with urllib.request.urlopen(address) as answer:
            assert b"PMNet" in answer.read()
        for path in ("etc/passwd", "..%2f..%2fetc%2fpasswd", "_nicegui/../../../etc/passwd", "docs", "openapi.json"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(address + path)
            assert error.value.code == 404
        request = urllib.request.Request(address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == 403
        assert "Traceback" not in ends(process, signal.SIGINT)
    assert not left_behind(tmp_path)


def found(tab: Tab) -> list[float]:
    """The shares in % that the page states."""
    return tab.js(r"[...document.body.innerText.matchAll(/([\d.]+)% of the photo/g)].map(m => +m[1])")


def message(tab: Tab, text: str) -> None:
    """Waits for a message and closes it; it must be the only one."""
    tab.until(f"document.body.innerText.includes({text!r})")
    assert tab.js("document.querySelectorAll('.q-notification').length") == 1
    tab.js("document.querySelector('.q-notification button').click()")
    tab.until("document.querySelectorAll('.q-notification').length == 0")


def give(tab: Tab, area: str, *files: Path, number: int = 0) -> None:
    """Drops files into the upload area whose label begins with `area`, the `number`-th of several."""
    tab.js(
        "document.querySelectorAll('#chosen').forEach(input => input.removeAttribute('id'));"
        f"[...document.querySelectorAll('.q-uploader')].filter(u => u.innerText.startsWith({area!r}))[{number}]"
        ".querySelector('input').id = 'chosen'"
    )
    tab.give("#chosen", *files)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")
def test_from_dropped_photos_to_masks_in_a_browser(shared: Path, tmp_path: Path) -> None:
    photos = sorted((shared / "data" / "industrial" / "s40_40_B").glob("*.jpg"))
    truth = np.asarray(Image.open(photos[0].with_suffix(".png"))) > 0
    (tmp_path / "broken.jpg").write_bytes(photos[0].read_bytes()[:3000])
    Image.new("L", (50, 40), 1).save(tmp_path / f"{photos[0].stem}_mask.png")
    downloads = tmp_path / "downloads"

    with served(tmp_path, "--head", "nearest") as (address, process), chromium(tmp_path) as tab:
        tab.open(address)
        tab.until("document.querySelectorAll('.q-uploader').length >= 2")
        tab.click("Segment")
        message(tab, "Add at least one example")

        give(tab, "Example", photos[0])
        tab.until("document.querySelectorAll('.paint img').length == 1")
        tab.click("Segment")
        message(tab, f"{photos[0].name} has no mask: paint the object, or upload its mask.")
        give(tab, "Example", tmp_path / f"{photos[0].stem}_mask.png")
        message(tab, "they must be equal")
        give(tab, "Photos", tmp_path / "broken.jpg")
        message(tab, "broken.jpg cannot be read")

        give(tab, "Photos", *photos[1:4])
        tab.until("document.querySelectorAll('.found').length == 3")
        x, y, width, height = tab.js(
            "(box => [box.x, box.y, box.width, box.height])(document.querySelector('.paint').getBoundingClientRect())"
        )
        rows, columns = np.nonzero(truth)
        left, right = columns.min() / truth.shape[1], columns.max() / truth.shape[1]
        top, bottom = rows.min() / truth.shape[0], rows.max() / truth.shape[0]
        tab.click("Outline")
        tab.until("document.querySelector('.paint canvas').style.cursor == 'crosshair'")
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        tab.drag(*((x + a * width, y + b * height) for a, b in corners))
        tab.js("document.querySelector('.q-toggle').click()")  # show masks where it seems absent too
        tab.click("Segment")
        tab.until("(document.body.innerText.match(/% of the photo/g) || []).length == 3")
        shares = {0.5: found(tab)}
        x, y, width, height = tab.js(
            "(box => [box.x, box.y, box.width, box.height])([...document.querySelectorAll('.q-slider__track')].at(-1)"
            ".getBoundingClientRect())"
        )
        for aim in (0.3, 0.8):
            before = tab.text()
            tab.drag((x + aim * width, y + height / 2))
            tab.until(f"document.body.innerText != {before!r}")
            tab.until(f"Math.abs({SHOWN} - {aim}) < 0.03")
            time.sleep(0.5)
            shares[aim] = found(tab)
        assert all(low >= mid >= high for low, mid, high in zip(shares[0.3], shares[0.5], shares[0.8], strict=True))
        assert shares[0.3] != shares[0.8]

        tab.open(address)  # once more
        tab.until("document.querySelectorAll('.found').length == 3")
        tab.until("document.querySelectorAll('.paint').length == 1")
        tab.until(f"{SHOWN} == 0.5")
        tab.js("document.querySelector('.q-toggle').click()")
        tab.until("(document.body.innerText.match(/% of the photo/g) || []).length == 3")
        tab.js("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Masks')).click()")
        tab.js("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Class file')).click()")
        masks, shown = arrived(downloads / "masks.zip"), arrived(downloads / "object.safetensors")
        assert found(tab) == shares[0.5]

        segmenter = Segmenter.load(shown, device="cpu")
        learned = segmenter.shown["object"].masks[0].numpy() > 0
        drawn = np.zeros(truth.shape, bool)
        drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        drawn = np.asarray(Image.fromarray(drawn).resize(learned.shape[::-1], Image.Resampling.NEAREST))
        assert (learned & drawn).sum() / (learned | drawn).sum() > 0.85  # the box was painted where the mouse was
        with zipfile.ZipFile(masks) as archive:
            assert archive.namelist() == [photo.with_suffix(".png").name for photo in photos[1:4]]
            for photo, share in zip(photos[1:4], shares[0.5], strict=True):
                mask = np.asarray(Image.open(archive.open(photo.with_suffix(".png").name)))
                result = segmenter.predict(photo, gate=False)
                assert result.seconds < 2
                np.testing.assert_array_equal(mask, result.score > 0.5)
                assert 100 * mask.mean() == pytest.approx(share, abs=0.3)

        tab.picture(tmp_path / "page.png")
        own = (address, address.replace("http", "ws"), f"blob:{address}", "data:")
        assert len(tab.requests) > 10
        assert [request for request in tab.requests if not request.startswith(own)] == []
        ends(process, signal.SIGTERM)
    assert not left_behind(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")
def test_two_classes_with_the_shipped_head_in_two_tabs(shared: Path, tmp_path: Path) -> None:
    """Each class in its colour; a second tab starts empty; uploads that are too large or empty are refused."""
    folders = [shared / "data" / "industrial" / name for name in ("s40_40_B", "axis")]
    first, second = (sorted(folder.glob("*.jpg"))[:3] for folder in folders)
    (tmp_path / "empty.jpg").touch()
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1)

    with served(tmp_path) as (address, process), chromium(tmp_path) as tab:
        tab.open(address)
        tab.until("document.body.innerText.includes('head pmnet_lite')")
        give(tab, "Example", tmp_path / "huge.jpg")
        message(tab, "Not uploaded: at most")
        give(tab, "Example", tmp_path / "empty.jpg")
        message(tab, "empty.jpg cannot be read")
        assert tab.js("document.querySelectorAll('.paint').length") == 0

        give(tab, "Example", first[0], first[0].with_suffix(".png"))
        tab.until("document.querySelectorAll('.paint').length == 1")
        tab.js("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Another class')).click()")
        tab.until("document.querySelectorAll('.dot').length == 2")
        give(tab, "Photos", first[1], second[1])
        tab.until("document.querySelectorAll('.found').length == 2")
        tab.click("Segment")
        message(tab, "Add at least one example of 'object 2'")
        give(tab, "Example", second[0], second[0].with_suffix(".png"), number=1)
        tab.until("document.querySelectorAll('.paint').length == 2")
        colours = tab.js("[...document.querySelectorAll('.dot')].map(dot => getComputedStyle(dot).backgroundColor)")
        assert colours == ["rgb(255, 40, 40)", "rgb(40, 140, 255)"]
        for number, colour in enumerate(colours):
            tab.until(f"({PAINTED})(document.querySelectorAll('.paint canvas')[{number}]) == {colour!r}")
        tab.js("document.querySelector('.q-toggle').click()")  # show masks where it seems absent too
        tab.click("Segment")
        tab.until("(document.body.innerText.match(/% of the photo/g) || []).length == 4", 120)
        assert tab.text().count("object: ") == tab.text().count("object 2: ") == 2

        with tab.another() as other:
            other.open(address)
            other.until("document.querySelectorAll('.q-uploader').length == 2")
            assert other.js("document.querySelectorAll('.found, .paint').length") == 0
        tab.js("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Masks')).click()")
        tab.js("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Class file')).click()")
        masks = arrived(tmp_path / "downloads" / "masks.zip")
        segmenter = Segmenter.load(arrived(tmp_path / "downloads" / "object-object_2.safetensors"), device="cpu")
        with zipfile.ZipFile(masks) as archive:
            assert archive.read("classes.txt") == b"object\nobject 2\n"
            for photo in (first[1], second[1]):
                mask = np.asarray(Image.open(archive.open(photo.with_suffix(".png").name)))
                np.testing.assert_array_equal(mask, segmenter.predict(photo, gate=False).mask)
        tab.picture(tmp_path / "page.png")
        ends(process, signal.SIGHUP)
    assert not left_behind(tmp_path)


PAINTED = """canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let k = 0; k < data.length; k += 4)
    if (data[k + 3] == 255) return `rgb(${data[k]}, ${data[k + 1]}, ${data[k + 2]})`;
}"""
SHOWN = "+document.body.innerText.match(/Threshold ([\\d.]+)/)?.[1]"


def arrived(file: Path) -> Path:
    """Waits until a download is complete."""
    end = time.monotonic() + 30
    while not file.is_file():
        assert time.monotonic() < end, f"{file.name} did not arrive"
        time.sleep(0.1)
    return file
