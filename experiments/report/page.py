"""report.html, a single file without links to others, and the same tables as Markdown, LaTeX and CSV."""

import base64
import io
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from PIL import Image

from experiments.report import figures, made, renderings, tables
from experiments.report.benchmarks import NONE, Benchmark, benchmarks
from experiments.report.collect import Found, Job, all_equal
from experiments.report.tables import Table
from pmnet.replacing import replacing

STATES = ("finished", "failed", "unfinished", "not started")
WIDEST = 1000  # pixels of a panel on the page; smaller if there are more than 16 runs


@dataclass
class Section:
    """One benchmark on the page. Figures are (heading, file name, PNG)."""

    title: str
    name: str
    miou: Table
    fb_iou: Table
    per_class: Table
    absent: Table | None
    made: Table
    figures: list[tuple[str, str, bytes]] = field(default_factory=list)
    class_figures: list[tuple[str, str, bytes]] = field(default_factory=list)

    @property
    def numbers(self) -> dict[str, Table]:
        """The tables of results by the kind of their file."""
        given = {"miou": self.miou, "fb-iou": self.fb_iou, "classes": self.per_class, "absent": self.absent}
        return {kind: table for kind, table in given.items() if table}


@dataclass
class Origin:
    """A row of the page's last table, which says where a run's numbers come from."""

    name: str
    link: str
    cells: list[str]
    overrides: str


def write(found: Found, out: Path) -> list[Benchmark]:
    """Writes report.{html,md,tex,csv}, tables/*.csv and figures/*.png to `out`; returns the benchmarks in it.

    Each file is replaced in one step, so it can be read while a sweep is running.
    """
    for folder in ("figures", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    of_report = benchmarks(found.tested)
    sections = [section(b) for b in of_report]
    overall = as_png("Comparison with the paper", "radar", figures.radar(of_report))
    overall += as_png("Learning curves", "curves", figures.curves(found))
    for _, name, png in [f for s in sections for f in (*s.figures, *s.class_figures)] + overall:
        replace(out / "figures" / f"{name}.png", png)
    replace(out / "report.md", markdown(found, sections, overall))
    replace(out / "report.tex", "\n".join(renderings.latex(t) for s in sections for t in s.numbers.values()))
    replace(out / "report.csv", renderings.tidy_csv(of_report))
    for s in sections:
        for kind, table in s.numbers.items():
            replace(out / "tables" / f"{kind}-{s.name}.csv", renderings.as_csv(table))
    replace(out / "report.html", html(found, sections, overall, out))
    return of_report


def replace(path: Path, content: str | bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))


def section(b: Benchmark) -> Section:
    pair = b.dataset if b.dataset == b.target else f"{b.dataset}-{b.target}"
    name = re.sub(r"[^\w-]+", "-", f"{b.task}-{pair}-{b.backbone}")
    result = Section(
        b.title, name, tables.miou(b), tables.fb_iou(b), tables.per_class(b), tables.absent(b), made.table(b)
    )
    result.figures = as_png("mIoU by fold", f"folds-{name}", figures.folds(b))
    for i, s in enumerate(figures.leading(b)):
        if any(s.classes(*key) for key in s.runs):
            result.class_figures += as_png(f"IoU of each class, {s.name}", f"classes-{name}-{i}", figures.classes(b, s))
    return result


def as_png(heading: str, name: str, fig: Figure | None) -> list[tuple[str, str, bytes]]:
    """[(heading, name, PNG)], or [] without a figure."""
    if fig is None:
        return []
    png = io.BytesIO()
    fig.savefig(png, dpi=110)
    return [(heading, name, png.getvalue())]


def title(found: Found) -> str:
    names = ", ".join(sweep.folder.absolute().name for sweep in found.sweeps)
    return f"Sweep {names}" if names else f"{len(found.jobs)} runs" if len(found.jobs) > 1 else found.jobs[0].name


def commands(found: Found) -> list[tuple[str, str]]:
    """(command, start time) of the sweeps, or of the runs if there is no sweep."""
    if found.sweeps:
        return [(shlex.join(s.command), s.started[:16].replace("T", " ")) for s in found.sweeps]
    return [(c, "") for c in dict.fromkeys(shlex.join(j.record.get("command", [])) for j in found.finished) if c]


def state_lines(found: Found) -> list[str]:
    """How many runs finished, which did not and why, and notes."""
    counted = Counter(job.state for job in found.jobs)
    counts = ", ".join(f"{counted[state]} {state}" for state in STATES if counted[state])
    return [f"{counts} of {len(found.jobs)} runs", *missing(found), *found.notes]


