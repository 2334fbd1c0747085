"""Reports on runs and sweeps, at any time: tables beside the published ones, figures, report.html."""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from experiments.errors import UserError
from experiments.report.collect import Found, collect, from_wandb
from experiments.report.page import state_lines, write
from experiments.report.tables import Benchmark, fb_iou, miou, rich_table


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="of runs or sweeps, or above them")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT/GROUP", help="the runs of a W&B group instead")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the folder)")
    args = parser.parse_args()
    if bool(args.folders) == bool(args.wandb):
        parser.error("give folders, or --wandb entity/project/group")
    out = args.out or (args.folders[0] / "report" if len(args.folders) == 1 else Path("report"))
    try:
        with tempfile.TemporaryDirectory() as fetched:
            found = from_wandb(args.wandb, Path(fetched)) if args.wandb else collect(args.folders)
            show(found, write(found, out), out)
    except (UserError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


def show(found: Found, benchmarks: list[Benchmark], out: Path) -> None:
    """Prints the tables, what is missing, and where the rest is."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # of a log, which need not fit a window
    for b in benchmarks:
        for table in (miou(b), fb_iou(b)):
            console.print(rich_table(table))
            for note in table.notes:
                console.print(f"  {escape(note)}", highlight=False)
    first, *rest = state_lines(found)
    console.print(first, highlight=False)
    for line in rest:
        console.print(f"  [yellow]{escape(line)}[/]", highlight=False, soft_wrap=True)
    console.print(f"Report    {escape(str(out / 'report.html'))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
