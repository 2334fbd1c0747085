"""A report's figures: mIoU by fold, a radar like the paper's figure 1, IoU by class, learning curves."""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.report.benchmarks import NONE, Benchmark, Series, method, published, same_name
from experiments.report.collect import Found, by_number
from experiments.report.tables import as_printed, mean_of, measured, part_name, parts, printed_value

matplotlib.use("Agg")
ROWS, MOST = 10, 160  # at most this many series, and classes, in a figure
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]  # Okabe and Ito
HATCHES = ("//", "", "..")  # published, ours, ours when the colours repeat
SHORT = {"cross_category": "", "cross_dataset": "cross-dataset\n", "cross_domain": "cross-domain\n"}


def leading(b: Benchmark) -> list[Series]:
    """The series with the best numbers, at most `ROWS` of them: a search has many."""
    means = {s.name: statistics.mean(job.record["test"]["miou"] for job in s.jobs) for s in b.series}
    best = sorted(means, key=lambda name: -means[name])[:ROWS]
    return [s for s in b.series if s.name in best]


def folds(b: Benchmark) -> Figure:
    """Bars for each fold and shot: our series beside published HSNet, PMNet and the series' own methods."""
    series = leading(b)
    shown = ["HSNet", "PMNet", *(s.jobs[0].method for s in series)]
    compared = [e for e in b.published if any(same_name(e["method"], name) for name in shown) and not e.get("ablation")]
    printed = list(dict.fromkeys(method(e) for e in compared))
    names = [*(f"{name}, published" for name in printed), *(s.name for s in series)]
    size = (max(6.0, 1.1 + 0.34 * len(names) * len(parts(b))), 2.6 * len(b.shots) + 0.2 * len(names))
    fig = Figure(figsize=size, layout="constrained")
    for axis, shot in zip(fig.subplots(len(b.shots), 1, squeeze=False)[:, 0], b.shots, strict=True):
        lines = []
        for name in printed:
            entry = next((e for e in compared if method(e) == name and e["shot"] == shot), {})
            values = [printed_value(entry, part) for part in parts(b)]
            lines.append([[] if v is None else [v] for v in values])
        lines += [[measured(s, b, shot, part, "miou") for part in parts(b)] for s in series]
        for i, (name, line) in enumerate(zip(names, lines, strict=True)):
            means = [statistics.mean(values) if values else math.nan for values in line]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in line]
            places = [j + (i - (len(names) - 1) / 2) * 0.84 / len(names) for j in range(len(means))]
            bars = axis.bar(
                places, means, 0.84 / len(names), yerr=errors if any(errors) else None, label=plain_text(name),
                color=COLOURS[i % len(COLOURS)], edgecolor="white",
                hatch=HATCHES[0 if i < len(printed) else 1 + i // len(COLOURS)],
            )  # fmt: skip
            axis.bar_label(bars, ["" if math.isnan(m) else f"{m:.1f}" for m in means], fontsize=7, padding=1)
        axis.set_xticks(range(len(parts(b))), [part_name(part) for part in parts(b)])
        axis.set_xlim(-0.5, len(parts(b)) - 0.5)
        axis.set_ylabel("mIoU in %")
        axis.set_title(f"{shot}-shot", fontsize=10, loc="left")
        axis.margins(y=0.12)
        clean(axis)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8, frameon=False)
    return fig


def radar(found: Sequence[Benchmark]) -> Figure | None:
    """One axis for each benchmark, as in the paper's figure 1: published HSNet and PMNet, and our best row.

    Each axis has its own scale. The backbone and shot with the most benchmarks are drawn; None if none is published.
    """
    covered: dict[tuple[str, int], list[Benchmark]] = defaultdict(list)
    for b in found:
        for shot in b.shots:
            if any(e["shot"] == shot for e in b.published) and best_of(b, shot) is not None:
                covered[b.backbone, shot].append(b)
    if not covered:
        return None
    chosen = max(covered, key=lambda c: (len(covered[c]), c[0] == "resnet50", -c[1]))
    backbone, shot = chosen
    entries = [e for e in published() if (e["backbone"], e["shot"]) == chosen and not e.get("ablation")]
    axes = list(dict.fromkeys((e["task"], e["dataset"], e["target"]) for e in entries if e["method"] == "PMNet"))
    lines: dict[str, list[float]] = {}
    for name in ("HSNet", "PMNet"):
        printed = {(e["task"], e["dataset"], e["target"]): e["miou"] for e in entries if e["method"] == name}
        lines[f"{name}, published"] = [printed.get(a, math.nan) for a in axes]
    ours = {(b.task, b.dataset, b.target): round(best_of(b, shot) or 0.0, 1) for b in covered[chosen]}
    lines["ours (best row)"] = [ours.get(a, math.nan) for a in axes]
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
        + " / ".join(NONE if math.isnan(v := line[i]) else as_printed(v) for line in lines.values())
        for i, (task, dataset, target) in enumerate(axes)
    ]
    axis.set_theta_zero_location("N")
    axis.set_xticks(angles, labels, fontsize=8)
    axis.tick_params(axis="x", pad=14)
    for angle, label in zip(angles, axis.get_xticklabels(), strict=True):
        side = math.sin(angle)  # angles run counter-clockwise from the top
        label.set_horizontalalignment("center" if abs(side) < 0.2 else "right" if side > 0 else "left")
    axis.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axis.set_ylim(0, 1.08)
    axis.set_title(f"{backbone}, {shot}-shot: mIoU in %, {' / '.join(lines)}", fontsize=9, pad=34)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return fig


