"""What a failure leaves: a message where the user can help it, and no half-written file."""

import errno
import os
from pathlib import Path

import pytest

from experiments.files import read_json, write_json
from experiments.run.failures import as_message, lost_another, write_failure
from tests.conftest import run

FLOCK = "FileSystem does not appear to support flock; use SoftFileLock instead"  # filelock's words


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_disk_without_room_is_one_message(number: int) -> None:
    message = as_message(OSError(number, os.strerror(number), "/runs/1/results.json")) or ""
    assert "/runs/1/results.json" in message
    assert os.strerror(number) in message
    assert "Free some space" in message


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 10000ms for send operation to complete",
    ],
)
def test_process_that_is_gone_is_one_message(words: str) -> None:
    assert "Another process of this job has ended or does not answer" in (as_message(RuntimeError(words)) or "")


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError(FLOCK)])
def test_disk_without_locks_is_one_message(error: Exception) -> None:
    assert "reuse=false" in (as_message(error) or "")


def test_other_errors_keep_their_traceback() -> None:
    assert as_message(RuntimeError("shape mismatch")) is None
    assert as_message(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_full_disk_hides_no_message_and_leaves_no_part(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path, text: str) -> None:
        path.touch()
        with Path("/dev/full").open("w") as file:
            file.write(text)

    write_json(tmp_path / "failure.json", {"error": "before"})
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "results.json", {})
    write_failure(tmp_path, "full")
    assert [p.name for p in tmp_path.iterdir()] == ["failure.json"]
    assert read_json(tmp_path / "failure.json") == {"error": "before"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("unable to mmap 49152 bytes from file </torch_1_2_6>: Cannot allocate memory (12)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."),
    ],
)
def test_memory_that_runs_out_is_one_message(error: Exception) -> None:
    assert "The memory of a process ran out" in (as_message(error) or "")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["${x}/a", "/proc/no"])
def test_folder_that_cannot_be_is_one_message(folder: str) -> None:
    done = run("dataset=synthetic", f"hydra.run.dir={folder}")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_all_words_of_gloo_for_a_lost_process_are_known() -> None:
    """Some of its errors do not name it."""
    assert lost_another(RuntimeError("[gloo/transport/tcp/pair.cc:144] no error"))
    assert lost_another(RuntimeError("Application timeout caused pair closure"))
    assert not lost_another(RuntimeError("The shapes do not match"))
