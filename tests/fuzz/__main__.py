"""Bad input by the thousand: feeds damaged files and settings to everything that reads them.

python -m tests.fuzz --inputs 10000 --seed 1
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.attempt import bad_input, outcomes
from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="number of inputs to all readers together")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="default: another one each time")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this reader; may be repeated")
    parser.add_argument("--file", type=Path, help="feed this file to the reader --target, once")
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz"), help="where to keep inputs that fail")
    args = parser.parse_args()
    console, names = Console(soft_wrap=True), args.target or list(TARGETS)
    if args.file:
        for name in names:
            for _, outcome in outcomes(name, [(0, args.file.read_bytes())]):
                console.print(f"{name}: {outcome.kind} {outcome.detail}", markup=False, highlight=False)
        return
    table = Table("target", title=f"{args.inputs:,} inputs, seed {args.seed}")
    for column in ("inputs", "read", "refused", "failures"):
        table.add_column(column, justify="right")
    failures: dict[str, list[str]] = defaultdict(list)
    whole, start, totals = sum(TARGETS[name].share for name in names), time.monotonic(), Counter[str]()
    for name in names:
        counts = Counter[str]()
        inputs = [(n, args.seed) for n in range(round(args.inputs * TARGETS[name].share / whole))]
        for number, outcome in outcomes(name, inputs):
            counts[outcome.kind] += 1
            if outcome.kind == "failed":
                what = f"{name}: {': '.join(outcome.detail.split(': ')[:2])}"
                failures[what].append(kept(args.out, name, args.seed, number))
        table.add_row(name, *(f"{n:,}" for n in (counts.total(), *(counts[k] for k in ("read", "refused", "failed")))))
        totals += counts
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in (totals.total(), *(totals[k] for k in ("read", "refused", "failed")))))
    console.print(table)
    for what, commands in failures.items():
        console.print(f"{len(commands)} x {what}\n    {commands[0]}", markup=False, highlight=False)
    console.print(f"{time.monotonic() - start:,.0f} s")
    sys.exit(bool(failures))


def kept(folder: Path, name: str, seed: int, number: int) -> str:
    """Writes the input to a file; returns the command that reproduces the failure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}-{number}"
    path.write_bytes(bad_input(name, seed, number))
    return f"python -m tests.fuzz --target '{name}' --file {path}"


if __name__ == "__main__":
    main()
