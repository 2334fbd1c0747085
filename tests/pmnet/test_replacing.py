from pathlib import Path

import pytest

from pmnet.replacing import replacing


def test_failed_block_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fill(part: Path) -> None:
        part.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), replacing(path) as part:
        fill(part)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_longest_name_and_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("a" * 255)
    with replacing(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
