"""report.html: one file that needs no other; and the same tables as Markdown, LaTeX and CSV beside it."""

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from PIL import Image

from experiments.report import figures, tables
from experiments.report.collect import Found, Job
from experiments.report.tables import Benchmark

STATES = ("finished", "failed", "unfinished", "not started")
WIDEST = 1400  # pixels of a panel on the page


def write(found: Found, out: Path) -> list[Benchmark]:
    """Writes report.{html,md,tex,csv} and figures/*.png to `out`; returns what was reported, by benchmark."""
    out.mkdir(parents=True, exist_ok=True)
    benchmarks = tables.benchmarks(found.finished)
    whole = [t(b) for b in benchmarks for t in (tables.miou, tables.fb_iou, tables.per_class)]
    replace(
        out / "report.md", "\n".join([f"# {title(found)}\n", *state_lines(found), "", *map(tables.markdown, whole)])
    )
    replace(out / "report.tex", "\n".join(map(tables.latex, whole)))
    replace(out / "report.csv", tables.tidy_csv(benchmarks))
    replace(out / "report.html", html(found, benchmarks, out))
    return benchmarks


def replace(path: Path, content: str | bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def title(found: Found) -> str:
    return (
        "Sweep " + ", ".join(s.folder.absolute().name for s in found.sweeps)
        if found.sweeps
        else "Few-shot segmentation"
    )


def state_lines(found: Found) -> list[str]:
    """What is there, what is missing and why."""
    counted = Counter(job.state for job in found.jobs)
    counts = {state: counted[state] for state in STATES if counted[state]}
    return [
        f"{', '.join(f'{n} {state}' for state, n in counts.items())} of {len(found.jobs)} runs",
        *missing(found),
        *found.notes,
    ]


def missing(found: Found) -> list[str]:
    lines = []
    for job in found.jobs:
        if job.state != "finished":
            why = f": {job.error.strip().splitlines()[0]}" if job.error else ""
            lines.append(f"{job.state}: {job.name}{why}")
    return lines


def html(found: Found, benchmarks: list[Benchmark], out: Path) -> str:
    drawn = Drawn(out / "figures")
    sections = []
    for i, b in enumerate(benchmarks):
        parts = SimpleNamespace(
            title=b.title, miou=tables.miou(b), fb_iou=tables.fb_iou(b), per_class=tables.per_class(b)
        )
        parts.figures = [("mIoU by fold", drawn.add(f"folds-{i}", figures.folds(b)))]
        parts.class_figures = [
            (f"IoU of each class, {s.name}", drawn.add(f"classes-{i}-{j}", figures.classes(b, s)))
            for j, s in enumerate(b.series)
        ]
        sections.append(parts)
    overall = {
        "All benchmarks": ("radar", figures.radar(benchmarks)),
        "Learning curves": ("curves", figures.curves(found.jobs)),
    }
    common, columns, origins = provenance(found.finished, out)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("page.html.j2").render(
        title=title(found),
        sweeps=found.sweeps,
        states=state_lines(found)[0],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        missing=missing(found),
        notes=found.notes,
        sections=sections,
        figures=[(heading, drawn.add(name, fig)) for heading, (name, fig) in overall.items() if fig],
        panels=list(panels(found.finished)),
        common=common,
        origin_columns=columns,
        origins=origins,
    )


class Drawn:
    """Writes figures to a folder, and gives them as the source of an <img>."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()

    def add(self, name: str, fig: Figure) -> str:
        png = io.BytesIO()
        fig.savefig(png, dpi=110)
        replace(self.folder / f"{name}.png", png.getvalue())
        return source(png.getvalue(), "png")


def source(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def panels(jobs: Iterable[Job]) -> Iterable[tuple[str, str]]:
    """Each run's overview of predictions, as JPEG no wider than the page."""
    for job in jobs:
        path = job.folder / "predictions" / "overview.png" if job.folder else None
        if path and path.is_file():
            with Image.open(path) as image:
                small = image.convert("RGB")
            small.thumbnail((WIDEST, 10 * WIDEST))
            jpeg = io.BytesIO()
            small.save(jpeg, "JPEG", quality=82)
            yield job.name, source(jpeg.getvalue(), "jpeg")


def provenance(jobs: list[Job], out: Path) -> tuple[str, list[str], list[SimpleNamespace]]:
    """What all runs share, in a line; and a row a run with the rest."""
    facts = [facts_of(job) for job in jobs]
    shared = {
        k: v for k, v in (facts[0].items() if facts else ()) if len(jobs) > 1 and all(f.get(k) == v for f in facts)
    }
    columns = [k for k in (facts[0] if facts else ()) if k not in shared]
    rows = [
        SimpleNamespace(
            name=job.name,
            link=os.path.relpath(job.folder, out) if job.folder else "",
            cells=[f.get(c, "") for c in columns],
            overrides=" ".join(job.overrides),
        )
        for job, f in zip(jobs, facts, strict=True)
    ]
    return "; ".join(f"{k} {v}" for k, v in shared.items()) or "nothing", ["run", *columns, "overrides"], rows


def facts_of(job: Job) -> dict[str, str]:
    r, commit = job.record, job.record.get("commit")
    backbone, drawn, training = (r.get(k, {}) for k in ("backbone", "episodes", "training"))
    facts = {
        **{k: job.setting.get(k) for k in ("fold", "shot", "seed")},
        "mIoU": f"{r['test']['miou']:.2f}",
        "trained by": job.trained_by.name if job.trained_by else None,
        "epochs": training.get("epochs"),
        "checkpoint": r.get("checkpoint", {}).get("selection"),
        "commit": commit and commit[:10] + "+changes" * commit.endswith("+changes"),
        "backbone": f"{backbone.get('backbone')}, weights {backbone.get('weights')} ({backbone.get('source')}, "
        f"sha256 {str(backbone.get('sha256'))[:8]})",
        "test episodes": f"{drawn.get('test_episodes')}, list {str(drawn.get('episode_list_sha256'))[:8]}",
        "splits": drawn.get("splits"),
        "device": f"{r.get('processes', 1)} x {r.get('device')}",
        "versions": ", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()),
    }
    return {k: str(v) for k, v in facts.items() if v is not None}
