"""Result tables: published methods, our runs below them, the difference, and baselines.

A `Table` holds plain text; it is rendered for terminals, Markdown, LaTeX and CSV.
"""

import csv
import io
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import tabulate

from experiments.report.collect import OF_MODEL, Job, all_equal, within

PUBLISHED = Path(__file__).parents[1] / "published.yaml"
NONE, PARAMS = "-", "params (M)"
KEYS = ("miou", "fb_iou")
FIRST = 22  # minimum width of the first column in a terminal
ALL_FOREGROUND, UNTRAINED = "all_foreground", "untrained"  # baselines that are not training-free methods
TOLERANCE = 0.1  # percent by which a baseline may differ between runs without a note
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
ABLATIONS = {"no_b3dconvs": "w/o B3DConvs", "no_background": "w/o Background"}


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


@dataclass
class Series:
    """One configuration over shots, folds and seeds: a row of our results.

    Attributes:
        runs: (shot, fold) -> one run for each seed.
    """

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
        """The mean over the folds for each seed that has all of them."""
        by_seed: dict[Any, dict[Any, float]] = defaultdict(dict)
        for fold in folds:
            for job in self.runs.get((shot, fold), []):
                by_seed[job.setting.get("seed")][fold] = job.record["test"][key]
        return [statistics.mean(v.values()) for v in by_seed.values() if len(v) == len(folds)]

    @property
    def ablation(self) -> str | None:
        """How the model differs from the published one, in the words of published.yaml where it has such an entry."""
        config = self.jobs[0].config
        if config.get("model.linear_heads"):
            return "linear_heads"
        if config.get("model.b3dconvs") is False:
            return "no_b3dconvs"
        return "no_background" if config.get("model.support_background") is False else None


@dataclass
class Benchmark:
    """One table: a task, a dataset to train on, a target to test on, and a backbone."""

    task: str
    dataset: str
    target: str
    backbone: str
    series: list[Series]
    baselines: list[Series]
    published: list[dict[str, Any]]
    shots: list[int]
    folds: list[Any]
    notes: list[str]

    @property
    def cut(self) -> list[Any]:
        """The folds that a mean is over, without fold "all": a single network for the whole dataset."""
        return [fold for fold in self.folds if fold != "all"]

    @property
    def title(self) -> str:
        pair = self.dataset if self.task == "cross_category" else f"{self.dataset} → {self.target}"
        return f"{self.task.replace('_', '-').capitalize()}: {pair}, {self.backbone}"


@cache
def published() -> list[dict[str, Any]]:
    """The entries of published.yaml, without averages over targets; a method in two tables is listed once."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    named = {(*(e[k] for k in ("task", "dataset", "target", "backbone", "shot")), method(e)): e
             for e in reversed(entries) if "task" in e}  # fmt: skip
    return list(reversed(named.values()))


def method(entry: dict[str, Any]) -> str:
    venue = f" ({entry['venue']})" if entry.get("venue") else ""
    ablation = f" {ABLATIONS[entry['ablation']]}" if entry.get("ablation") else ""
    return f"{entry['method']}{ablation}{venue}"


def same_name(a: str, b: str) -> bool:
    """Whether two names of a method are the same up to case and punctuation, as "HSNet-HM" and "hsnet_hm"."""
    return re.sub(r"[\W_]", "", a).lower() == re.sub(r"[\W_]", "", b).lower()


def label(job: Job) -> str:
    """The run's method; its model (conf/model) in parentheses if that has another name: "PMNet (release)"."""
    model = job.setting.get("model", job.method)
    if same_name(model, job.method):
        return job.method
    return f"{job.method} ({model.removeprefix(f'{job.method.lower()}_')})"


