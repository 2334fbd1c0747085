"""Prepares a benchmark folder from its published files.

python -m datamodules.prepare pascal --source VOCtrainval_11-May-2012.tar benchmark.tgz --root data
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from datamodules.benchmarks.base import Benchmark
from datamodules.errors import DatasetError
from datamodules.prepare.ready import check, prepare
from datamodules.registry import all_datasets
from pmnet.errors import ImageError

KINDS = {name: kind for name, kind in all_datasets().items() if issubclass(kind, Benchmark) and kind is not Benchmark}


def arguments() -> argparse.Namespace:
    wanted = "\n".join(f"  {name:11} {kind.obtain}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(
        "python -m datamodules.prepare",
        description="Prepares the folder ROOT/<name> with a manifest from a benchmark's published files. Downloads "
        "nothing without --download. To resume an interrupted preparation, run the same command again.",
        epilog=f"what to download:\n{wanted}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=KINDS, metavar="name", help=", ".join(KINDS))
    parser.add_argument("--source", nargs="+", type=Path, default=[], help="the downloaded archives or folders")
    parser.add_argument("--root", type=Path, default=Path("data"), help="parent of the prepared folder (default: data)")
    parser.add_argument("--splits", type=Path, help="folder with the published lists, if you have them")
    parser.add_argument("--download", action="store_true", help="download the lists, and the files that need no login")
    parser.add_argument("--check", action="store_true", help="only verify every file of a prepared folder")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    kind, console = KINDS[args.name], Console(soft_wrap=True)
    ready = args.root / kind.name
    try:
        if args.check:
            manifest = check(kind, ready)
        else:
            manifest = prepare(kind, args.source, args.root, args.splits, args.download)
    except (DatasetError, ImageError, OSError) as error:  # OSError: the disk is full or read-only
        again = (
            ""
            if isinstance(error, (DatasetError, ImageError))
            else ". Check free space and permissions, then run the command again."
        )
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error) + again)}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
    lines = [("ready", f"{ready.absolute()}: {manifest['counts']['pairs']:,} images with masks")]
    lines += [("rule", rule) for rule in manifest["rules"]] + [("lists", manifest["lists"]["origin"])]
    for name, text in lines:
        console.print(f"[bold]{name:6}[/] {escape(text)}", highlight=False)
    if kind.published and "; the published" not in manifest["lists"]["origin"]:
        console.print(
            "[bold yellow]Results on these lists are not comparable with published ones.[/] To use the published "
            "lists, move the prepared folder away, then run again with --download or --splits FOLDER."
        )


if __name__ == "__main__":
    main()
