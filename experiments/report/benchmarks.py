"""Runs as benchmarks: what a table has in common, and its rows of runs, baselines and published numbers."""

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.report.collect import OF_MODEL, Job, all_equal, within

PUBLISHED = Path(__file__).parents[1] / "published.yaml"  # the tables of the paper
LATER = PUBLISHED.with_name("published_later.yaml")  # other methods, from other texts
NONE = "-"
ALL_FOREGROUND, UNTRAINED = "all_foreground", "untrained"  # baselines that are not training-free methods
TOLERANCE = 0.1  # percent by which a baseline may differ between runs without a note
ABLATIONS = {"no_b3dconvs": "w/o B3DConvs", "no_background": "w/o Background"}


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
    """The entries of both files, without averages over targets; a method in two tables is listed once.

    `where` is the table that an entry stands in.
    """
    printed: Any = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    later: Any = OmegaConf.to_container(OmegaConf.load(LATER))
    entries = [e | {"where": f"table {e['table']}"} for e in printed]
    entries += [e | {"where": later["sources"][e["source"]]["where"]} for e in later["entries"]]
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
        untrained = {name: like[name] for name in ("target", "backbone")} | {"trained_on": "nothing"}
        alike = (e for e in published() if like.items() <= e.items() or untrained.items() <= e.items())
        printed = [e for e in alike if e["shot"] in shots]
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
