"""The tables: published methods, ours below them, and the difference; one plain form, rendered in four ways."""

import csv
import io
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import tabulate

from experiments.report.collect import Job, all_equal

PUBLISHED = Path(__file__).parents[1] / "published.yaml"
NONE, PARAMS = "-", "params (M)"
FIRST = 22  # least width of the first column in a terminal
MODELS = {"pmnet": "PMNet", "pmnet_release": "PMNet (release)", "dam": "DAM"}
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

    def of_class(self, shot: int, fold: Any, name: str) -> list[float]:
        tested = [job.record["test"]["iou_per_class"] for job in self.runs.get((shot, fold), [])]
        return [ious[name] for ious in tested if name in ious]

    def classes(self, shot: int, fold: Any) -> list[str]:
        jobs = self.runs.get((shot, fold), [])
        return list(dict.fromkeys(name for job in jobs for name in job.record["test"]["iou_per_class"]))

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
    def cut(self) -> list[Any]:
        """The folds that a mean is over; none where one network learned, and is tested on, everything."""
        return [fold for fold in self.folds if fold != "all"]

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
        if len(folds) > 1 and not any("folds" in known for known in [*printed, *(job.setting for job in members)]):
            notes.append("How many folds there are is not recorded; the means are over those found.")
        result.append(Benchmark(task, dataset, target, backbone, series, printed, shots, folds, notes))
        notes += [note for s in series for shot in shots for note in seeds_left_out(s, shot, result[-1].cut)]
    return result


def seeds_left_out(s: Series, shot: int, folds: Sequence[Any]) -> list[str]:
    """Which seeds a mean is not over, where it is over others."""
    of: dict[Any, set[Any]] = {
        fold: {job.setting.get("seed") for job in s.runs.get((shot, fold), [])} for fold in folds
    }
    seeds = set().union(*of.values())
    lacking = {seed: [str(fold) for fold in folds if seed not in of[fold]] for seed in sorted(seeds, key=str)}
    if all(lacking.values()) or not any(lacking.values()):
        return []
    without = "; ".join(f"seed {seed} lacks fold {', '.join(missing)}" for seed, missing in lacking.items() if missing)
    return [f"{s.name}, {shot}-shot: the mean is over the seeds that have all folds: {without}."]


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
        groups[str(sorted((k, str(v)) for k, v in job.config.items() if v is not None))].append(job)
    configs = [g[0].config for g in groups.values()]
    names = sorted({k for c in configs for k in c})
    differ = [k for k in names if not all_equal(c.get(k) for c in configs)]
    chosen = {k for k in differ if k.startswith(("model.", "backbone.")) and follows(k, configs)}
    telling = [k for k in differ if k not in ("model", "weights", *chosen)]
    series = []
    for members in groups.values():
        config = members[0].config
        runs: dict[tuple[int, Any], list[Job]] = defaultdict(list)
        for job in members:
            same = runs[job.setting.get("shot", 1), job.setting.get("fold", 0)]
            twin = next((j for j in same if j.setting.get("seed") == job.setting.get("seed")), None)
            if twin:
                newer, older = same_two = sorted((twin, job), key=made, reverse=True)
                same.remove(twin)
                taught = "" if all_equal(j.record.get("backbone") for j in same_two) else ", with another backbone"
                notes.append(
                    f"{newer.name} counts, and not {older.name}: the same setting and seed, made later{taught}."
                )
                job = newer
            same.append(job)
        shown = [f"weights {config['weights']}"] if "weights" in differ else []
        shown += [f"{k}={config.get(k, NONE)}" for k in telling]
        name = MODELS.get(config["model"], config["model"])
        series.append(Series(", ".join([f"{name}, ours", *shown]), dict(runs)))
        notes += notes_on(series[-1])
    return series


def follows(key: str, configs: Sequence[dict[str, Any]]) -> bool:
    """Whether the choice of the model fixes a value, so that its name says it all."""
    models = {c["model"] for c in configs}
    return all(all_equal(c.get(key) for c in configs if c["model"] == model) for model in models)


