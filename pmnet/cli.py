"""The command `pmnet`.

pmnet segment --support examples/ --images photos/ --out masks/
pmnet info outputs/<run>/checkpoints/best.ckpt

A command is a module in `pmnet/segment/commands/` with `HELP`, `options(parser)` and `run(arguments)`, which returns
the exit code; heavy imports stand in `run`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pmnet.errors import PMNetError
from pmnet.version import VERSION

COMMANDS = ("segment", "export", "serve")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; an error that the user can fix is one message and exit code 1, Ctrl-C exit code 130."""
    parser = argparse.ArgumentParser("pmnet", description="Few-shot segmentation: segment by one or a few examples.")
    parser.add_argument("--version", action="version", version=f"pmnet {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    info = commands.add_parser("info", help="show what a checkpoint or a file of weights holds")
    info.add_argument("file", type=Path, help=".ckpt, .pth or .safetensors")
    info.set_defaults(run=show)
    for name in COMMANDS:
        module = import_module(f"pmnet.segment.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.options(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        sys.exit(args.run(args))
    except PMNetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a read-only folder, a limit of the machine
        print(f"Error: {error}. Check free space and permissions, then run the command again.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


def show(args: argparse.Namespace) -> None:
    for name, value in described(args.file).items():
        print(f"{name:<12} {value}")


def described(path: Path) -> dict[str, Any]:
    """Facts about a file, by name. Reads tensors and plain values only.

    Raises:
        WeightsError: there is no such file, or it cannot be read.
    """
    from pmnet.files import file_hash, read_file  # imports torch, which takes seconds

    content, metadata = read_file(path)
    state = content.get("state_dict", content)
    tensors = {name: value for name, value in state.items() if hasattr(value, "numel")}
    backbone, record = content.get("backbone"), content.get("record") or {}
    facts = {
        "file": path,
        "sha256": file_hash(path),
        "tensors": len(tensors),
        "values": f"{sum(value.numel() for value in tensors.values()):,}",
        "metadata": metadata,
    }
    if isinstance(backbone, dict) and "sha256" in backbone:
        facts["backbone"] = f"{backbone['backbone']}, weights {backbone['weights']} ({backbone['source']})"
    if record:
        facts["trained on"] = f"{record['dataset']}, {len(record['base_classes'])} classes"
        facts["classes"] = ", ".join(record["base_classes"])
        facts["epochs"] = content["epoch"] + 1
    return {name: fact for name, fact in facts.items() if fact}
