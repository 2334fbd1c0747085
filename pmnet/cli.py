"""The command `pmnet`.

pmnet segment --support examples/ --images photos/ --out masks/
pmnet info outputs/<run>/checkpoints/best.ckpt

A command is a module in `pmnet/segment/commands/` with `HELP`, `options(parser)` and `run(arguments)`, which returns
the exit code; heavy imports stand in `run`.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pmnet.errors import PMNetError
from pmnet.version import VERSION

COMMANDS = ("segment", "compare", "export", "serve")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; an error that the user can fix is one message and exit code 1, Ctrl-C exit code 130."""
    parser = argparse.ArgumentParser("pmnet", description="Few-shot segmentation: segment by one or a few examples.")
    parser.add_argument("--version", action="version", version=f"pmnet {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    info = commands.add_parser("info", help="show what a checkpoint or a file of weights holds")
    info.add_argument("file", help="a .ckpt, .pth or .safetensors file, a run's folder, or the name of a shipped head")
    info.set_defaults(run=show)
    for name in COMMANDS:
        module = import_module(f"pmnet.segment.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.options(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        code = args.run(args)
        sys.stdout.flush()
        sys.exit(code)
    except PMNetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def described(source: str | Path) -> dict[str, Any]:
    """Facts about a file, by name. Reads tensors and plain values only.

    Args:
        source: a file of weights, a class file, a checkpoint, the folder of a run, or the name of a shipped head.

    Raises:
        SettingError: there is no such file, folder or name.
        WeightsError: the file cannot be read.
    """
    from pmnet.files import file_hash, read_file  # imports torch, which takes seconds
    from pmnet.segment.recipe import located

    path = located(source)
    content, metadata = read_file(path)
    state = content.get("state_dict", content)
    tensors = {name: value for name, value in mapping(state).items() if hasattr(value, "numel")}
    recipe = mapping(content.get("recipe")) or parsed(metadata.get("pmnet"))
    learned = {name: value for name, value in tensors.items() if not name.startswith("class.")}  # not photos
    model, needs = mapping(recipe.get("model")), mapping(content.get("backbone")) or mapping(recipe.get("needs"))
    record = mapping(content.get("record")) or mapping(recipe.get("training")) or parsed(metadata.get("trained_on"))
    trained = record.get("base_classes") or record.get("classes") or []
    epoch = content.get("epoch")
    facts = {
        "file": path,
        "sha256": file_hash(path),
        "tensors": len(learned),
        "values": f"{sum(value.numel() for value in learned.values()):,}",
        "method": model.get("_target_"),
        "options": ", ".join(f"{name}={value}" for name, value in model.items() if name != "_target_"),
        "backbone": needs and f"{needs.get('backbone')}, weights {needs.get('weights')} ({needs.get('source')})",
        "its sha256": needs.get("sha256"),
        "image size": " x ".join(map(str, recipe.get("image_size") or [])),
        "trained on": record and f"{record.get('dataset')}, {len(trained)} classes: {', '.join(map(str, trained))}",
        "epochs": epoch + 1 if isinstance(epoch, int) else record.get("epochs"),
        "licence": recipe.get("licence"),
        "classes": ", ".join(classes_of(recipe, tensors)),
        "metadata": {name: text for name, text in metadata.items() if name not in ("pmnet", "trained_on", "format")},
    }
    return {name: fact for name, fact in facts.items() if fact}


def classes_of(recipe: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """The classes of a class file, each with its number of examples."""
    found = []
    for number, each in enumerate(recipe.get("classes") or []):
        masks = tensors.get(f"class.{number}.masks", [])
        count = sum(bool((mask != 0).any()) for mask in masks)
        found.append(f"{mapping(each).get('name')} ({count} example{'s' * (count != 1)})")
    return found


def parsed(text: str | None) -> dict[str, Any]:
    """A JSON object; empty if the text is none."""
    try:
        return mapping(json.loads(text or "{}"))
    except ValueError:
        return {}


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}
