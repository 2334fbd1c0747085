"""Breaks real runs at random moments and writes what came of it to docs/reliability.md.

python -m tests.faults --tries 300 --seed 1
"""

import argparse
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.conftest import ROOT
from tests.faults.check import Outcome, attempt
from tests.faults.faults import FAULTS, OTHER, SIGNAL, Fault
from tests.faults.runs import Lab

PAGE = """# Reliability

`make faults` breaks real runs. It injects one fault at a random moment of a random phase, then repeats the command
without the fault. After each fault, one of two things must hold:

- The run succeeds with the numbers of an unbroken run: the scores in `results.json` and the weights in `last.ckpt`, bit
  for bit.
- The run ends with one message and an exit code other than 0, within {signal:.0f} s of a signal or {other:.0f} s
  of another fault. The repeated command then gives the numbers of the unbroken run.

No process may be left, and no file under its final name may be incomplete. A process that a signal ends before the run
has started may end without a message.

{tries} injections on {date}, seed {seed}{skipped}. "Ended in" is the time from the fault to the end of the run, median
and longest.

{table}
"""


def plan(tries: int, seed: int, only: str) -> list[tuple[Fault, int]]:
    """Faults in random order, each as often as the others, and the seed of each injection.

    Args:
        only: a pattern; of a fault, the places remain whose "<name> in <scene>/<phase>" it matches.
    """
    source, kinds = random.Random(seed), []
    for fault in FAULTS:
        places = tuple(place for place in fault.places if re.search(only, f"{fault.name} in {'/'.join(place)}"))
        kinds += [replace(fault, places=places)] if places else []
    chosen = [fault for _ in range(-(-tries // len(kinds))) for fault in source.sample(kinds, len(kinds))][:tries]
    return [(fault, source.randrange(10**9)) for fault in chosen]


def in_thread(fault: Fault, seed: int, lab: Lab) -> Outcome:
    """In a thread of its own, with which its mounts end."""
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(attempt(fault, seed, lab)))
    thread.start()
    thread.join()
    if not outcomes:
        raise RuntimeError(f"the harness itself failed: {fault.name}, seed {seed}")
    return outcomes[0]


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    found = []
    for fault in FAULTS:
        mine = [o for o in outcomes if o.fault.name == fault.name and not o.skipped]
        if not mine:
            continue
        seconds = [o.seconds for o in mine]
        wrong = sorted(
            {f"{scene}/{phase}: {text}" for o in mine for (scene, phase), text in zip([o.place], o.wrong, strict=False)}
        )
        places = ", ".join(sorted({"/".join(o.place) for o in mine}))
        ended = f"{statistics.median(seconds):.1f} / {max(seconds):.1f} s"
        equal = f"{sum(o.equal for o in mine)} of {len(mine)}"
        found.append([fault.name, places, str(len(mine)), ended, equal, "; ".join(wrong) or "nothing"])
    return found


COLUMNS = ["fault", "phase", "tries", "ended in", "numbers equal", "left behind or amiss"]


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--tries", type=int, default=300, help="number of injections (default: 300)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats a series")
    parser.add_argument("--only", default="", help="only faults whose '<name> in <scene>/<phase>' matches this pattern")
    parser.add_argument("--again", type=int, help="with --only: repeats the one injection with this seed")
    parser.add_argument("--jobs", type=int, default=1, help="injections at a time (default: 1)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md", help="the file to write")
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the runs too would ignore it
    console, outcomes = Console(soft_wrap=True, width=300), list[Outcome]()
    planned = plan(args.tries, args.seed, args.only)
    if args.again is not None:
        planned = [(planned[0][0], args.again)]
    lab = Lab(Path(tempfile.mkdtemp(prefix="faults-")))
    before = args.page.read_text() if args.page.exists() else ""
    rest = before[before.index("\n## Bad input") :] if "\n## Bad input" in before else ""
    console.print(f"Seed {args.seed}, in {lab.folder}")
    with lab.daemons, ThreadPoolExecutor(args.jobs) as pool:
        for number, outcome in enumerate(pool.map(lambda one: in_thread(*one, lab), planned), start=1):
            outcomes.append(outcome)
            console.print(escape(f"{number:3} {outcome}"), style="red" if outcome.wrong else "", highlight=False)
            args.page.write_text(page(outcomes, args.seed) + rest)
    table = Table(*COLUMNS, title=f"{len(outcomes)} injections")
    for row in rows(outcomes):
        table.add_row(*map(escape, row))
    Console().print(table)
    sys.exit(any(outcome.wrong for outcome in outcomes))


def page(outcomes: list[Outcome], seed: int) -> str:
    cells = [COLUMNS, ["---"] * len(COLUMNS)]
    cells += [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows(outcomes)]
    skipped = sum(bool(o.skipped) for o in outcomes)
    return PAGE.format(
        signal=SIGNAL,
        other=OTHER,
        tries=len(outcomes) - skipped,
        date=datetime.now(UTC).date(),
        seed=seed,
        skipped=f"; {skipped} more could not be injected on this machine" if skipped else "",
        table="\n".join(f"| {' | '.join(row)} |" for row in cells),
    )


if __name__ == "__main__":
    main()