def benchmarks(jobs: Sequence[Job]) -> list[Benchmark]:
    """Groups finished runs by benchmark, in the order in which they were found."""
    groups: dict[tuple[str, str, str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.benchmark].append(job)
    result = []
    for (task, dataset, target, backbone), members in groups.items():
        notes: list[str] = []
        series = rows_of(members, notes)
        shots = sorted({shot for s in series for shot, _ in s.runs})
        like = {"task": task, "dataset": dataset, "target": target, "backbone": in_paper(backbone)}
        printed = [e for e in published() if like.items() <= e.items() and e["shot"] in shots]
        folds = folds_of(members, printed)
        if len(folds) > 1 and not any("folds" in known for known in [*printed, *(job.setting for job in members)]):
            notes.append("The number of folds is not recorded; means are over the folds found.")
        baselines = baselines_of(series, notes)
        result.append(Benchmark(task, dataset, target, backbone, series, baselines, printed, shots, folds, notes))
        notes += [note for s in series for shot in shots for note in seeds_left_out(s, shot, result[-1].cut)]
    return result


def in_paper(backbone: str) -> str:
    """The paper's name of a choice of conf/backbone: its ResNets are also those with another stem or dilation."""
    return re.sub(r"^(resnet50|resnet101)(s|s?_.+)$", r"\1", backbone)


def baselines_of(series: Sequence[Series], notes: list[str]) -> list[Series]:
    """The baselines in the runs' records, each as a series of its own.

    Marking everything as foreground has the same score in all runs on the same test episodes: one series for each
    protocol. A training-free method also depends on the backbone's weights: one series for each choice of weights. An
    untrained network depends on the configuration and the seed: one series for each of `series`.
    """
    rows = []
    for protocol, sharing in grouped(series, "protocol").items():
        under = f", protocol={protocol}" if len(grouped(series, "protocol")) > 1 else ""
        rows.append(baseline(f"everything marked as foreground{under}", ALL_FOREGROUND, sharing, notes))
        names = dict.fromkeys(name for s in sharing for job in s.jobs for name in job.record.get("baselines", {}))
        by_weights = grouped(sharing, "weights")
        for name in (name for name in names if name not in (ALL_FOREGROUND, UNTRAINED)):
            for weights, alike in by_weights.items():
                shown = f", weights {weights}" if len(by_weights) > 1 else ""
                title = f"{name.replace('_', ' ')}, training-free{shown}{under}"
                rows.append(baseline(title, name, alike, notes))
    for s in (s for s in series if not s.jobs[0].training_free):
        shown = f", {s.name}" if len(series) > 1 else ""
        runs = {key: [j for job in jobs for j in scored(job, UNTRAINED)] for key, jobs in s.runs.items()}
        rows.append(Series(f"before training{shown}", {key: jobs for key, jobs in runs.items() if jobs}))
    return [row for row in rows if row.runs]


def grouped(series: Sequence[Series], option: str) -> dict[Any, list[Series]]:
    """The series by their value of an option."""
    groups: dict[Any, list[Series]] = defaultdict(list)
    for s in series:
        groups[s.jobs[0].config[option]].append(s)
    return groups


def baseline(title: str, name: str, series: Sequence[Series], notes: list[str]) -> Series:
    """A baseline that neither seed nor training affects: the first score found for each shot and fold."""
    found: dict[tuple[int, Any], list[Job]] = defaultdict(list)
    for s in series:
        for key, jobs in s.runs.items():
            found[key] += [j for job in jobs for j in scored(job, name, seed=None)]
    scores = [[j.record["test"]["miou"] for j in jobs] for jobs in found.values() if jobs]
    if any(max(of_all) - min(of_all) > TOLERANCE for of_all in scores):
        notes.append(
            f"{title}: scores differ between runs, e.g. by image size, test episodes, or a backbone that a method "
            "trains; the first is shown."
        )
    return Series(title, {key: jobs[:1] for key, jobs in found.items() if jobs})


def scored(job: Job, name: str, **setting: Any) -> list[Job]:
    """The run with the scores of a baseline in place of its own; empty if it has no such baseline."""
    scores = job.record.get("baselines", {}).get(name)
    return [replace(job, record={"setting": job.setting | setting, "test": scores})] if scores else []


def seeds_left_out(s: Series, shot: int, folds: Sequence[Any]) -> list[str]:
    """A note on the seeds that a mean leaves out because some of their folds are missing."""
    of: dict[Any, set[Any]] = {
        fold: {job.setting.get("seed") for job in s.runs.get((shot, fold), [])} for fold in folds
    }
    seeds = set().union(*of.values())
    lacking = {seed: [str(fold) for fold in folds if seed not in of[fold]] for seed in sorted(seeds, key=str)}
    if all(lacking.values()) or not any(lacking.values()):
        return []
    without = "; ".join(f"seed {seed} lacks fold {', '.join(missing)}" for seed, missing in lacking.items() if missing)
    return [f"{s.name}, {shot}-shot: the mean is over the seeds with all folds ({without})."]


def folds_of(jobs: Sequence[Job], printed: Sequence[dict[str, Any]]) -> list[Any]:
    """All folds of the dataset, as recorded or as published, whether or not they were run."""
    found = {job.setting.get("fold", 0) for job in jobs}
    if found == {"all"}:
        return ["all"]
    known = {n for job in jobs for n in range(job.setting.get("folds", 0))}
    known |= {n for e in printed for n in range(len(e.get("folds", ())))}
    return sorted((found | known) - {"all"}) + (["all"] if "all" in found else [])


def rows_of(jobs: Sequence[Job], notes: list[str]) -> list[Series]:
    """One series for each configuration, named by the values in which it differs from the others."""
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[str(sorted((k, str(v)) for k, v in job.config.items() if v is not None))].append(job)
    firsts = [g[0] for g in groups.values()]
    configs = [job.config for job in firsts]
    names = sorted({k for c in configs for k in c})
    differ = [k for k in names if not all_equal(job.config.get(k) for job in firsts if job.has_option(k))]
    chosen = {k for k in differ if within(k, OF_MODEL) and k != "model" and follows(k, configs)}
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
                other = "" if all_equal(j.record.get("backbone") for j in same_two) else ", with another backbone"
                notes.append(
                    f"{newer.name} replaces {older.name}: it has the same setting and seed and is newer{other}."
                )
                job = newer
            same.append(job)
        shown = [f"weights {config['weights']}"] if "weights" in differ else []
        shown += [f"{k}={config.get(k, NONE)}" for k in telling if members[0].has_option(k)]
        series.append(Series(", ".join([f"{label(members[0])}, ours", *shown]), dict(runs)))
        notes += notes_on(series[-1])
    return series


def follows(key: str, configs: Sequence[dict[str, Any]]) -> bool:
    """Whether the value depends on the model alone, so that naming the model is enough."""
    models = {c["model"] for c in configs}
    return all(all_equal(c.get(key) for c in configs if c["model"] == model) for model in models)


def notes_on(s: Series) -> list[str]:
    """Notes on what limits a row: seeds, test episodes that differ, tested classes seen in training."""
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
            notes.append(f"its runs have different {what} and are not comparable")
    several = [j for j in s.jobs if "std" in j.record["test"]]
    if several:
        each = ", ".join(
            f"{j.setting.get('shot', 1)}-shot fold {j.setting.get('fold', 0)} {j.record['test']['std']['miou']:.1f}"
            for j in several
        )
        notes.append(f"each number is a mean over test lists; sample standard deviation of mIoU over the lists: {each}")
    seen = sorted({c for j in s.jobs for c in j.record.get("tested_classes_seen_in_training") or []})
    if seen:
        notes.append(f"tested classes that were seen in training: {', '.join(seen)}")
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
        return entry.get("miou") if ("folds" in entry) == (part == "mean") else None
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


# Renderings


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
