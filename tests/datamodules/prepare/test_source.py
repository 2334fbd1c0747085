"""Archives, downloads and pickles that are broken or cannot be trusted."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from datamodules.errors import DatasetError
from datamodules.prepare.download import Download, fetch
from datamodules.prepare.lists import read_pickle
from datamodules.prepare.source import Source, place


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes], link: tuple[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            file.addfile(member)
    return path


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


PACK = {"a.zip": zipped, "a.tgz": tarred}


@pytest.mark.parametrize("name", PACK)
def test_wanted_files_are_unpacked_and_found(tmp_path, name):
    archive = PACK[name](tmp_path / name, {"x/images/1.jpg": b"1", "x/images/2.txt": b"2", "y/1.jpg": b"3"})
    source = Source([archive], ["*images/*.jpg"], tmp_path / "out")
    assert files_in(source.roots[0]) == {"x/images/1.jpg"}
    assert source.need("x/images", ".jpg", of="a").name == "images"
    assert source.archives == [
        {"name": name, "bytes": archive.stat().st_size, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    ]


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("evil", ["../evil.jpg", "/tmp/evil.jpg", "images/../../evil.jpg"])
def test_archive_that_would_write_outside_its_folder_is_refused(tmp_path, name, evil):
    archive = PACK[name](tmp_path / name, {"images/1.jpg": b"1", evil: b"2"})
    with pytest.raises(DatasetError, match=r"evil.jpg', which would be written outside"):
        Source([archive], ["*.jpg"], tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.jpg"))
    assert not [p for p in (tmp_path / "deep" / "out").iterdir() if p.suffix != ".part"]


def test_links_in_archives_are_not_followed(tmp_path):
    archive = tarred(tmp_path / "a.tgz", {"images/1.jpg": b"1"}, link=("images/2.jpg", "/etc/passwd"))
    source = Source([archive], ["*.jpg"], tmp_path / "out")
    assert files_in(source.roots[0]) == {"images/1.jpg"}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_partial_archive_is_reported_and_leaves_no_folder(tmp_path, name, keep):
    archive = PACK[name](tmp_path / name, {f"images/{i}.jpg": bytes(range(256)) * 40 for i in range(20)})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DatasetError, match=rf"{name} is damaged or incomplete"):
        Source([archive], ["*.jpg"], tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix != ".part"]


def test_damaged_byte_in_a_zip_is_found(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"images/1.jpg": b"A" * 1000})
    archive.write_bytes(archive.read_bytes().replace(b"A" * 1000, b"A" * 500 + b"B" + b"A" * 499))
    with pytest.raises(DatasetError, match="damaged"):
        Source([archive], ["*.jpg"], tmp_path / "out")


def test_wrong_source_is_reported(tmp_path):
    with pytest.raises(DatasetError, match=r"There is no .*nowhere: check --source"):
        Source([tmp_path / "nowhere"], ["*"], tmp_path / "out")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"neither a folder nor an archive"):
        Source([tmp_path / "a.txt"], ["*"], tmp_path / "out")
    with pytest.raises(DatasetError, match=r"no folder JPEGImages/ with files .* in .* part of VOC"):
        Source([tmp_path], ["*"], tmp_path / "out").need("JPEGImages", ".jpg", of="VOC")


def test_place_leaves_complete_files(tmp_path):
    (tmp_path / "a").write_text("new")
    place(tmp_path / "a", tmp_path / "to" / "a")
    place(tmp_path / "a", tmp_path / "to" / "a")
    assert (tmp_path / "to" / "a").read_text() == "new"
    assert files_in(tmp_path / "to") == {"a"}


# Pickles


class Evil:
    def __reduce__(self):
        return (print, ("owned",))


def test_pickles_of_plain_values_are_read(tmp_path):
    path = tmp_path / "fold0.pkl"
    value = {0: ["val2014/a.jpg"], 4: ["val2014/b.jpg", "c"]}
    path.write_bytes(pickle.dumps(value))
    assert read_pickle(path) == value


@pytest.mark.parametrize("value", [Evil(), {0: Evil()}, Path("x"), print], ids=["call", "deep", "class", "function"])
def test_pickles_with_a_global_are_refused(tmp_path, value, capsys):
    path = tmp_path / "fold0.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(DatasetError, match=r"fold0.pkl cannot be loaded: it refers to .*Do not trust"):
        read_pickle(path)
    assert "owned" not in capsys.readouterr().out


def test_truncated_pickle_is_reported(tmp_path):
    path = tmp_path / "fold0.pkl"
    path.write_bytes(pickle.dumps({0: ["a"] * 9})[:-7])
    with pytest.raises(DatasetError, match=r"fold0.pkl cannot be loaded"):
        read_pickle(path)


# Downloads, from a server on this machine

CONTENT = bytes(range(256)) * 8000


class Server(http.server.BaseHTTPRequestHandler):
    ranges, break_after, asked = True, None, []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = self.break_after or len(CONTENT)
        type(self).break_after = None
        self.wfile.write(CONTENT[start:stop])
        return None

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def address():
    handler = type("Handler", (Server,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


def test_download_is_complete_and_requested_once(address, tmp_path):
    url, handler = address
    for _ in range(2):
        path = fetch(Download(f"{url}/file.bin", DIGEST), tmp_path)
    assert path.read_bytes() == CONTENT
    assert handler.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_resumed(address, tmp_path, ranges):
    url, handler = address
    handler.ranges, handler.break_after = ranges, 700_000
    with pytest.raises(DatasetError, match=r"cannot be downloaded .*resume after [\d,]+ bytes"):
        fetch(Download(f"{url}/file.bin", DIGEST), tmp_path)
    assert not (tmp_path / "file.bin").exists()
    kept = (tmp_path / "file.bin.part").stat().st_size
    assert 0 < kept <= 700_000
    assert fetch(Download(f"{url}/file.bin", DIGEST), tmp_path).read_bytes() == CONTENT
    assert handler.asked == [None, f"bytes={kept}-"]


def test_file_that_is_not_the_published_one_is_deleted(address, tmp_path):
    url, _ = address
    with pytest.raises(DatasetError, match="is not the published file"):
        fetch(Download(f"{url}/file.bin", "md5:" + "0" * 32), tmp_path)
    assert not list(tmp_path.iterdir())


def test_complete_part_of_an_earlier_attempt_is_reused(address, tmp_path):
    url, _ = address
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(Download(f"{url}/file.bin", DIGEST), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file.bin", "missing"])
def test_no_connection_and_no_file_are_one_message(address, tmp_path, url):
    url = f"{address[0]}/missing" if url == "missing" else url
    with pytest.raises(DatasetError, match=r"cannot be downloaded .*--source or --splits"):
        fetch(Download(url), tmp_path)
    assert not (tmp_path / "missing").exists()