def best_of(b: Benchmark, shot: int) -> float | None:
    """Our best mIoU: the mean over all folds, or that of a network for the whole dataset."""
    values = [mean_of(s, b, shot, "miou") if b.cut else s.values(shot, "all", "miou") for s in b.series]
    return max((statistics.mean(v) for v in values if v), default=None)


def classes(b: Benchmark, s: Series) -> Figure:
    """Sorted IoU of each class, coloured by fold, one panel for each shot; the lowest and highest if there are many."""
    panels: dict[int, list[tuple[float, str, Any]]] = {}
    for shot in sorted({shot for shot, _ in s.runs}):
        bars = [
            (statistics.mean(s.of_class(shot, fold, name)), name, fold)
            for fold in b.folds
            for name in s.classes(shot, fold)
        ]
        panels[shot] = sorted(bars, key=lambda bar: bar[0])
    longest = min(max(map(len, panels.values())), MOST)
    fig = Figure(figsize=(4.8 * len(panels), 1.3 + 0.21 * longest), layout="constrained")
    for axis, (shot, bars) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        shown = bars if len(bars) <= MOST else bars[: MOST // 2] + bars[-MOST // 2 :]
        for i, (value, _, fold) in enumerate(shown):
            axis.barh(i, value, color=COLOURS[b.folds.index(fold) % len(COLOURS)])
            axis.text(value, i, f" {value:.1f}", va="center", fontsize=7)
        axis.set_yticks(range(len(shown)), [plain_text(name) for _, name, _ in shown], fontsize=8)
        axis.set_ylim(-0.6, max(longest, 1) - 0.4)
        axis.set_xlabel("IoU in %")
        some = f", lowest and highest of {len(bars)}" if len(bars) > MOST else ""
        axis.set_title(f"{shot}-shot{some}", fontsize=10, loc="left")
        axis.margins(x=0.12)
        clean(axis)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=f"fold {f}") for i, f in enumerate(b.folds)]
    fig.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return fig


def curves(found: Found) -> Figure | None:
    """Validation mIoU and training loss over epochs, one line for each training; None if no run has any."""
    runs = dict.fromkeys(job.trained_by for job in found.jobs if job.trained_by)
    lines = {found.name_of(run): read_curves(run) for run in runs}
    lines = {name: line for name, line in lines.items() if any(line.values())}
    if not lines:
        return None
    fig = Figure(figsize=(9.6, 3.2 + 0.18 * math.ceil(len(lines) / 3)), layout="constrained")
    for axis, key, label in zip(
        fig.subplots(1, 2), ("val/miou", "train/loss"), ("validation mIoU in %", "training loss"), strict=True
    ):
        for i, (name, line) in enumerate(lines.items()):
            points = sorted(line[key].items())
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            axis.plot(
                [x + 1 for x, _ in points], [y for _, y in points], f"o{style}", ms=3, lw=1.3,
                color=COLOURS[i % len(COLOURS)], label=plain_text(name),
            )  # fmt: skip
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        clean(axis)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    return fig


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """Epoch -> value, from metrics.csv and the files of interrupted parts. Later values of an epoch replace earlier."""
    result: dict[str, dict[int, float]] = {"val/miou": {}, "train/loss": {}}
    parts = [
        path for name in ("metrics-of-*.csv", "metrics-[0-9]*.csv") for path in sorted(run.glob(name), key=by_number)
    ]
    for path in [*parts, run / "metrics.csv"]:
        if not path.is_file():
            continue
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):  # the last may be incomplete
            for key, points in result.items():
                try:
                    points[int(row["epoch"])] = float(row[key])
                except (KeyError, TypeError, ValueError):
                    continue
    return result


def plain_text(name: str) -> str:
    """The name with dollar signs escaped, which matplotlib would read as mathematics."""
    return name.replace("$", r"\$")


def clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
