"""Tables as text: for terminals, in Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import tabulate

from experiments.report.benchmarks import Benchmark, episodes
from experiments.report.tables import Table

KEYS = ("miou", "fb_iou")
FIRST = 22  # minimum width of the first column in a terminal
LOG_WIDTH = 200  # columns when the output is not a terminal


def wide_console() -> Console:
    """Standard output; wide if it is a file or a pipe, whose width nobody knows."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def rich_tables(table: Table, width: int) -> list[RichTable]:
    """The table; if it is too wide, several tables with some of its columns each, so that no number is wrapped."""
    wide = [max(len(line) for c in cells for line in c.split("\n")) + 3 for cells in zip(*texts_of(table), strict=True)]
    groups: list[list[int]] = [[]]
    for i in range(1, len(wide)):
        if groups[-1] and FIRST + 4 + sum(wide[j] for j in groups[-1]) + wide[i] > width:
            groups.append([])
        groups[-1].append(i)
    return [rich_table(table, [0, *group]) for group in groups]


def texts_of(table: Table) -> list[list[str]]:
    """Headings, on two lines each, and cells."""
    return [[c.replace("-shot ", "-shot\n") for c in table.columns], *(row.cells for row in table.rows)]


def rich_table(table: Table, columns: Sequence[int]) -> RichTable:
    result, heads = RichTable(), texts_of(table)[0]
    for i in columns:
        result.add_column(
            Text(heads[i]), justify="right" if i else "left", no_wrap=bool(i), overflow="fold",
            min_width=None if i else FIRST,
        )  # fmt: skip
    for row, after in zip(table.rows, [*table.rows[1:], None], strict=True):
        cells = [Text(row.cells[i], "bold" if i in row.best else "") for i in columns]
        last = row.kind == "published" and after is not None and after.kind != "published"
        result.add_row(*cells, style="dim" if row.kind in ("difference", "baseline") else "", end_section=last)
    return result


def cells_of(table: Table, text: Callable[[str], str], bold: Callable[[str], str]) -> list[list[str]]:
    return [[bold(text(c)) if i in r.best else text(c) for i, c in enumerate(r.cells)] for r in table.rows]


def plain(text: str) -> str:
    """One line of Markdown in which nothing is markup."""
    return re.sub(r"([\\|*_`\[\]<>#~&])", r"\\\1", " ".join(text.split()))


def markdown(table: Table) -> str:
    align = ["left", *["right"] * (len(table.columns) - 1)]
    body = tabulate(
        cells_of(table, plain, lambda c: f"**{c}**"), list(map(plain, table.columns)), "github",
        colalign=align, disable_numparse=True,
    )  # fmt: skip
    notes = "".join(f"\n- {plain(note)}" for note in table.notes)
    return f"### {plain(table.title)}\n\n{body}\n{notes}\n"


SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {c: f"${c}$" for c in "<>|"} | {c: f"{{{c}}}" for c in "[]*"}
SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"±": r"$\pm$", "→": r"$\to$"}


def tex(text: str) -> str:
    """LaTeX. Brackets and asterisks are put in braces; otherwise `\\\\` before them would take them as an argument."""
    if re.fullmatch(r"[+-][0-9.]+", text):
        return f"${text}$"
    return "".join(SPECIAL.get(c, c) for c in " ".join(text.split()))


def latex(table: Table) -> str:
    """A `table` environment that needs \\usepackage{booktabs}."""

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line(cells) for cells in cells_of(table, tex, lambda c: rf"\textbf{{{c}}}")]
    first_ours = next((i for i, r in enumerate(table.rows) if r.kind != "published"), 0)
    if first_ours:
        rows.insert(first_ours, r"\midrule")
    notes = [rf"\par {{\footnotesize {tex(note)}}}" for note in table.notes]
    return "\n".join([
        r"\begin{table}", r"\centering \small \setlength{\tabcolsep}{3pt}", rf"\caption{{{tex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule", line(map(tex, table.columns)), r"\midrule",
        *rows, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}", "",
    ])  # fmt: skip


def as_csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *(row.cells for row in table.rows)])
    return text.getvalue()


CSV = (
    "task dataset target backbone weights model method row fold shot seed miou fb_iou episodes trained_by commit folder"
).split()


def tidy_csv(found: Sequence[Benchmark]) -> str:
    """One line for each finished run, unrounded; its baselines are in columns `baselines/<name>/miou` and `/fb_iou`."""
    jobs = [job for b in found for s in b.series for job in s.jobs]
    baselines = dict.fromkeys(name for job in jobs for name in job.record.get("baselines", {}))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*CSV, *(f"baselines/{n}/{k}" for n in baselines for k in KEYS)], lineterminator="\n")
    writer.writeheader()
    for b in found:
        for s in b.series:
            for job in s.jobs:
                r, place = job.record, job.url or job.folder
                line: dict[str, Any] = {
                    "task": b.task,
                    "dataset": b.dataset,
                    "target": b.target,
                    "backbone": b.backbone,
                    "method": job.method,
                    "row": s.name,
                }
                line |= {"weights": r.get("backbone", {}).get("weights"), "commit": r.get("commit"), "folder": place}
                line |= {"trained_by": None if job.training_free else r.get("training", {}).get("run") or place}
                line |= {key: job.setting.get(key) for key in ("model", "fold", "shot", "seed")}
                line |= {key: r["test"][key] for key in KEYS}
                line |= {f"baselines/{n}/{k}": v[k] for n, v in r.get("baselines", {}).items() for k in KEYS}
                writer.writerow(line | {"episodes": episodes(job, "test_episodes")})
    return text.getvalue()
