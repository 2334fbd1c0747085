"""Figures of a report: folds, the radar of the paper's figure 1, classes, learning curves."""

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.collect import Job
from experiments.report.tables import NONE, Benchmark, Series, mean_of, method, published

matplotlib.use("Agg")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]  # Okabe and Ito's
SHORT = {"cross_category": "", "cross_dataset": "cross-dataset\n", "cross_domain": "cross-domain\n"}


def folds(b: Benchmark) -> Figure:
    """Bars of each fold and shot; published HSNet and PMNet beside ours."""
    compared = [e for e in b.published if e["method"] in ("HSNet", "PMNet") and not e.get("ablation")]
    names = list(dict.fromkeys(method(e) for e in compared)) + [s.name for s in b.series]
    fig = Figure(
        figsize=(max(5.0, 1.1 + 0.32 * len(names) * (len(b.folds) + 1)), 3.1 * len(b.shots)), layout="constrained"
    )
    for axis, shot in zip(fig.subplots(len(b.shots), 1, squeeze=False)[:, 0], b.shots, strict=True):
        heads = b.folds if b.folds == ["all"] else [*b.folds, "mean"]
        for i, name in enumerate(names):
            values, errors = [], []
            for fold in heads:
                mean, error = value_of(b, name, shot, fold)
                values.append(mean)
                errors.append(error)
            places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(heads))]
            hatch = "//" if i < len(names) - len(b.series) else None
            bars = axis.bar(
                places, values, 0.8 / len(names), yerr=errors if any(errors) else None,
                color=COLOURS[i % len(COLOURS)], label=name, hatch=hatch, edgecolor="white",
            )  # fmt: skip
            labels = ["" if math.isnan(v) else f"{v:.1f}" for v in values]
            axis.bar_label(bars, labels, fontsize=7, padding=1)
        axis.set_xticks(range(len(heads)), [h if isinstance(h, str) else f"fold {h}" for h in heads])
        axis.set_ylabel("mIoU in %")
        axis.set_title(f"{shot}-shot", fontsize=10, loc="left")
        axis.margins(y=0.12)
        clean(axis)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return fig


def value_of(b: Benchmark, name: str, shot: int, fold: object) -> tuple[float, float]:
    """Mean and standard deviation over seeds; NaN where there is none."""
    values: list[float] = []
    for s in b.series:
        if s.name == name:
            values = mean_of(s, b, shot, "miou") if fold == "mean" else s.values(shot, fold, "miou")
    for e in b.published:
        if method(e) == name and e["shot"] == shot:
            printed = dict(enumerate(e.get("folds", ())))
            value = e["miou"] if fold in ("mean", "all") else printed.get(fold)  # type: ignore[call-overload]
            values = [] if value is None else [value]
    if not values:
        return math.nan, 0.0
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def radar(found: Sequence[Benchmark]) -> Figure | None:
    """As figure 1 of the paper: an axis a benchmark, published HSNet and PMNet, and ours; each axis has its own scale.

    Of ours, the backbone and shot with most benchmarks are drawn. None where they have no published benchmark.
    """
    candidates = sorted({(b.backbone, shot) for b in found for shot in b.shots}, key=lambda c: (c[0] != "resnet50", c))
    covered = {c: [b for b in found if b.backbone == c[0] and best_of(b, c[1])] for c in candidates}
    chosen = max(candidates, key=lambda c: sum(bool(b.published) for b in covered[c]), default=None)
    if chosen is None or not any(b.published for b in covered[chosen]):
        return None
    backbone, shot = chosen
    entries = [e for e in published() if (e["backbone"], e["shot"]) == chosen and not e.get("ablation")]
    axes = list(dict.fromkeys((e["task"], e["dataset"], e["target"]) for e in entries if e["method"] == "PMNet"))
    lines: dict[str, list[float]] = {}
    for name in ("HSNet", "PMNet"):
        printed = {(e["task"], e["dataset"], e["target"]): e["miou"] for e in entries if e["method"] == name}
        lines[f"{name}, published"] = [printed.get(a, math.nan) for a in axes]
    ours = {(b.task, b.dataset, b.target): best_of(b, shot) for b in covered[chosen]}
    lines["ours (best row)"] = [ours.get(a) or math.nan for a in axes]
    most = [max(v for line in lines.values() if not math.isnan(v := line[i])) for i in range(len(axes))]
    fig = Figure(figsize=(8.4, 6.4), layout="constrained")
    axis: Any = fig.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    for i, (name, values) in enumerate(lines.items()):
        scaled = [v / m for v, m in zip(values, most, strict=True)]
        axis.plot(
            [*angles, angles[0]], [*scaled, scaled[0]], "o-", color=COLOURS[(1, 0, 2)[i]], label=name, lw=1.6, ms=4
        )
    labels = [
        f"{SHORT[task]}{dataset if dataset == target else f'{dataset} → {target}'}\n"
        + " / ".join(NONE if math.isnan(line[i]) else f"{line[i]:.1f}" for line in lines.values())
        for i, (task, dataset, target) in enumerate(axes)
    ]
    axis.set_theta_zero_location("N")
    axis.set_xticks(angles, labels, fontsize=8)
    axis.tick_params(axis="x", pad=14)
    for angle, label in zip(angles, axis.get_xticklabels(), strict=True):
        side = math.sin(angle)  # angles run against the clock from the top
        label.set_horizontalalignment("center" if abs(side) < 0.2 else "right" if side > 0 else "left")
    axis.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axis.set_ylim(0, 1.08)
    axis.set_title(f"{backbone}, {shot}-shot: mIoU in %, {' / '.join(lines)}", fontsize=9, pad=34)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return fig


