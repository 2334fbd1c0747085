"""A run's results: results.json with everything needed to trust and repeat its numbers, and printed tables."""

import csv
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from datamodules import FewShotDataModule
from datamodules.episodes.sampler import list_hash
from experiments.files import read_json
from experiments.run.checkpoints import Checkpoint, lineage
from pmnet.methods import Method
from pmnet.replacing import replacing
from pmnet.training.module import TestResult

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "timm", "numpy", "pillow")

ABSENT = {  # scores of absent episodes -> their rows of the printed table
    "false_positive": "absent: pixels marked",
    "confused": "absent: pixels of the other class marked",
    "marked": "absent: images marked",
    "presence_accuracy": "presence accuracy",
    "presence_auroc": "presence AUROC",
}
ABSENT_COLUMNS = ["shown", "marked"]  # in episodes.csv: the class that is shown instead, percentage of pixels marked


def make(
    cfg: DictConfig,
    data: FewShotDataModule,
    network: Method,
    trainer: L.Trainer,
    lists: list[TestResult],
    untrained: TestResult | None,
    checkpoint: Checkpoint | None,
    clock: dict[str, float],
) -> dict[str, Any]:
    """The record of a run, as plain values.

    Args:
        lists: scores of each test list; the record has their means.
        untrained: scores of the network before training, if it was tested.
        checkpoint: the tested checkpoint; None for a method that learns nothing.
        clock: times in seconds at "start", "fit" (if it trained), "test" and "end".
    """
    names = data.test_classes
    choices = HydraConfig.get().runtime.choices
    baselines = mean([result.baselines for result in lists]) | ({"untrained": untrained.scores} if untrained else {})
    trained = checkpoint.record if checkpoint else {}
    learned = list(lineage(trained))
    known = checkpoint is None or (learned and all("base_classes" in record for record in learned))
    seen = {name for record in learned if known for name in data.seen(record["base_classes"], record["dataset"])}
    return {
        "mode": cfg.mode,
        "setting": {"target": data.target.name}
        | {g: choices[g] for g in ("task", "dataset", "backbone", "model")}
        | {"method": network.title or type(network).__name__}
        | {"fold": cfg.fold.index, "folds": 0 if cfg.fold.index == "all" else len(data.dataset.folds)}
        | {"shot": cfg.shot.k, "train_shot": cfg.train_shot, "seed": cfg.seed, "protocol": data.protocol.name}
        | {"published_protocol": network.protocol or None},
        "test": scores(mean([result.scores for result in lists]), names) | spread(data, lists),
        "baselines": {name: scores(raw, names) for name, raw in baselines.items()},
        "episodes": data.provenance,
        "backbone": network.backbone.provenance.as_dict(),
        "parameters": {"learnable": learnable(network), "frozen": frozen(network)},
        "checkpoint": checkpoint_record(checkpoint, data),
        "training": training_record(checkpoint),
        "tuned_at_test": network.tuned_on or None,  # what gradient steps at test use
        "tested_classes_seen_in_training": sorted(seen) if known else None,
        "seconds": {
            "fit": round(clock["test"] - clock["fit"], 1) if "fit" in clock else None,
            "test": round(clock["end"] - clock["test"], 1),
            "all": round(clock["end"] - clock["start"], 1),
        },
        "device": str(trainer.strategy.root_device),
        "processes": trainer.world_size,
    } | origin(cfg)


def checkpoint_record(checkpoint: Checkpoint | None, data: FewShotDataModule) -> dict[str, Any]:
    """Which checkpoint was tested and how it was selected; empty for a method that learns nothing."""
    if checkpoint is None:
        return {}
    chosen = checkpoint.path.name == "best.ckpt"
    validation = checkpoint.record.get("validation")
    return {
        "path": str(checkpoint.path),
        "selection": selection(validation, data) if chosen and validation else None,
        "val_miou": round(checkpoint.val_miou, 4) if chosen else None,
    }