def notes_on(s: Series) -> list[str]:
    """What a reader should know before trusting a row."""
    notes = []
    seeds = sorted({len(jobs) for jobs in s.runs.values()})
    if seeds[-1] > 1:
        count = f"{seeds[-1]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"mean ± sample standard deviation over {count} seeds")
    lists = (len({episodes(j, "episode_list_sha256") for j in jobs}) for jobs in s.runs.values())
    for what, different in {
        "lists of test episodes": max(lists),
        "numbers of test episodes": len({episodes(j, "test_episodes") for j in s.jobs}),
        "splits": len({episodes(j, "splits") for j in s.jobs}),
    }.items():
        if different > 1:
            notes.append(f"its runs have different {what}; they do not compare")
    seen = sorted({c for j in s.jobs for c in j.record.get("tested_classes_seen_in_training", [])})
    if seen:
        notes.append(f"tested classes that were trained on: {', '.join(seen)}")
    return [f"{s.name}: {note}." for note in notes]


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
    pairs, columns = number_columns(b)
    rows = [published_row(name, entries, pairs) for name, entries in by_method(b.published).items()]
    table = Table(f"mIoU in %. {b.title}", ["method", *columns, PARAMS], rows, list(b.notes))
    for s in b.series:
        values = [measured(s, b, *pair, "miou") for pair in pairs]
        table.rows.append(Row([s.name, *map(spread, values), params(s.jobs[0])], "ours"))
        like = [e for e in b.published if e["method"] == "PMNet" and e.get("ablation") == s.ablation]
        if like and s.jobs[0].setting.get("model", "pmnet") != "dam":
            printed = published_row("", like, pairs).cells[1:-1]
            gains = [gain(v, p) for v, p in zip(values, printed, strict=True)]
            table.rows.append(Row(["  against published", *gains, ""], "difference"))
        table.notes += partial_means(s, b, "miou")
    table.rows += [Row([*row.cells, ""], row.kind) for row in baseline_rows(b, "miou")]
    mark_best(table)
    return table


def parts(b: Benchmark) -> list[Any]:
    """What has a column of its own in each shot: folds, "mean" over them, "all" if a network learned everything."""
    return [*b.cut, *(["mean"] if b.cut else []), *(["all"] if "all" in b.folds else [])]


def part_name(part: Any) -> str:
    return part if part == "mean" else f"fold {part}"


def number_columns(b: Benchmark) -> tuple[list[tuple[int, Any]], list[str]]:
    """(shot, fold or "mean") of each column, and its head."""
    pairs = [(shot, part) for shot in b.shots for part in parts(b)]
    return pairs, [f"{shot}-shot {part_name(part)}" if b.cut else f"{shot}-shot" for shot, part in pairs]


def measured(s: Series, b: Benchmark, shot: int, part: Any, key: str) -> list[float]:
    """A value a seed."""
    return mean_of(s, b, shot, key) if part == "mean" else s.values(shot, part, key)


def mean_of(s: Series, b: Benchmark, shot: int, key: str) -> list[float]:
    return s.over_seeds(shot, b.cut, key)


def gain(values: Sequence[float], printed: str) -> str:
    if not values or printed == NONE:
        return NONE
    return f"{round(statistics.mean(values) - float(printed), 1) + 0.0:+.1f}"  # + 0.0: no minus before a zero


def baseline_rows(b: Benchmark, key: str) -> list[Row]:
    """The score of marking everything, which is the same for all who are tested on the same episodes."""

    def each(shot: int, part: Any) -> list[float]:
        found = []
        for fold in b.cut if part == "mean" else [part]:
            jobs = [job for s in b.series for job in s.runs.get((shot, fold), [])]
            found.append([j.record["baselines"]["all_foreground"][key] for j in jobs if j.record.get("baselines")][:1])
        return [statistics.mean(v for (v,) in found)] if all(found) else []

    values = [each(*pair) for pair in number_columns(b)[0]]
    return [Row(["everything marked as foreground", *map(spread, values)], "baseline")] if any(values) else []