def best_of(b: Benchmark, shot: int) -> float | None:
    """The best mean mIoU of ours with all its folds there."""
    values = [s.values(shot, "all", "miou") if b.folds == ["all"] else mean_of(s, b, shot, "miou") for s in b.series]
    return max((statistics.mean(v) for v in values if v), default=None)


def classes(b: Benchmark, s: Series) -> Figure:
    """IoU of each class, sorted, coloured by fold; a panel a shot."""
    per_shot: dict[int, list[tuple[float, str, object]]] = {}
    for shot in sorted({shot for shot, _ in s.runs}):
        bars: list[tuple[float, str, object]] = []
        for fold in b.folds:
            jobs = s.runs.get((shot, fold), [])
            for name in jobs[0].record["test"]["iou_per_class"] if jobs else ():
                values = [
                    j.record["test"]["iou_per_class"][name] for j in jobs if name in j.record["test"]["iou_per_class"]
                ]
                bars.append((statistics.mean(values), name, fold))
        per_shot[shot] = sorted(bars, key=lambda bar: bar[0])
    longest = max(map(len, per_shot.values()))
    fig = Figure(figsize=(4.6 * len(per_shot), 0.9 + 0.21 * longest), layout="constrained")
    for axis, (shot, bars) in zip(fig.subplots(1, len(per_shot), squeeze=False)[0], per_shot.items(), strict=True):
        for i, (value, _, fold) in enumerate(bars):
            axis.barh(i, value, color=COLOURS[b.folds.index(fold) % len(COLOURS)])
            axis.text(value, i, f" {value:.1f}", va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), [name for _, name, _ in bars], fontsize=8)
        axis.set_ylim(-0.6, max(longest, 1) - 0.4)
        axis.set_xlabel("IoU in %")
        axis.set_title(f"{shot}-shot", fontsize=10, loc="left")
        axis.margins(x=0.12)
        clean(axis)
    handles = [
        matplotlib.patches.Patch(color=COLOURS[i % len(COLOURS)], label=f"fold {f}") for i, f in enumerate(b.folds)
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=len(b.folds), fontsize=8, frameon=False)
    return fig


def curves(jobs: Sequence[Job]) -> Figure | None:
    """Validation mIoU and training loss over epochs, a line a training; None where no run has any."""
    runs: dict[Path, str] = {}
    for job in jobs:
        if job.trained_by and job.trained_by not in runs:
            runs[job.trained_by] = job.trained_by.name
    lines = {name: read_curves(run) for run, name in runs.items()}
    lines = {name: line for name, line in lines.items() if any(line.values())}
    if not lines:
        return None
    rows = math.ceil(len(lines) / 2)
    fig = Figure(figsize=(9.6, 3.2 + 0.18 * rows), layout="constrained")
    for axis, key, label in zip(
        fig.subplots(1, 2), ("val/miou", "train/loss"), ("validation mIoU in %", "training loss"), strict=True
    ):
        for i, (name, line) in enumerate(lines.items()):
            points = sorted(line[key].items())
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            axis.plot(
                [x + 1 for x, _ in points], [y for _, y in points], f"o{style}", ms=3, lw=1.3,
                color=COLOURS[i % len(COLOURS)], label=name,
            )  # fmt: skip
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        clean(axis)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    return fig


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """Epoch -> value, of metrics.csv and of the parts before an interruption; a line half written is passed over."""
    result: dict[str, dict[int, float]] = {"val/miou": {}, "train/loss": {}}
    parts = sorted(run.glob("metrics-*.csv"), key=lambda p: (p.stem.startswith("metrics-of"), p.stem))
    for path in [*parts, run / "metrics.csv"]:
        if not path.is_file():
            continue
        for row in csv.DictReader(path.read_text().splitlines()):
            for key, points in result.items():
                try:
                    points[int(row["epoch"])] = float(row[key])
                except (KeyError, TypeError, ValueError):
                    continue
    return result


def clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
