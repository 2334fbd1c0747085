"""The tables: published methods, ours below them, and the difference; one plain form, rendered in four ways."""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.markup import escape
from rich.table import Table as RichTable
from tabulate import tabulate

from experiments.report.collect import Job, all_equal

PUBLISHED = Path(__file__).parents[1] / "published.yaml"
NONE = "-"
ABLATIONS = {"no_b3dconvs": "w/o B3DConvs", "no_background": "w/o Background"}


@dataclass
class Row:
    """Cells of text; `best` are the columns to print bold. Kinds: published, ours, difference, baseline."""

    cells: list[str]
    kind: str = "published"
    best: set[int] = field(default_factory=set)


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass
class Series:
    """A row of ours: one configuration over shots, folds and seeds; `runs[shot, fold]` has a job a seed."""

    name: str
    runs: dict[tuple[int, Any], list[Job]]

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.runs.values() for job in jobs]

    def values(self, shot: int, fold: Any, key: str) -> list[float]:
        return [job.record["test"][key] for job in self.runs.get((shot, fold), [])]

    def over_seeds(self, shot: int, folds: Sequence[Any], key: str) -> list[float]:
        """The mean over the folds of each seed that has them all, or none."""
        by_seed: dict[Any, dict[Any, float]] = defaultdict(dict)
        for fold in folds:
            for job in self.runs.get((shot, fold), []):
                by_seed[job.setting.get("seed")][fold] = job.record["test"][key]
        return [statistics.mean(v.values()) for v in by_seed.values() if len(v) == len(folds)]

    @property
    def ablation(self) -> str | None:
        config = self.jobs[0].config
        if config.get("model.b3dconvs") is False:
            return "no_b3dconvs"
        return "no_background" if config.get("model.support_background") is False else None


@dataclass
class Benchmark:
    """One setting of the paper's tables: where trained and tested, with which backbone."""

    task: str
    dataset: str
    target: str
    backbone: str
    series: list[Series]
    published: list[dict[str, Any]]
    shots: list[int]
    folds: list[Any]
    notes: list[str]

    @property
    def title(self) -> str:
        pair = self.dataset if self.task == "cross_category" else f"{self.dataset} → {self.target}"
        return f"{self.task.replace('_', '-').capitalize()}: {pair}, {self.backbone}"


