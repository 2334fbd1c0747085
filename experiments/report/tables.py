"""Result tables: published methods, our runs below them, the difference, and baselines."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.report.benchmarks import NONE, Benchmark, Series, method, same_name
from experiments.report.collect import Job

PARAMS = "params (M)"
ABSENT = {  # scores of episodes without the class -> their columns
    "false_positive": "pixels marked",
    "confused": "other class marked",
    "marked": "images marked",
    "presence_accuracy": "presence accuracy",
    "presence_auroc": "presence AUROC",
}
ABSENT_NOTE = (
    "Marked pixels and images are errors: less is better. Presence: how well a method tells queries that show the "
    "class from those that do not. docs/absent.md defines the scores."
)


@dataclass
class Row:
    """A row of text cells.

    Attributes:
        kind: "published", "ours", "difference" or "baseline".
        best: the columns to print in bold.
    """

    cells: list[str]
    kind: str = "published"
    best: set[int] = field(default_factory=set)


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def miou(b: Benchmark) -> Table:
    """mIoU of each fold and their mean for each shot, and learnable parameters, as in the paper's tables 1 to 6."""
    pairs, columns = number_columns(b)
    rows = [published_row(name, entries, pairs) for name, entries in by_method(b.published).items()]
    table = Table(f"mIoU in %. {b.title}", ["method", *columns, PARAMS], rows, list(b.notes))
    for s in b.series:
        values = [measured(s, b, *pair, "miou") for pair in pairs]
        table.rows.append(Row([s.name, *map(spread, values), params(s.jobs[0])], "ours"))
        like = [e for e in b.published if same_name(e["method"], s.jobs[0].method) and e.get("ablation") == s.ablation]
        if like:
            printed = published_row("", like, pairs).cells[1:-1]
            gains = [gain(v, p) for v, p in zip(values, printed, strict=True)]
            table.rows.append(Row(["  against published", *gains, ""], "difference"))
        if first := under_another_protocol(s, b):
            theirs = [measured(first, b, *pair, "miou") for pair in pairs]
            gains = [gain(v, str(statistics.mean(t)) if t else NONE) for v, t in zip(values, theirs, strict=True)]
            table.rows.append(Row([f"  against {first.jobs[0].config['protocol']}", *gains, ""], "difference"))
        table.notes += partial_means(s, b, "miou")
    table.rows += [Row([*row.cells, ""], row.kind) for row in baseline_rows(b, "miou")]
    mark_best(table)
    return table


def under_another_protocol(s: Series, b: Benchmark) -> Series | None:
    """The first series that differs from this one in nothing but the protocol; None if it is the first itself."""

    def rest(each: Series) -> dict[str, Any]:
        return {k: v for k, v in each.jobs[0].config.items() if k != "protocol" and v is not None}

    first = next(each for each in b.series if rest(each) == rest(s))
    return None if first is s else first


def parts(b: Benchmark) -> list[Any]:
    """The columns of each shot: folds, their "mean", and "all" if there is a network for the whole dataset."""
    return [*b.cut, *(["mean"] if b.cut else []), *(["all"] if "all" in b.folds else [])]


def part_name(part: Any) -> str:
    return part if part == "mean" else f"fold {part}"


def number_columns(b: Benchmark) -> tuple[list[tuple[int, Any]], list[str]]:
    """(shot, fold or "mean") of each column, and its heading."""
    pairs = [(shot, part) for shot in b.shots for part in parts(b)]
    return pairs, [f"{shot}-shot {part_name(part)}" if b.cut else f"{shot}-shot" for shot, part in pairs]


def measured(s: Series, b: Benchmark, shot: int, part: Any, key: str) -> list[float]:
    """One value for each seed."""
    return mean_of(s, b, shot, key) if part == "mean" else s.values(shot, part, key)


def mean_of(s: Series, b: Benchmark, shot: int, key: str) -> list[float]:
    return s.over_seeds(shot, b.cut, key)


def gain(values: Sequence[float], printed: str) -> str:
    if not values or printed == NONE:
        return NONE
    return f"{round(statistics.mean(values) - float(printed), 1) + 0.0:+.1f}"  # + 0.0: no minus before a zero


def baseline_rows(b: Benchmark, key: str) -> list[Row]:
    pairs = number_columns(b)[0]
    return [Row([s.name, *(spread(measured(s, b, *pair, key)) for pair in pairs)], "baseline") for s in b.baselines]