def partial_means(s: Series, b: Benchmark, key: str) -> list[str]:
    """What there is of a mean whose folds are not all there."""
    notes = []
    for shot in b.shots:
        have = [fold for fold in b.cut if s.values(shot, fold, key)]
        missing = ", ".join(str(fold) for fold in b.cut if fold not in have)
        if have and missing:
            part = statistics.mean(statistics.mean(s.values(shot, fold, key)) for fold in have)
            notes.append(
                f"{s.name}, {shot}-shot: no mean yet, {len(have)} of {len(b.cut)} folds (without {missing}); "
                f"over those it is {part:.1f}."
            )
        elif have and not mean_of(s, b, shot, key):
            notes.append(f"{s.name}, {shot}-shot: no mean yet, as no seed has all folds.")
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
    """What is printed for a fold, for the mean over folds, or for the network of the whole dataset."""
    if part in ("mean", "all"):
        return entry.get("miou") if ("folds" in entry) == (part == "mean") else None
    return dict(enumerate(entry.get("folds", ()))).get(part)


def as_printed(value: float | None) -> str:
    """One decimal as in the paper, two where it has two."""
    if value is None:
        return NONE
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def params(job: Job) -> str:
    learnable = job.record.get("parameters", {}).get("learnable")
    return NONE if learnable is None else f"{learnable / 1e6:.2f}"


def mark_best(table: Table) -> None:
    """Bold: the best of the published and the best of all methods."""
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


def per_class(b: Benchmark) -> Table:
    """A line a class and fold, a column a configuration and shot."""
    columns = [(s, shot) for s in b.series for shot in b.shots]
    heads = [f"{shot}-shot" + (f", {s.name}" if len(b.series) > 1 else "") for s, shot in columns]
    rows = [
        Row([name, str(fold), *(spread(s.of_class(shot, fold, name)) for s, shot in columns)], "ours")
        for fold in b.folds
        for name in dict.fromkeys(name for s, shot in columns for name in s.classes(shot, fold))
    ]
    return Table(f"IoU of each class in %. {b.title}", ["class", "fold", *heads], rows)


# Renderings


def rich_tables(table: Table, width: int) -> list[RichTable]:
    """The table, or several with some of its columns each, so that no number is broken."""
    wide = [max(len(line) for c in cells for line in c.split("\n")) + 3 for cells in zip(*texts_of(table), strict=True)]
    groups: list[list[int]] = [[]]
    for i in range(1, len(wide)):
        if groups[-1] and FIRST + 4 + sum(wide[j] for j in groups[-1]) + wide[i] > width:
            groups.append([])
        groups[-1].append(i)
    return [rich_table(table, [0, *group]) for group in groups]


def texts_of(table: Table) -> list[list[str]]:
    """Heads, on two lines, and cells."""
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
    """For Markdown: one line, of which nothing is taken for markup."""
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
    """For LaTeX; brackets and asterisks are kept from being taken for an argument of the row before."""
    if re.fullmatch(r"[+-][0-9.]+", text):
        return f"${text}$"
    return "".join(SPECIAL.get(c, c) for c in " ".join(text.split()))


def latex(table: Table) -> str:
    """A `table` with booktabs' rules: \\usepackage{booktabs}."""

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
                r, place = job.record, job.url or job.folder
                line: dict[str, Any] = {
                    "task": b.task,
                    "dataset": b.dataset,
                    "target": b.target,
                    "backbone": b.backbone,
                    "row": s.name,
                }
                line |= {"weights": r.get("backbone", {}).get("weights"), "commit": r.get("commit"), "folder": place}
                line |= {"trained_by": r.get("training", {}).get("run") or place}
                line |= {key: job.setting.get(key) for key in ("model", "fold", "shot", "seed")}
                line |= {"miou": r["test"]["miou"], "fb_iou": r["test"]["fb_iou"]}
                writer.writerow(line | {"episodes": episodes(job, "test_episodes")})
    return text.getvalue()
