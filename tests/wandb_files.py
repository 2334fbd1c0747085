"""Reads W&B's offline files, which are LevelDB logs of W&B's protobuf messages.

wandb no longer has a reader in Python, but still has the message classes.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


@dataclass
class OfflineRun:
    id: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    exit_code: int | None = None


def read(path: Path) -> OfflineRun:
    """One .wandb file."""
    run = OfflineRun()
    for data in log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            r = record.run
            run.id, run.project, run.group = r.run_id, r.project, r.run_group
            run.job_type, run.name, run.tags = r.job_type, r.display_name, list(r.tags)
            put(run.config, r.config.update)
        elif kind == "config":
            put(run.config, record.config.update)
        elif kind == "summary":
            put(run.summary, record.summary.update)
        elif kind == "history":
            put(row := {}, record.history.item)
            run.history.append(row)
        elif kind == "metric":
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "files":
            run.files += [f.path for f in record.files.files]
        elif kind == "artifact":
            run.artifacts.append((record.artifact.type, record.artifact.name))
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifact = record.request.log_artifact.artifact
            run.artifacts.append((artifact.type, artifact.name))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which are split into parts at block boundaries every 32 KiB."""
    assert content[:4] == b":W&B", "not a W&B file"
    place, parts = 7, []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for another part's header: the block ends in zeros
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data = content[place + 7 : place + 7 + length]
        if kind == 0 or len(data) < length:  # the writer was killed here
            return
        parts.append(data)
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield b"".join(parts)
            parts = []


def put(into: dict[str, Any], items) -> None:
    for item in items:
        into["/".join(item.nested_key) or item.key] = json.loads(item.value_json)


def runs_in(folder: Path) -> list[OfflineRun]:
    return [read(path) for path in sorted(folder.rglob("*.wandb"))]