@cache
def published() -> list[dict[str, Any]]:
    """The entries of published.yaml that are of one benchmark; a method that stands in two tables comes once."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    named = {(*(e[k] for k in ("task", "dataset", "target", "backbone", "shot")), method(e)): e
             for e in reversed(entries) if "task" in e}  # fmt: skip
    return list(reversed(named.values()))


def method(entry: dict[str, Any]) -> str:
    venue = f" ({entry['venue']})" if entry.get("venue") else ""
    ablation = f" {ABLATIONS[entry['ablation']]}" if entry.get("ablation") else ""
    return f"{entry['method']}{ablation}{venue}"


def benchmarks(jobs: Sequence[Job]) -> list[Benchmark]:
    """Finished runs by setting, in the order in which they were found."""
    groups: dict[tuple[str, str, str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.benchmark].append(job)
    result = []
    for (task, dataset, target, backbone), members in groups.items():
        notes: list[str] = []
        series = rows_of(members, notes)
        shots = sorted({shot for s in series for shot, _ in s.runs})
        like = {"task": task, "dataset": dataset, "target": target, "backbone": backbone}
        printed = [e for e in published() if like.items() <= e.items() and e["shot"] in shots]
        folds = folds_of(members, printed)
        result.append(Benchmark(task, dataset, target, backbone, series, printed, shots, folds, notes))
    return result


def folds_of(jobs: Sequence[Job], printed: Sequence[dict[str, Any]]) -> list[Any]:
    """Every fold that a whole row has: those that the dataset, or the published table, is cut into."""
    found = {job.setting.get("fold", 0) for job in jobs}
    if found == {"all"}:
        return ["all"]
    known = {n for job in jobs for n in range(job.setting.get("folds", 0))}
    known |= {n for e in printed for n in range(len(e.get("folds", ())))}
    return sorted((found | known) - {"all"}) + (["all"] if "all" in found else [])


def rows_of(jobs: Sequence[Job], notes: list[str]) -> list[Series]:
    """A series for each configuration, named by what sets it apart from the others."""
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[str(sorted((k, str(v)) for k, v in job.config.items()))].append(job)
    configs = [g[0].config for g in groups.values()]
    names = sorted({k for c in configs for k in c})
    differ = [k for k in names if not all_equal(c.get(k) for c in configs)]
    telling = [k for k in differ if k not in ("model", "weights")]
    series = []
    for members in groups.values():
        config = members[0].config
        runs: dict[tuple[int, Any], list[Job]] = defaultdict(list)
        for job in members:
            same = runs[job.setting.get("shot", 1), job.setting.get("fold", 0)]
            twin = next((j for j in same if j.setting.get("seed") == job.setting.get("seed")), None)
            if twin:
                newer, older = sorted((twin, job), key=made, reverse=True)
                same.remove(twin)
                notes.append(f"{newer.name} counts, and not {older.name}: the same setting and seed, made later.")
                job = newer
            same.append(job)
        shown = [f"weights {config['weights']}"] if "weights" in differ else []
        shown += [f"{k}={config.get(k, NONE)}" for k in telling]
        name = {"pmnet": "PMNet", "pmnet_release": "PMNet (release)", "dam": "DAM"}.get(
            config["model"], config["model"]
        )
        series.append(Series(", ".join([f"{name}, ours", *shown]), dict(runs)))
        seeds = {len(v) for v in runs.values()}
        if seeds != {1}:
            notes.append(f"{series[-1].name}: mean ± sample standard deviation over {max(seeds)} seeds where shown.")
        for what, values in {
            "lists of test episodes": (len({episodes(j, "episode_list_sha256") for j in v}) for v in runs.values()),
            "numbers of test episodes": [len({episodes(j, "test_episodes") for v in runs.values() for j in v})],
            "splits": [len({episodes(j, "splits") for v in runs.values() for j in v})],
        }.items():
            if any(n > 1 for n in values):
                notes.append(f"{series[-1].name}: its runs have different {what}; they do not compare.")
        seen = sorted(
            {c for v in runs.values() for j in v for c in j.record.get("tested_classes_seen_in_training", [])}
        )
        if seen:
            notes.append(f"{series[-1].name}: tested classes that were trained on: {', '.join(seen)}.")
    return series


def made(job: Job) -> float:
    return (job.folder / "results.json").stat().st_mtime if job.folder else 0.0


def episodes(job: Job, key: str) -> Any:
    return job.record.get("episodes", {}).get(key)


def spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


# Tables


def miou(b: Benchmark) -> Table:
    """As tables 1 to 6 of the paper: folds and mean of each shot, learnable parameters."""
    numbers, columns = number_columns(b)
    rows = [published_row(b, name, entries, numbers) for name, entries in by_method(b.published).items()]
    table = Table(f"mIoU in %. {b.title}", ["method", *columns, "params (M)"], rows, list(b.notes))
    for s in b.series:
        values = [
            mean_of(s, b, shot, "miou") if fold == "mean" else s.values(shot, fold, "miou") for shot, fold in numbers
        ]
        table.rows.append(Row([s.name, *map(spread, values), params(s.jobs[0])], "ours"))
        like = [e for e in b.published if e["method"] == "PMNet" and e.get("ablation") == s.ablation]
        if like and s.jobs[0].setting.get("model", "pmnet") != "dam":
            printed = published_row(b, "", like, numbers).cells[1:-1]
            gains = [
                f"{statistics.mean(v) - float(p):+.1f}" if v and p != NONE else NONE
                for v, p in zip(values, printed, strict=True)
            ]
            table.rows.append(Row(["  against published", *gains, ""], "difference"))
        table.notes += partial_means(s, b, "miou")
    base = [j.record.get("baselines", {}).get("all_foreground", {}).get("miou") for s in b.series for j in s.jobs]
    if b.series and all(v is not None for v in base):
        s = b.series[0]
        values = [baseline(s, b, shot, fold) for shot, fold in numbers]
        table.rows.append(Row(["everything marked as foreground", *map(spread, values), ""], "baseline"))
    mark_best(table)
    return table


def number_columns(b: Benchmark) -> tuple[list[tuple[int, Any]], list[str]]:
    """(shot, fold or "mean") of each column, and its head."""
    if b.folds == ["all"]:
        return [(shot, "all") for shot in b.shots], [f"{shot}-shot" for shot in b.shots]
    pairs = [(shot, fold) for shot in b.shots for fold in [*b.folds, "mean"]]
    return pairs, [f"{shot}-shot {fold if isinstance(fold, str) else f'fold {fold}'}" for shot, fold in pairs]


def mean_of(s: Series, b: Benchmark, shot: int, key: str) -> list[float]:
    return s.over_seeds(shot, [f for f in b.folds if f != "all"], key)


def baseline(s: Series, b: Benchmark, shot: int, fold: Any) -> list[float]:
    folds = [f for f in b.folds if f != "all"] if fold == "mean" else [fold]
    each = [[j.record["baselines"]["all_foreground"]["miou"] for j in s.runs.get((shot, f), [])][:1] for f in folds]
    return [statistics.mean(v[0] for v in each)] if all(each) else []


def partial_means(s: Series, b: Benchmark, key: str) -> list[str]:
    """What there is of a mean whose folds are not all there."""
    whole, notes = [f for f in b.folds if f != "all"], []
    for shot in b.shots:
        have = [f for f in whole if s.values(shot, f, key)]
        if have and len(have) < len(whole):
            part = statistics.mean(statistics.mean(s.values(shot, f, key)) for f in have)
            missing = ", ".join(str(f) for f in whole if f not in have)
            notes.append(
                f"{s.name}, {shot}-shot: no mean yet, {len(have)} of {len(whole)} folds (without {missing}); "
                f"over those it is {part:.1f}."
            )
    return notes


def by_method(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        groups[method(entry)].append(entry)
    return groups


def published_row(b: Benchmark, name: str, entries: list[dict[str, Any]], numbers: list[tuple[int, Any]]) -> Row:
    cells = []
    for shot, fold in numbers:
        entry = next((e for e in entries if e["shot"] == shot), {})
        value = entry.get("miou") if fold in ("mean", "all") else dict(enumerate(entry.get("folds", ()))).get(fold)
        whole = fold != "mean" or "folds" in entry
        cells.append(
            as_printed(value) if value is not None and whole and (fold != "all" or "folds" not in entry) else NONE
        )
    sizes = [e["params"] for e in entries if e.get("params")]
    return Row([name, *cells, f"{sizes[0]:g}" if sizes else NONE])


def as_printed(value: float) -> str:
    """One decimal as in the paper, two where it has two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def params(job: Job) -> str:
    learnable = job.record.get("parameters", {}).get("learnable")
    return NONE if learnable is None else f"{learnable / 1e6:.2f}"


