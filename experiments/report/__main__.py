"""Reports on finished or running sweeps: tables with published numbers, figures, report.html."""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from experiments.errors import UserError
from experiments.report.benchmarks import Benchmark
from experiments.report.collect import Found, collect, from_wandb
from experiments.report.page import state_lines, write
from experiments.report.renderings import rich_tables, wide_console
from experiments.report.tables import absent, fb_iou, miou


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m experiments.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs or sweeps; subfolders are searched")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT/GROUP", nargs="+", help="fetch runs of W&B groups instead")
    parser.add_argument("--out", type=Path, help="folder to write to (default: report/ in the given folder)")
    args = parser.parse_args(arguments)
    if bool(args.folders) == bool(args.wandb):
        parser.error("give either folders or --wandb entity/project/group")
    out = args.out or (args.folders[0] / "report" if len(args.folders) == 1 else Path("report"))
    try:
        with tempfile.TemporaryDirectory() as fetched:
            found = from_wandb(args.wandb, Path(fetched)) if args.wandb else collect(args.folders)
            show(found, write(found, out), out)
    except (UserError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("Error:", "bold red"), f" {error}"))
        sys.exit(1)


def show(found: Found, benchmarks: list[Benchmark], out: Path) -> None:
    """Prints the tables, the runs that are missing, and the path of the report."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some encodings lack arrows
    console = wide_console()
    for table in filter(None, (make(b) for b in benchmarks for make in (miou, fb_iou, absent))):
        console.print(Text(table.title, "bold"), soft_wrap=True)
        for part in rich_tables(table, console.width):
            console.print(part)
        for note in table.notes:
            console.print(Text(f"  {note}"))
    first, *rest = state_lines(found)
    console.print(first)
    for line in rest:
        console.print(Text(f"  {line}", "yellow"), soft_wrap=True)
    console.print(Text(f"Report    {out / 'report.html'}"), soft_wrap=True)


if __name__ == "__main__":
    main()
