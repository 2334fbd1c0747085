"""Small JSON files, which others read while they are written."""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes beside the old file and then takes its place."""
    part = path.with_suffix(f".{uuid4().hex}.part")  # processes of one job may write the same file at once
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """The file's content; nothing where there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