def training_record(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """How the tested weights were trained; empty for a method that learns nothing.

    A checkpoint of a method's authors records nothing of its training but the file itself, a shipped head what it says.
    """
    if checkpoint is None:
        return {}
    if checkpoint.released:
        by = checkpoint.content.get("by", "the method's authors")
        return {**checkpoint.record, "run": str(checkpoint.path.absolute()), "by": by}
    commit = read_json(checkpoint.run / "training.json").get("commit")
    epochs, steps = checkpoint.content["epoch"] + 1, checkpoint.content["global_step"]
    return {"run": str(checkpoint.run), "commit": commit, "epochs": epochs, "steps": steps, **checkpoint.record}


def selection(validation: dict[str, Any], data: FewShotDataModule) -> str:
    """How the best epoch was selected."""
    best = f"the epoch with the best mIoU on {validation['episodes']} validation episodes of {validation['dataset']}"
    if (validation["dataset"], validation["classes"]) == (data.target.name, data.test_classes):
        return f"{best}, the first ones of the test list, on the same novel classes (the field's convention)"
    return f"{best}, on classes other than the tested ones"


def spread(data: FewShotDataModule, lists: list[TestResult]) -> dict[str, Any]:
    """Standard deviation (of a sample) and scores of each of several test lists; empty for a single one."""
    if len(lists) == 1:
        return {}
    rows: list[dict[str, Any]] = [
        {"seed": seed, "episode_list_sha256": list_hash(data.test_lists[seed])}
        | ({"absent_list_sha256": data.absent_hash(seed)} if data.absent else {})
        | {name: round(result.scores[name], 4) for name in ("miou", "fb_iou")}
        for seed, result in zip(data.test_seeds, lists, strict=True)
    ]
    return {"std": {n: round(stdev(row[n] for row in rows), 4) for n in ("miou", "fb_iou")}, "lists": rows}


def mean(values: list[Any]) -> Any:
    """The mean of numbers, of each entry of lists, or of each value of dicts with the same keys."""
    if isinstance(values[0], dict):
        return {name: mean([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [mean(list(entries)) for entries in zip(*values, strict=True)]
    return fmean(values)


def scores(raw: dict[str, Any], names: list[str]) -> dict[str, Any]:
    per_class = {name: round(iou, 4) for name, iou in zip(names, raw["iou_per_class"], strict=True)}
    absent = {name: round(score, 4) for name, score in raw.get("absent", {}).items()}
    found = {"miou": round(raw["miou"], 4), "fb_iou": round(raw["fb_iou"], 4), "iou_per_class": per_class}
    return found | ({"absent": absent} if absent else {})


def origin(cfg: DictConfig) -> dict[str, Any]:
    """The command, code and config behind a result."""
    return {
        "command": sys.argv,
        "versions": {"python": sys.version.split()[0]} | {p: version(p) for p in PACKAGES},
        "commit": commit(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }


def commit() -> str | None:
    """Git commit of this code, with "+changes" if files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        where = Path(__file__).parents[2]
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def learnable(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def frozen(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if not p.requires_grad)


def write_episodes(folder: Path, data: FewShotDataModule, lists: list[TestResult]) -> None:
    """Writes `episodes.csv`: one row for each test episode. Further lists get a file each, `episodes-seed1.csv`."""
    for seed, result in zip(data.test_seeds, lists, strict=True):
        name = "episodes.csv" if seed == data.protocol.seed else f"episodes-seed{seed}.csv"
        with replacing(folder / name) as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "class", "query", "supports", "iou", *(ABSENT_COLUMNS if data.absent else ())])
            for index, iou in sorted(result.episode_iou.items()):
                spec = data.test_lists[seed][index]
                name = data.target.classes[spec.class_id]
                writer.writerow([index, name, spec.query, json.dumps(spec.supports), f"{iou:.2f}"])
            for index, marked in sorted(result.absent_marked.items()):
                absent = data.absent_lists[seed][index - len(data.test_lists[seed])]
                name, shown = (data.target.classes[c] for c in (absent.class_id, absent.shown))
                row = [index, name, absent.query, json.dumps(absent.supports), "", shown, f"{marked:.2f}"]
                writer.writerow(row)


def print_setting(cfg: DictConfig, data: FewShotDataModule, network: Method) -> None:
    """Prints what is about to run: data, classes, backbone, learnable and frozen parameters."""
    made = network.backbone.provenance
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, dataset in (("dataset", data.dataset), ("validation", data.validation), ("target", data.target)):
        if what == "dataset" or dataset is not data.dataset:
            fold = f", fold {data.fold}" if what == "dataset" else ""
            lists = f" ({dataset.splits})" if cfg.mode == "train" or dataset is data.target else ""
            table.add_row(what, escape(f"{dataset.name}{fold}{lists}"))
    table.add_row("base classes", shorten(data.base_classes))
    table.add_row("tested classes", shorten(data.test_classes))
    seen = data.seen(data.base_classes, data.dataset.name)
    if seen and cfg.mode == "train":  # a checkpoint from elsewhere may have seen others: the results name them
        table.add_row("of these, trained on", shorten(seen))
    table.add_row("backbone", escape(f"{made.backbone}, weights {made.weights} ({made.source})"))
    table.add_row("parameters", f"{learnable(network):,} learnable, {frozen(network):,} frozen")
    console = Console(soft_wrap=True)
    console.print(table)
    seen = data.seen(made.trained_on.get("classes", ()), made.trained_on.get("dataset", ""))
    if seen:
        warning = "[bold yellow]The backbone was trained on novel classes of this fold:[/] "
        console.print(warning + escape(", ".join(seen)))


def shorten(names: list[str], most: int = 12) -> str:
    """The number of names and the first of them."""
    return escape(f"{len(names)}: " + ", ".join(names[:most]) + (", ..." if len(names) > most else ""))


def print_scores(record: dict[str, Any], folder: Path) -> None:
    """Prints the table at the end of a run."""
    setting, test = record["setting"], record["test"]
    columns = {"IoU": test} | {name.replace("_", " "): s for name, s in record["baselines"].items()}
    episodes = record["episodes"]["test_episodes"]
    between = setting["dataset"] + (
        f" -> {setting['target']}" if record["episodes"]["target"] != record["episodes"]["dataset"] else ""
    )
    table = Table(title=f"{between}, fold {setting['fold']}, {setting['shot']}-shot, {episodes} episodes")
    table.add_column("class")
    for name in columns:
        table.add_column(name, justify="right")
    for name in test["iou_per_class"]:
        table.add_row(escape(name), *(f"{c['iou_per_class'][name]:.1f}" for c in columns.values()))
    table.add_section()
    table.add_row("mIoU", *(f"[bold]{c['miou']:.1f}[/]" for c in columns.values()))
    if "std" in test:
        table.add_row(f"std over {len(test['lists'])} lists", f"{test['std']['miou']:.1f}")
    table.add_row("FB-IoU", *(f"{c['fb_iou']:.1f}" for c in columns.values()))
    if "absent" in test:
        table.add_section()
        for key, words in ABSENT.items():
            table.add_row(words, *(f"{c['absent'][key]:.1f}" for c in columns.values()))
    console = Console(soft_wrap=True)
    console.print(table)
    seen = record["tested_classes_seen_in_training"]
    if seen:
        console.print("[bold yellow]Tested classes that the network was trained on:[/] " + escape(", ".join(seen)))
    places = f"Results   {folder / 'results.json'}\nPictures  {folder / 'predictions'}"
    console.print(escape(places), highlight=False)
