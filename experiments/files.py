"""JSON files that other processes may read at any time."""

import json
from pathlib import Path
from typing import Any

from pmnet.replacing import replacing


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a new file and then replaces the old one with it, so that no reader sees half a file."""
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The file's content; {} if it is missing or cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