def mark_best(table: Table) -> None:
    """Bold: the best of the published and the best of all methods."""
    for column in range(1, len(table.columns) - 1):
        for kinds in (("published",), ("published", "ours")):
            rows = [r for r in table.rows if r.kind in kinds and r.cells[column] != NONE]
            best = max((number(r.cells[column]) for r in rows), default=None)
            for row in rows:
                if number(row.cells[column]) == best:
                    row.best.add(column)


def number(cell: str) -> float:
    return float(cell.split(" ± ")[0])


def fb_iou(b: Benchmark) -> Table:
    numbers, columns = number_columns(b)
    table = Table(f"FB-IoU in %. {b.title}", ["method", *columns], [])
    for s in b.series:
        values = [
            mean_of(s, b, shot, "fb_iou") if fold == "mean" else s.values(shot, fold, "fb_iou")
            for shot, fold in numbers
        ]
        table.rows.append(Row([s.name, *map(spread, values)], "ours"))
        table.notes += partial_means(s, b, "fb_iou")
    return table


def per_class(b: Benchmark) -> Table:
    """A line a class and fold, a column a configuration and shot."""
    columns = [(s, shot) for s in b.series for shot in b.shots]
    lines: dict[tuple[Any, str], list[str]] = {}
    for fold in b.folds:
        names = {
            c: None
            for s in b.series
            for shot in b.shots
            for j in s.runs.get((shot, fold), [])
            for c in j.record["test"]["iou_per_class"]
        }
        for name in names:
            values = [
                [
                    j.record["test"]["iou_per_class"][name]
                    for j in s.runs.get((shot, fold), [])
                    if name in j.record["test"]["iou_per_class"]
                ]
                for s, shot in columns
            ]
            lines[fold, name] = list(map(spread, values))
    heads = [f"{shot}-shot" + (f", {s.name}" if len(b.series) > 1 else "") for s, shot in columns]
    rows = [Row([name, str(fold), *cells], "ours") for (fold, name), cells in lines.items()]
    return Table(f"IoU of each class in %. {b.title}", ["class", "fold", *heads], rows)


