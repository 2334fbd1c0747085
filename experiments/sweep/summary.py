"""The end of a sweep: a report on its jobs, and a W&B run with their means."""

import statistics
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from experiments.errors import UserError
from experiments.report.__main__ import show
from experiments.report.benchmarks import Benchmark, Series
from experiments.report.collect import collect
from experiments.report.page import state_lines, write
from experiments.report.tables import mean_of, number_columns


def sum_up(folder: Path, cfg: DictConfig) -> int:
    """Writes the report on a sweep; returns how many of its jobs did not finish."""
    try:
        found = collect([folder])
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(escape(str(error)), highlight=False)
        return 1
    if all(job.state == "not started" for job in found.jobs):
        return len(found.jobs)  # the error that stopped them was shown before
    benchmarks = write(found, folder / "report")
    show(found, benchmarks, folder / "report")
    if str(cfg.logger._target_).endswith("WandbLogger"):
        log_summary(folder, cfg, benchmarks, state_lines(found))
    return len(found.jobs) - len(found.finished)


def log_summary(folder: Path, cfg: DictConfig, benchmarks: list[Benchmark], state: list[str]) -> None:
    """Logs a sweep as one W&B run: a table of folds, means as the run's summary, figures and the HTML page.

    The table has one row for each configuration and shot, then one for each baseline and shot.
    """
    import wandb

    from experiments.wandb_logger import WandbLogger

    options = cast(dict[str, Any], OmegaConf.to_container(cfg.logger, resolve=False))
    for name in ("_target_", "name", "group", "job_type", "tags", "save_dir", "checkpoint"):
        options.pop(name, None)
    settings = [(b, s, shot) for b in benchmarks for s in (*b.series, *b.baselines) for shot in b.shots]
    rows = [line for setting in settings if (line := row(*setting))]
    folds = list(dict.fromkeys(f"{fold}" for b in benchmarks for k, fold in number_columns(b)[0] if fold != "mean"))
    numbers = [*(f"fold {f}" for f in folds), "miou", *(f"fold {f}, fb_iou" for f in folds), "fb_iou"]
    columns: list[str | int] = ["task", "dataset", "target", "backbone", "row", "shot", *numbers]
    name = folder.absolute().name
    logger = WandbLogger(
        save_dir=str(folder), name=f"summary of {name}", group="sweeps", job_type="summary", tags=["sweep"], **options
    )

    def send() -> None:
        run = logger.experiment
        run.config.update({"sweep": name})
        run.summary["jobs"] = state[0]
        if state[1:]:
            run.summary["missing"] = "\n".join(state[1:])
        run.log({"folds": wandb.Table(columns=columns, data=[[line.get(str(c)) for c in columns] for line in rows])})
        for line in rows:
            setting = "/".join(str(line[c]) for c in ("dataset", "target", "backbone", "row", "shot"))
            for key in ("miou", "fb_iou"):
                if line[key] is not None:
                    run.summary[f"mean/{key}/{setting}-shot"] = line[key]
        pictures = sorted((folder / "report" / "figures").glob("*.png"))
        run.log({f"report/{p.stem}": wandb.Image(str(p)) for p in pictures})
        run.save(str(folder / "report" / "report.html"), base_path=str(folder / "report"), policy="now")
        run.finish()

    logger.guard(send)


def row(b: Benchmark, s: Series, shot: int) -> dict[str, Any]:
    """A row of the table: the scores of each fold and their means, None if folds are missing; {} without runs."""
    if not any(k == shot for k, _ in s.runs):
        return {}
    line: dict[str, Any] = {"task": b.task, "dataset": b.dataset, "target": b.target, "backbone": b.backbone}
    line |= {"row": s.name, "shot": shot}
    for k, fold in number_columns(b)[0]:
        if k == shot and fold != "mean" and s.values(shot, fold, "miou"):
            line[f"fold {fold}"] = statistics.mean(s.values(shot, fold, "miou"))
            line[f"fold {fold}, fb_iou"] = statistics.mean(s.values(shot, fold, "fb_iou"))
    for key in ("miou", "fb_iou"):
        values = s.values(shot, "all", key) if b.folds == ["all"] else mean_of(s, b, shot, key)
        line[key] = statistics.mean(values) if values else None
    return line
