"""The benchmarks' files, written and prepared once for all tests here, and only for the benchmarks that a test uses."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from datamodules.benchmarks.base import Benchmark
from datamodules.errors import DatasetError
from datamodules.prepare.ready import prepare
from pmnet.errors import ImageError
from tests.data.fixture import FIXTURES, KINDS


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[..., Path]:
    """(benchmark, archives=True) -> folder with its publisher's files; not to be changed."""

    @cache
    def write(name: str, archives: bool = True) -> Path:
        return FIXTURES[name].write(tmp_path_factory.mktemp(f"published_{name}"), archives)

    return write


@pytest.fixture(scope="session")
def prepared(published, tmp_path_factory) -> Callable[[str], Path]:
    """Benchmark -> its prepared folder; not to be changed."""
    root = tmp_path_factory.mktemp("data")

    @cache
    def ready(name: str) -> Path:
        prepare(KINDS[name], [published(name)], root, None, download=False)
        return root / name

    return ready


@pytest.fixture
def refuses(tmp_path) -> Callable[[type[Benchmark], Path, str], str]:
    """(kind, source, words=None) -> text of the error with which `prepare` refuses the source.

    `words` is a regular expression that the text has to match. A refused source leaves no prepared folder.
    """

    def check(kind: type[Benchmark], source: Path, words: str | None = None) -> str:
        with pytest.raises((DatasetError, ImageError), match=words) as error:
            prepare(kind, [source], tmp_path / "data", None, download=False)
        assert not (tmp_path / "data" / kind.name).exists()
        return str(error.value)

    return check


@pytest.fixture
def lists(shared) -> str:
    """The folder of all published lists."""
    return str(shared / "splits")