# Renderings


def rich_table(table: Table) -> RichTable:
    result = RichTable(title=escape(table.title), title_justify="left")
    for i, column in enumerate(table.columns):
        result.add_column(escape(column), justify="right" if i else "left", overflow="fold")
    last = None
    for row in table.rows:
        if last == "published" and row.kind == "ours":
            result.add_section()
        style = {"difference": "dim", "baseline": "dim"}.get(row.kind)
        cells = [f"[bold]{escape(c)}[/]" if i in row.best else escape(c) for i, c in enumerate(row.cells)]
        result.add_row(*cells, style=style)
        last = row.kind
    return result


def cells_of(table: Table, text: Callable[[str], str], bold: Callable[[str], str]) -> list[list[str]]:
    return [[bold(text(c)) if i in r.best else text(c) for i, c in enumerate(r.cells)] for r in table.rows]


def markdown(table: Table) -> str:
    def text(cell: str) -> str:
        for character in "\\|*_`[]<>#~":
            cell = cell.replace(character, f"\\{character}")
        return cell.strip()

    align = ["left", *["right"] * (len(table.columns) - 1)]
    body = tabulate(
        cells_of(table, text, lambda c: f"**{c}**"), list(map(text, table.columns)), "github",
        colalign=align, disable_numparse=True,
    )  # fmt: skip
    notes = "".join(f"\n- {text(note)}" for note in table.notes)
    return f"### {text(table.title)}\n\n{body}\n{notes}\n"


def latex(table: Table) -> str:
    """A `table` with booktabs' rules: \\usepackage{booktabs}."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"\\": r"\textbackslash{}", "±": r"$\pm$", "→": r"$\to$", "<": "$<$", ">": "$>$", "|": "$|$"}

    def text(cell: str) -> str:
        return "".join(special.get(c, c) for c in cell.strip())

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line(cells) for cells in cells_of(table, text, lambda c: rf"\textbf{{{c}}}")]
    first_ours = next((i for i, r in enumerate(table.rows) if r.kind != "published"), 0)
    if first_ours:
        rows.insert(first_ours, r"\midrule")
    notes = [rf"\\ \footnotesize {text(note)}" for note in table.notes]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{text(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule", line(map(text, table.columns)), r"\midrule",
        *rows, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}", "",
    ])  # fmt: skip


CSV = (
    "task dataset target backbone weights model row fold shot seed miou fb_iou episodes trained_by commit folder"
).split()


def tidy_csv(found: Sequence[Benchmark]) -> str:
    """A line a finished run, numbers as measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV, lineterminator="\n")
    writer.writeheader()
    for b in found:
        for s in b.series:
            for job in s.jobs:
                r, setting = job.record, job.setting
                writer.writerow(
                    {"task": b.task, "dataset": b.dataset, "target": b.target, "backbone": b.backbone, "row": s.name}
                    | {k: setting.get(k) for k in ("model", "fold", "shot", "seed")}
                    | {"weights": r.get("backbone", {}).get("weights"), "miou": r["test"]["miou"]}
                    | {"fb_iou": r["test"]["fb_iou"], "episodes": episodes(job, "test_episodes")}
                    | {"trained_by": job.trained_by, "commit": r.get("commit"), "folder": job.folder}
                )
    return text.getvalue()