def missing(found: Found) -> list[str]:
    lines = []
    for job in found.jobs:
        if job.state != "finished":
            why = f": {job.error.strip().splitlines()[0]}" if job.error and job.error.strip() else ""
            lines.append(f"{job.state}: {job.name}{why}")
    return lines


def markdown(found: Found, sections: Sequence[Section], overall: Sequence[tuple[str, str, bytes]]) -> str:
    def pictures(figures: Sequence[tuple[str, str, bytes]]) -> list[str]:
        return [f"![{renderings.plain(heading)}](figures/{name}.png)\n" for heading, name, _ in figures]

    first, *rest = state_lines(found)
    lines = [
        f"# {renderings.plain(title(found))}\n",
        f"{first}.\n",
        *(f"- {renderings.plain(line)}" for line in rest),
        "",
    ]
    for s in sections:
        lines += [f"## {renderings.plain(s.title)}\n", renderings.markdown(s.miou), *pictures(s.figures)]
        lines += [renderings.markdown(s.fb_iou), *([renderings.markdown(s.absent)] if s.absent else [])]
        lines += [renderings.markdown(s.per_class), *pictures(s.class_figures)]
    lines += [*pictures(overall), f"## {made.TITLE}\n", *(renderings.markdown(s.made) for s in sections)]
    return "\n".join(lines)


def html(found: Found, sections: list[Section], overall: list[tuple[str, str, bytes]], out: Path) -> str:
    common, columns, origins = provenance(found.tested, found, out)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.j2").render(
        title=title(found),
        commands=commands(found),
        states=state_lines(found)[0],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        missing=missing(found),
        notes=found.notes,
        sections=sections,
        made_title=made.TITLE,
        figures=overall,
        png=lambda content: source(content, "png"),
        panels=panels(found.tested),
        common=common,
        origin_columns=columns,
        origins=origins,
    )


def source(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def panels(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """(run, JPEG as a data URL) of each run's overview of predictions, resized to the page's width."""
    paths = {job.name: job.folder / "predictions" / "overview.png" for job in jobs if job.folder}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    widest = WIDEST * min(1.0, math.sqrt(16 / max(len(paths), 1)))
    result = []
    for name, path in paths.items():
        jpeg = io.BytesIO()
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
        except (OSError, SyntaxError):  # only partly written yet
            continue
        small.thumbnail((int(widest), int(4 * widest)))
        small.save(jpeg, "JPEG", quality=75)
        result.append((name, source(jpeg.getvalue(), "jpeg")))
    return result


def provenance(jobs: Sequence[Job], found: Found, out: Path) -> tuple[dict[str, str], list[str], list[Origin]]:
    """The facts that all runs share, the names of those that differ, and one row for each run with the latter."""
    facts = [facts_of(job, found) for job in jobs]
    names = list(dict.fromkeys(name for f in facts for name in f))
    shared = {n: facts[0][n] for n in names if n not in ALWAYS and all_equal(f.get(n) for f in facts)}
    columns = [n for n in names if n not in shared]
    origins = [
        Origin(job.name, link(job, out), [f.get(c, NONE) for c in columns], shlex.join(job.overrides))
        for job, f in zip(jobs, facts, strict=True)
    ]
    return shared, columns, origins


def link(job: Job, out: Path) -> str:
    return job.url or (quote(os.path.relpath(job.folder, out)) if job.folder else "")


ALWAYS = ("fold", "shot", "seed", "mIoU")


def facts_of(job: Job, found: Found) -> dict[str, str]:
    r = job.record
    backbone, episodes, training = (r.get(k) or {} for k in ("backbone", "episodes", "training"))
    facts = {
        **{k: job.setting.get(k) for k in ("fold", "shot", "seed")},
        "method": job.method,
        "mIoU": f"{r['test']['miou']:.2f}",
        "trained by": found.name_of(job.trained_by) if job.trained_by and not job.url else training.get("run"),
        "epochs": training.get("epochs"),
        "checkpoint": r.get("checkpoint", {}).get("selection"),
        "tuned at test on": r.get("tuned_at_test"),
        "commit": short(r.get("commit")),
        "commit of the training": short(training.get("commit")),
        "weights": f"{backbone.get('backbone')} {backbone.get('weights')}, from {backbone.get('source')}, "
        f"sha256 {str(backbone.get('sha256'))[:8]}",
        "test episodes": f"{episodes.get('test_episodes')}, list {str(episodes.get('episode_list_sha256'))[:8]}",
        "splits": episodes.get("splits"),
        "device": r.get("device"),
        "processes": r.get("processes"),
        **r.get("versions", {}),
    }
    return {k: str(v) for k, v in facts.items() if v is not None}


def short(commit: str | None) -> str | None:
    """The commit's first ten digits, and "+changes" if files differed from it."""
    return commit and commit[:10] + "+changes" * commit.endswith("+changes")