def partial_means(s: Series, b: Benchmark, key: str) -> list[str]:
    """Notes on means that are not shown because folds are missing, with the mean over the folds found."""
    notes = []
    for shot in b.shots:
        have = [fold for fold in b.cut if s.values(shot, fold, key)]
        missing = ", ".join(str(fold) for fold in b.cut if fold not in have)
        if have and missing:
            part = statistics.mean(statistics.mean(s.values(shot, fold, key)) for fold in have)
            notes.append(
                f"{s.name}, {shot}-shot: no mean yet, {len(have)} of {len(b.cut)} folds (missing: {missing}); "
                f"the mean over the folds found is {part:.1f}."
            )
        elif have and not mean_of(s, b, shot, key):
            notes.append(f"{s.name}, {shot}-shot: no mean yet, because no seed has all folds.")
    return notes


def by_method(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        groups[method(entry)].append(entry)
    return groups


def published_row(name: str, entries: list[dict[str, Any]], pairs: Sequence[tuple[int, Any]]) -> Row:
    values = [printed_value(next((e for e in entries if e["shot"] == shot), {}), part) for shot, part in pairs]
    sizes = [e["params"] for e in entries if e.get("params")]
    return Row([name, *map(as_printed, values), f"{sizes[0]:g}" if sizes else NONE])


def printed_value(entry: dict[str, Any], part: Any) -> float | None:
    """The published value for a fold, for the mean over folds, or for a network for the whole dataset."""
    if part in ("mean", "all"):
        return entry.get("miou") if (entry.get("fold") != "all") == (part == "mean") else None
    return dict(enumerate(entry.get("folds", ()))).get(part)


def as_printed(value: float | None) -> str:
    """With one decimal, or two where the paper prints two."""
    if value is None:
        return NONE
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def params(job: Job) -> str:
    learnable = job.record.get("parameters", {}).get("learnable")
    return NONE if learnable is None else f"{learnable / 1e6:.2f}"


def mark_best(table: Table) -> None:
    """Marks the best published method and the best of all methods for printing in bold."""
    for column, name in enumerate(table.columns):
        if name in ("method", PARAMS):
            continue
        for kinds in (("published",), ("published", "ours")):
            rows = [r for r in table.rows if r.kind in kinds and r.cells[column] != NONE]
            best = max((number(r.cells[column]) for r in rows), default=None)
            for row in rows if len(rows) > 1 else ():
                if number(row.cells[column]) == best:
                    row.best.add(column)


def number(cell: str) -> float:
    return float(cell.split(" ± ")[0])


def fb_iou(b: Benchmark) -> Table:
    pairs, columns = number_columns(b)
    table = Table(f"FB-IoU in %. {b.title}", ["method", *columns], [])
    for s in b.series:
        table.rows.append(Row([s.name, *(spread(measured(s, b, *pair, "fb_iou")) for pair in pairs)], "ours"))
        table.notes += partial_means(s, b, "fb_iou")
    table.rows += baseline_rows(b, "fb_iou")
    mark_best(table)
    return table


def absent(b: Benchmark) -> Table | None:
    """Scores of episodes whose query does not show the class; None if no run was tested with such episodes."""
    heads = [f"{shot}-shot {name}" for shot in b.shots for name in ABSENT.values()]
    table = Table(
        f"Queries that do not show the class, means over folds and seeds in %. {b.title}", ["method", *heads], []
    )
    for s in (*b.series, *b.baselines):
        kind, cells = "ours" if s in b.series else "baseline", []
        for shot in b.shots:
            tested = {fold: absent_scores(s.runs.get((shot, fold), [])) for fold in b.folds}
            scores = [score for of_fold in tested.values() for score in of_fold]
            cells += [f"{statistics.mean(each[key] for each in scores):.1f}" if scores else NONE for key in ABSENT]
            folds = [str(fold) for fold, of_fold in tested.items() if of_fold]
            if kind == "ours" and 0 < len(folds) < len(b.folds):
                table.notes.append(f"{s.name}, {shot}-shot: over fold {', '.join(folds)} alone.")
        if set(cells) != {NONE}:
            table.rows.append(Row([s.name, *cells], kind))
    table.notes.append(ABSENT_NOTE)
    return table if table.rows else None


def absent_scores(jobs: Iterable[Job]) -> list[dict[str, float]]:
    return [job.record["test"]["absent"] for job in jobs if "absent" in job.record["test"]]


def per_class(b: Benchmark) -> Table:
    """One row for each class and fold, one column for each configuration and shot."""
    columns = [(s, shot) for s in b.series for shot in b.shots]
    heads = [f"{shot}-shot" + (f", {s.name}" if len(b.series) > 1 else "") for s, shot in columns]
    rows = [
        Row([name, str(fold), *(spread(s.of_class(shot, fold, name)) for s, shot in columns)], "ours")
        for fold in b.folds
        for name in dict.fromkeys(name for s, shot in columns for name in s.classes(shot, fold))
    ]
    return Table(f"IoU of each class in %. {b.title}", ["class", "fold", *heads], rows)


def spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
