"""Reports on runs whose results are written by the test, so that every number is known."""

import base64
import copy
import csv
import io
import json
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from experiments.errors import UserError
from experiments.report import made
from experiments.report.benchmarks import benchmarks, same_name
from experiments.report.collect import collect, from_wandb
from experiments.report.figures import curves, read_curves
from experiments.report.page import missing, panels, write
from experiments.report.renderings import latex, markdown, rich_tables
from experiments.report.tables import absent, fb_iou, miou, per_class
from tests.conftest import ROOT, run_module

PUBLISHED = OmegaConf.to_container(OmegaConf.load(ROOT / "experiments" / "published.yaml"))
RECORD = {
    "mode": "train",
    "setting": {
        "task": "cross_category", "dataset": "pascal", "target": "pascal", "backbone": "resnet50", "model": "pmnet",
        "fold": 0, "folds": 4, "shot": 1, "train_shot": 1, "seed": 0,
    },
    "test": {},
    "baselines": {"all_foreground": {"miou": 20.0, "fb_iou": 10.0, "iou_per_class": {}}},
    "episodes": {"test_episodes": 1000, "episode_list_sha256": "e" * 64, "splits": "HSNet's lists"},
    "backbone": {"backbone": "resnet50", "weights": "a1h", "source": "timm", "sha256": "b" * 64},
    "parameters": {"learnable": 688_962, "frozen": 23_000_000},
    "checkpoint": {"selection": "the epoch with the best mIoU"},
    "training": {"epochs": 150, "steps": 9000},
    "device": "cuda:0",
    "processes": 1,
    "versions": {"torch": "2.9.0"},
    "commit": "0123456789abcdef",
    "config": {"optimizer": {"lr": 0.001}, "fold": {"index": 0}, "trainer": {"max_epochs": 150, "devices": 1}},
}  # fmt: skip


def write_run(folder: Path, fold=0, shot=1, ious=None, lr=0.001, curves=True, **setting) -> dict:
    """A finished run's folder; the mean over its classes is its mIoU."""
    record = copy.deepcopy(RECORD)
    record["setting"] |= {"fold": fold, "shot": shot} | setting
    number = 0 if fold == "all" else fold
    ious = ious or {"cat": 60.0 + number + shot, "dog": 61.5 + 2 * number}
    record["test"] = {
        "miou": statistics.mean(ious.values()),
        "fb_iou": 70.0 + number + shot / 10,
        "iou_per_class": ious,
    }
    record["training"]["run"] = str(folder)
    record["config"]["optimizer"]["lr"] = lr
    record["config"]["fold"]["index"] = fold
    begin(folder, [f"fold={fold}", f"shot={shot}"])
    (folder / "results.json").write_text(json.dumps(record))
    if curves:
        lines = ["epoch,step,train/loss,val/miou", "0,9,,50.0", "0,9,0.7,", "1,19,,55.5", "1,19,0.5,"]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "predictions").mkdir(exist_ok=True)
    Image.new("RGB", (300, 100), (number * 40, 90, 90)).save(folder / "predictions" / "overview.png")
    return record


def begin(folder: Path, overrides: list[str]) -> None:
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Path, dict]:
    """Four folds, two shots, as table 1 has them."""
    records = {}
    for i, (shot, fold) in enumerate((s, f) for s in (1, 5) for f in range(4)):
        records[shot, fold] = write_run(tmp_path / "sweep" / f"{i}-pascal-resnet50-fold{fold}-shot{shot}", fold, shot)
    jobs = [{"overrides": [f"fold={f}", f"shot={s}"]} for s, f in records]
    plan = {"command": ["run.py", "-m", "fold=0,1,2,3"], "started": "2026-01-31T12:00:00+00:00", "jobs": jobs}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(plan))
    return tmp_path / "sweep", records


def one(folder: Path):
    found = collect([folder])
    (benchmark,) = write(found, folder / "report")
    return found, benchmark


def tabled(folder: Path):
    """Without the figures, which take most of the time."""
    (benchmark,) = benchmarks(collect([folder]).tested)
    return benchmark


def cells(text: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell, without bold."""
    rows = [
        [c.strip().replace("**", "") for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
def test_table_has_our_numbers_the_published_ones_and_the_difference(sweep) -> None:
    folder, records = sweep
    _, benchmark = one(folder)
    rows = cells(markdown(miou(benchmark)))
    assert rows["method"] == [
        f"{s}-shot {w}" for s in (1, 5) for w in ("fold 0", "fold 1", "fold 2", "fold 3", "mean")
    ] + ["params (M)"]
    exact = []
    for shot in (1, 5):
        values = [records[shot, fold]["test"]["miou"] for fold in range(4)]
        exact += [*values, sum(values) / 4]
    assert rows["PMNet, ours"] == [*(f"{v:.1f}" for v in exact), "0.69"]
    printed = {}
    for entry in PUBLISHED:
        if (entry["dataset"], entry["target"], entry["backbone"], entry["table"]) == (
            "pascal",
            "pascal",
            "resnet50",
            1,
        ):
            printed.setdefault(entry["method"], {})[entry["shot"]] = [*entry["folds"], entry["miou"]]
    for method, shots in printed.items():
        (row,) = [r for name, r in rows.items() if re.fullmatch(rf"{method}( \(.*\))?", name)]
        assert [float(c) for c in row[:-1]] == shots[1] + shots[5]
    difference = [a - b for a, b in zip(exact, printed["PMNet"][1] + printed["PMNet"][5], strict=True)]
    assert [float(c) for c in rows["against published"][:-1]] == pytest.approx(difference, abs=0.05001)
    assert rows["everything marked as foreground"][:5] == ["20.0"] * 5
    assert sum(row.kind == "baseline" for row in miou(benchmark).rows) == 1
    assert len(printed) == 11


def floors(fold: int, shot: int, **more: float) -> dict[str, dict]:
    """Baselines as a run records them, with a value for each fold and shot."""
    values = {"prototype": 30.0 + fold + shot / 10, "nearest": 40.25 + 3 * fold, **more}
    return {name: {"miou": v, "fb_iou": v + 20, "iou_per_class": {"cat": v}} for name, v in values.items()}


def baseline_cells(table) -> dict[str, list[str]]:
    return {row.cells[0]: row.cells[1:] for row in table.rows if row.kind == "baseline"}


def test_every_baseline_has_a_row_in_every_rendering(sweep) -> None:
    folder, _ = sweep
    for path in folder.glob("*/results.json"):
        setting = json.loads(path.read_text())["setting"]
        alter(path.parent, baselines=floors(setting["fold"], setting["shot"]))
    _, benchmark = one(folder)
    names = ["everything marked as foreground", "prototype, training-free", "nearest, training-free"]
    for table, added in ((miou(benchmark), 0), (fb_iou(benchmark), 20)):
        rows = baseline_cells(table)
        assert list(rows) == names
        for name in ("prototype", "nearest"):
            expected = []
            for shot in (1, 5):
                values = [floors(fold, shot)[name]["miou"] + added for fold in range(4)]
                expected += [f"{v:.1f}" for v in [*values, sum(values) / 4]]
            assert rows[f"{name}, training-free"][:10] == expected
        assert not any(row.best for row in table.rows if row.kind == "baseline")
    texts = {name: (folder / "report" / name).read_text() for name in ("report.html", "report.md", "report.tex")}
    texts["csv"] = (folder / "report" / "tables" / "miou-cross_category-pascal-resnet50.csv").read_text()
    for text in texts.values():
        assert text.count("prototype, training-free") == (1 if text is texts["csv"] else 2)
    for line in csv.DictReader(io.StringIO((folder / "report" / "report.csv").read_text())):
        known = floors(int(line["fold"]), int(line["shot"]))
        assert float(line["baselines/nearest/fb_iou"]) == known["nearest"]["fb_iou"]
        assert float(line["baselines/prototype/miou"]) == known["prototype"]["miou"]


def test_floors_say_which_weights_where_those_differ(tmp_path: Path) -> None:
    for fold in range(4):
        for i, weights in enumerate(("a1h", "v2")):
            write_run(tmp_path / f"{i}-{fold}", fold)
            alter(tmp_path / f"{i}-{fold}", backbone={"weights": weights})
            alter(tmp_path / f"{i}-{fold}", baselines=floors(fold + 10 * i, 1))
    write_run(tmp_path / "9-old", 0)  # recorded without floors
    alter(tmp_path / "9-old", backbone={"weights": "old"})
    rows = baseline_cells(miou(tabled(tmp_path)))
    assert list(rows) == ["everything marked as foreground"] + [
        f"{name}, training-free, weights {weights}" for name in ("prototype", "nearest") for weights in ("a1h", "v2")
    ]
    assert rows["prototype, training-free, weights v2"][:4] == [f"{40.1 + fold:.1f}" for fold in range(4)]
    assert rows["everything marked as foreground"][:5] == ["20.0"] * 5


def under(folder: Path, protocol: str, fold: int, ious: dict[str, float], seed: int = 0, **test: object) -> None:
    record = write_run(folder, fold, ious=ious, seed=seed)
    rules = {"episodes": record["episodes"] | {"protocol": {"name": protocol}}}
    floor = {"all_foreground": {"miou": 5.0 * len(protocol), "fb_iou": 1.0, "iou_per_class": {}}}
    alter(folder, test=record["test"] | test, baselines=floor, **rules)


def test_a_network_under_several_protocols_has_their_differences_and_floors(tmp_path: Path) -> None:
    """Over two seeds and two of four folds: a difference is that of the means over the seeds."""
    for seed in (0, 1):
        for fold in (0, 1):
            under(tmp_path / f"a{seed}{fold}", "hsnet", fold, {"cat": 40.0 + fold + 2 * seed}, seed)
            under(tmp_path / f"b{seed}{fold}", "ssp", fold, {"cat": 43.5 + fold + 4 * seed}, seed)
    (tmp_path / "other").mkdir()
    under(tmp_path / "other" / "c", "pfenet", 0, {"cat": 30.0})
    alter(tmp_path / "other" / "c", config={"optimizer": {"lr": 1}})  # another network: nothing to compare it with
    table = miou(tabled(tmp_path))
    rows = {row.cells[0]: row.cells[1:] for row in table.rows}
    assert [name for name in rows if name.startswith("  against")] == ["  against published", "  against hsnet"]
    assert rows["  against hsnet"] == ["+4.5", "+4.5", "-", "-", "-", ""]
    floors = {name: cells[0] for name, cells in baseline_cells(table).items()}
    assert floors == {f"everything marked as foreground, protocol={name}": value
                      for name, value in (("hsnet", "25.0"), ("ssp", "15.0"), ("pfenet", "30.0"))}  # fmt: skip


def test_absent_scores_have_a_table_that_says_which_folds_it_is_over(tmp_path: Path) -> None:
    scores = {"false_positive": 4.0, "confused": 9.0, "marked": 50.0, "presence_auroc": 80.0, "presence_accuracy": 75.0}
    write_run(tmp_path / "none" / "0")
    assert absent(tabled(tmp_path / "none")) is None
    for fold in range(4):
        given = {"absent": {name: score + 4 * fold for name, score in scores.items()}} if fold < 2 else {}
        under(tmp_path / "some" / str(fold), "hsnet", fold, {"cat": 40.0}, **given)
    benchmark = tabled(tmp_path / "some")
    table = absent(benchmark)
    assert table.columns[1:4] == ["1-shot pixels marked", "1-shot other class marked", "1-shot images marked"]
    assert [row.cells for row in table.rows] == [["PMNet, ours", "6.0", "11.0", "52.0", "77.0", "82.0"]]
    assert "PMNet, ours, 1-shot: over fold 0, 1 alone." in table.notes
    write(collect([tmp_path / "some"]), tmp_path / "out")
    for name in ("report.html", "report.md", "report.tex", "tables/absent-cross_category-pascal-resnet50.csv"):
        assert "77.0" in (tmp_path / "out" / name).read_text(), name


def test_the_deviation_over_test_lists_is_told(tmp_path: Path) -> None:
    for fold in range(2):
        under(tmp_path / str(fold), "ssp", fold, {"cat": 40.0}, std={"miou": 0.75 + fold, "fb_iou": 3.0})
    assert any("over the lists: 1-shot fold 0 0.8, 1-shot fold 1 1.8" in note for note in tabled(tmp_path).notes)


def test_an_untrained_network_is_a_baseline_of_its_series_with_its_seeds(tmp_path: Path) -> None:
    for lr in (0.001, 0.01):
        for seed, value in enumerate((10.0, 14.0)):
            write_run(tmp_path / f"{lr}-{seed}", 0, lr=lr, seed=seed)
            alter(tmp_path / f"{lr}-{seed}", baselines=floors(0, 1, untrained=value + 1000 * lr))
    rows = baseline_cells(miou(tabled(tmp_path)))
    for lr in (0.001, 0.01):
        cell = rows[f"before training, PMNet, ours, optimizer.lr={lr}"][0]
        assert cell == f"{12 + 1000 * lr:.1f} ± {statistics.stdev([10, 14]):.1f}"
    assert rows["prototype, training-free"][0] == "30.1", "floors have no seed"


def test_floors_that_differ_between_runs_are_noted(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / str(seed), 0, seed=seed)
        alter(tmp_path / str(seed), baselines=floors(0, 1, prototype=30.0 + seed))
    table = miou(tabled(tmp_path))
    assert [note.split(":")[0] for note in table.notes if "scores differ between runs" in note] == [
        "prototype, training-free"
    ]


def write_training_free(folder: Path, model: str, fold: int, lr: float = 0.001, **change) -> None:
    """A run of a method that learns nothing: its training and checkpoint are empty."""
    write_run(folder, fold, lr=lr, model=model, method=model.capitalize(), curves=False)
    record = json.loads((folder / "results.json").read_text())
    record |= {"training": {}, "checkpoint": {}, "parameters": {"learnable": 0}} | change
    record["config"]["model"] = {"_target_": f"pmnet.{model.capitalize()}", "layer": "layer3"}
    (folder / "results.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_methods_that_learn_nothing_are_rows_without_options_of_training(sweep) -> None:
    folder, _ = sweep
    for fold in range(4):
        write_training_free(folder / f"2{fold}-prototype", "prototype", fold, lr=fold)
    write_training_free(folder / "30-nearest", "nearest", 0, mode="test")
    write_run(folder / "40-lr", 0, lr=0.01)
    found, benchmark = one(folder)
    assert not missing(found)
    assert [s.name for s in benchmark.series] == [
        "PMNet, ours, optimizer.lr=0.001", "Prototype, ours", "Nearest, ours", "PMNet, ours, optimizer.lr=0.01",
    ]  # fmt: skip
    rows = cells(markdown(miou(benchmark)))
    assert rows["Prototype, ours"][3] != "-"
    assert rows["Prototype, ours"][-1] == "0.00"
    lines = list(csv.DictReader(io.StringIO((folder / "report" / "report.csv").read_text())))
    assert [line["method"] for line in lines if not line["trained_by"]] == ["Prototype"] * 4 + ["Nearest"]
    (legend,) = curves(found).legends
    assert len(legend.get_texts()) == 9, "one curve for each training"


def test_only_methods_that_learn_nothing(tmp_path: Path) -> None:
    write_training_free(tmp_path / "0", "prototype", 0, baselines=floors(0, 1, untrained=30.1))
    write_training_free(tmp_path / "1", "prototype", 1, mode="test")
    found, benchmark = one(tmp_path)
    assert [s.name for s in benchmark.series] == ["Prototype, ours"]
    assert not any("before training" in name for name in baseline_cells(miou(benchmark)))
    assert curves(found) is None


def test_each_method_is_compared_with_its_own_published_numbers(sweep) -> None:
    folder, _ = sweep
    measured = {}
    for model, method in (("hsnet", "HSNet"), ("pmnet_release", "PMNet"), ("newer", "Newer")):
        for fold in range(4):
            record = write_run(folder / f"{model}-{fold}", fold, 1, {"cat": 50.0 + fold}, model=model, method=method)
            measured[fold] = record["test"]["miou"]
    table = miou(tabled(folder))
    shown = [row for row in table.rows if row.kind in ("ours", "difference")]
    assert [row.cells[0].strip() for row in shown] == [
        "PMNet, ours", "against published", "HSNet, ours", "against published",
        "Newer, ours", "PMNet (release), ours", "against published",
    ]  # fmt: skip
    for place, method in ((3, "HSNet"), (6, "PMNet")):
        (entry,) = [
            e for e in PUBLISHED
            if (e["table"], e["dataset"], e["backbone"], e["method"], e["shot"]) == (1, "pascal", "resnet50", method, 1)
        ]  # fmt: skip
        expected = [measured[fold] - entry["folds"][fold] for fold in range(4)]
        expected.append(statistics.mean(measured.values()) - entry["miou"])
        assert [float(c) for c in shown[place].cells[1:6]] == pytest.approx(expected, abs=0.0501)


def test_the_chosen_floors_tell_no_rows_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "1", 1)
    alter(tmp_path / "1", config={"floors": {"prototype": {"layer": "layer3"}}})
    assert len(tabled(tmp_path).series) == 1


@pytest.mark.parametrize(
    "a, b, same",
    [("HSNet-HM", "hsnet_hm", True), ("RPMMs", "RPMMS", True), ("VAT", "vat", True), ("VAT", "VAT-HM", False)],
)
def test_names_of_a_method(a: str, b: str, same: bool) -> None:
    assert same_name(a, b) == same


def test_best_published_and_best_of_all_are_bold(sweep) -> None:
    folder, _ = sweep
    write_run(folder / "0-pascal-resnet50-fold0-shot1", 0, 1, {"cat": 99.0})
    table = miou(tabled(folder))
    bold = {row.cells[0] for row in table.rows if 1 in row.best}
    assert bold == {"IPMT (NeurIPS'22)", "PMNet, ours"}


def test_csv_has_every_run_unrounded(sweep) -> None:
    folder, records = sweep
    one(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "report" / "report.csv").read_text())))
    assert {(int(r["shot"]), int(r["fold"])): (float(r["miou"]), float(r["fb_iou"])) for r in rows} == {
        key: (r["test"]["miou"], r["test"]["fb_iou"]) for key, r in records.items()
    }
    assert {r["commit"] for r in rows} == {"0123456789abcdef"}


@pytest.mark.slow
def test_fb_iou_and_classes(sweep) -> None:
    folder, records = sweep
    _, benchmark = one(folder)
    assert cells(markdown(fb_iou(benchmark)))["PMNet, ours"][4] == f"{70 + 1.5 + 0.1:.1f}"
    table = per_class(benchmark)
    shown = {(row.cells[0], int(row.cells[1])): row.cells[2:] for row in table.rows}
    for (shot, fold), record in records.items():
        for name, iou in record["test"]["iou_per_class"].items():
            assert shown[name, fold][(1, 5).index(shot)] == f"{iou:.1f}"
    assert len(shown) == 8


@pytest.mark.slow
def test_latex_has_the_cells_of_markdown_and_compiles(sweep, tmp_path: Path) -> None:
    folder, _ = sweep
    write_run(folder / "9-odd", 0, 1, {"100% c_l#s&s $x$ {y} ~^\\": 50.0}, target="fss", task="cross_dataset", folds=0)
    found = collect([folder])
    first, *_ = write(found, folder / "report")
    text = latex(miou(first))
    lines = [line for line in text.splitlines() if "&" in line]
    assert {line.count("&") for line in lines} == {11}
    plain = [re.sub(r"\\textbf{(.*?)}|\$(.*?)\$", r"\1\2", line).removesuffix(r" \\").split(" & ") for line in lines]
    assert [row[1:] for row in plain] == list(cells(markdown(miou(first))).values())[:1] + [
        r.cells[1:] for r in miou(first).rows
    ]
    assert r"100\% c\_l\#s\&s \$x\$ \{y\}" in (folder / "report" / "report.tex").read_text()
    if shutil.which("pdflatex"):
        body = (folder / "report" / "report.tex").read_text()
        (tmp_path / "t.tex").write_text(
            f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{body}\\end{{document}}"
        )
        subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_partial_sweep_says_what_is_missing(sweep) -> None:
    folder, records = sweep
    shutil.rmtree(folder / "7-pascal-resnet50-fold3-shot5")
    (folder / "6-pascal-resnet50-fold2-shot5" / "results.json").unlink()
    failed = folder / "5-pascal-resnet50-fold1-shot5"
    (failed / "results.json").unlink()
    (failed / "failure.json").write_text(json.dumps({"error": "The loss is nan.\nMore.", "traceback": None}))
    found, benchmark = one(folder)
    assert missing(found) == [
        "failed: 5-pascal-resnet50-fold1-shot5: The loss is nan.",
        "unfinished: 6-pascal-resnet50-fold2-shot5",
        "not started: fold=3 shot=5",
    ]
    table = miou(benchmark)
    row = cells(markdown(table))["PMNet, ours"]
    only = records[5, 0]["test"]["miou"]
    assert row[5:10] == [f"{only:.1f}", "-", "-", "-", "-"]
    assert any(
        f"1 of 4 folds (missing: 1, 2, 3); the mean over the folds found is {only:.1f}" in note for note in table.notes
    )
    page = (folder / "report" / "report.html").read_text()
    assert "5 finished, 1 failed, 1 unfinished, 1 not started of 8 runs" in page
    assert "The loss is nan." in page


def test_seeds_are_averaged_and_their_spread_is_shown(sweep) -> None:
    folder, records = sweep
    for fold in range(4):
        write_run(folder / f"1{fold}-seed1", fold, 1, {"cat": 50.0 + fold, "dog": 60.0}, seed=1)
    table = miou(tabled(folder))
    row = cells(markdown(table))["PMNet, ours"]
    first = [records[1, fold]["test"]["miou"] for fold in range(4)]
    second = [(110.0 + fold) / 2 for fold in range(4)]
    for cell, values in zip(row[:4], zip(first, second, strict=True), strict=True):
        assert cell == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    means = [statistics.mean(first), statistics.mean(second)]
    assert row[4] == f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}"
    assert any("2 seeds" in note for note in table.notes)


def test_of_two_runs_of_one_setting_the_newer_counts(sweep) -> None:
    folder, _ = sweep
    write_run(folder / "11-again", 0, 1, {"cat": 33.0})
    os.utime(folder / "11-again" / "results.json", (2e9, 2e9))
    table = miou(tabled(folder))
    assert cells(markdown(table))["PMNet, ours"][0] == "33.0"
    assert any(note.startswith("11-again replaces 0-") for note in table.notes)


def test_configurations_are_named_by_what_differs(sweep) -> None:
    folder, _ = sweep
    for fold in range(4):
        write_run(folder / f"2{fold}-lr", fold, 1, {"cat": 40.0}, lr=0.01)
    rows = cells(markdown(miou(tabled(folder))))
    assert {name for name in rows if "ours" in name} == {
        "PMNet, ours, optimizer.lr=0.001",
        "PMNet, ours, optimizer.lr=0.01",
    }
    assert rows["PMNet, ours, optimizer.lr=0.01"][4] == "40.0"


@pytest.mark.slow
def test_mixed_folder_has_a_table_for_each_benchmark_and_old_results_are_read(sweep) -> None:
    folder, _ = sweep
    write_run(folder / "20-isic", "all", 1, {"lesion": 44.44}, task="cross_domain", target="isic", folds=0)
    old = {
        "mode": "test",
        "setting": {"dataset": "coco", "fold": 1},
        "test": {"miou": 30.0, "fb_iou": 60.0, "iou_per_class": {"cat": 30.0}},
    }
    begin(folder / "21-old", [])
    (folder / "21-old" / "results.json").write_text(json.dumps(old))
    made = write(collect([folder]), folder / "report")
    assert [(b.dataset, b.target) for b in made] == [("pascal", "pascal"), ("pascal", "isic"), ("coco", "coco")]
    isic = cells(markdown(miou(made[1])))
    assert isic["PMNet, ours"][0] == "44.4"
    assert isic["HSNet (ICCV'21)"][0] == "31.2"
    assert (folder / "report" / "figures" / "radar.png").exists()


@pytest.mark.slow
def test_folder_that_is_being_written_to(sweep) -> None:
    folder, _ = sweep
    job = folder / "0-pascal-resnet50-fold0-shot1"
    (job / "results.json").write_text('{"mode": "train", "sett')
    (folder / "3-pascal-resnet50-fold3-shot1" / "metrics.csv").write_text(
        "epoch,step,train/loss,val/miou\n0,9,,41.5\n1,1"
    )
    found, _ = one(folder)
    assert any("results.json cannot be read" in note for note in found.notes)
    assert read_curves(folder / "3-pascal-resnet50-fold3-shot1")["val/miou"] == {0: 41.5}


def test_curves_of_an_interrupted_training_are_put_together(tmp_path: Path) -> None:
    head = "epoch,step,train/loss,val/miou\n"
    (tmp_path / "metrics-of-0-other.csv").write_text(head + "0,9,,1.0\n")
    (tmp_path / "metrics-1.csv").write_text(head + "1,9,,2.0\n2,9,,9.0\n")
    (tmp_path / "metrics.csv").write_text(head + "2,9,,3.0\n3,9,0.25,\n")
    assert read_curves(tmp_path) == {"val/miou": {0: 1.0, 1: 2.0, 2: 3.0}, "train/loss": {3: 0.25}}


def alter(folder: Path, **parts) -> None:
    """Changes a run's record; a part that is a dictionary is added to."""
    record = json.loads((folder / "results.json").read_text())
    for name, part in parts.items():
        record[name] = record.get(name, {}) | part if isinstance(part, dict) else part
    (folder / "results.json").write_text(json.dumps(record))


def ours(folder: Path) -> dict[str, list[str]]:
    rows = cells(markdown(miou(tabled(folder))))
    return {name: row for name, row in rows.items() if "ours" in name}


def test_a_line_half_written_is_no_value(tmp_path: Path) -> None:
    """Cut off, 61.2 reads as 6 and epoch 12 as 1."""
    head = "epoch,step,train/loss,val/miou\n10,9,,55.0\n"
    for rest, values in {"11,19,,6": {10: 55.0}, "11,19,,61.2\n1": {10: 55.0, 11: 61.2}}.items():
        (tmp_path / "metrics.csv").write_text(head + rest)
        assert read_curves(tmp_path)["val/miou"] == values


def test_runs_of_one_name_in_two_sweeps_stay_apart(tmp_path: Path) -> None:
    for sweep, iou in (("a", 40.0), ("b", 50.0)):
        write_run(tmp_path / sweep / "0-fold0", 0, 1, {"cat": iou}, seed=int(iou))
    found = collect([tmp_path, tmp_path / "a"])
    assert [job.name for job in found.jobs] == ["a/0-fold0", "b/0-fold0"]
    (legend,) = curves(found).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/0-fold0", "b/0-fold0"]


def test_a_sweep_that_was_moved_keeps_its_curves(sweep, tmp_path: Path) -> None:
    folder, _ = sweep
    alter(folder / "4-pascal-resnet50-fold0-shot5", training={"run": str(folder / "0-pascal-resnet50-fold0-shot1")})
    (folder / "4-pascal-resnet50-fold0-shot5" / "metrics.csv").unlink()
    found = collect([shutil.move(folder, tmp_path / "moved")])
    assert [job.trained_by.name[0] for job in found.jobs] == list("01230567")
    assert len(curves(found).axes[0].lines) == 7


@pytest.mark.slow
def test_files_cut_off_are_passed_over(sweep) -> None:
    folder, records = sweep
    (folder / "0-pascal-resnet50-fold0-shot1" / "predictions" / "overview.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "1-pascal-resnet50-fold1-shot1" / ".hydra" / "overrides.yaml").write_text("- 'fold=1\n- [")
    (folder / "2-pascal-resnet50-fold2-shot1" / "results.json").write_text('{"setting": {"dataset": "x"}, "test": {}}')
    found, benchmark = one(folder)
    assert len(panels(found.tested)) == 6
    row = cells(markdown(miou(benchmark)))["PMNet, ours"]
    assert row[:3] == [f"{records[1, fold]['test']['miou']:.1f}" for fold in (0, 1)] + ["-"]
    assert any(note.startswith("2-pascal-resnet50-fold2-shot1: results.json") for note in found.notes)


def test_nothing_of_others_is_removed_from_the_folder_of_the_report(sweep, tmp_path: Path) -> None:
    folder, _ = sweep
    (tmp_path / "paper" / "figures").mkdir(parents=True)
    (tmp_path / "paper" / "figures" / "mine.png").write_text("mine")
    write(collect([folder]), tmp_path / "paper")
    assert (tmp_path / "paper" / "figures" / "mine.png").read_text() == "mine"
    assert not list(tmp_path.rglob("*.part"))


def test_equal_to_the_published_is_no_minus(sweep) -> None:
    folder, _ = sweep
    write_run(folder / "0-pascal-resnet50-fold0-shot1", 0, 1, {"cat": 67.28})
    assert cells(markdown(miou(tabled(folder))))["against published"][0] == "+0.0"


def test_a_mean_needs_one_seed_with_all_folds(tmp_path: Path) -> None:
    for fold in range(4):
        write_run(tmp_path / f"{fold}", fold, 1, seed=fold % 2)
    table = miou(tabled(tmp_path))
    assert cells(markdown(table))["PMNet, ours"][4] == "-"
    assert any("no seed has all folds" in note for note in table.notes)


def test_how_many_folds_there_are_is_asked_of_old_results(tmp_path: Path) -> None:
    for dataset in ("synthetic", "pascal"):
        write_run(tmp_path / dataset / "0", 0, dataset=dataset, target=dataset)
        write_run(tmp_path / dataset / "1", 1, dataset=dataset, target=dataset)
        for path in (tmp_path / dataset).glob("*/results.json"):
            record = json.loads(path.read_text())
            del record["setting"]["folds"]
            path.write_text(json.dumps(record))
    pascal, synthetic = map(miou, benchmarks(collect([tmp_path]).tested))
    assert cells(markdown(pascal))["PMNet, ours"][4] == "-"
    assert not any("not recorded" in note for note in pascal.notes)
    assert cells(markdown(synthetic))["PMNet, ours"][2] != "-"
    assert any("not recorded" in note for note in synthetic.notes)


def test_networks_of_folds_and_of_everything_are_not_averaged(sweep) -> None:
    folder, records = sweep
    write_run(folder / "8-all", "all", 1, {"cat": 90.0})
    rows = cells(markdown(miou(tabled(folder))))
    assert rows["method"][3:6] == ["1-shot fold 3", "1-shot mean", "1-shot fold all"]
    mean = statistics.mean(records[1, fold]["test"]["miou"] for fold in range(4))
    assert rows["PMNet, ours"][4:6] == [f"{mean:.1f}", "90.0"]
    assert rows["HSNet (ICCV'21)"][4:6] == ["64.0", "-"]


def test_a_test_of_trained_weights_is_in_the_row_of_their_training(sweep) -> None:
    """The config of a test says nothing of the training: neither a row of its own nor its rate is true."""
    folder, _ = sweep
    given = {"run": str(folder / "0-pascal-resnet50-fold0-shot1")}
    alter(folder / "4-pascal-resnet50-fold0-shot5", mode="test", training=given, config={"optimizer": {"lr": 7.0}})
    assert list(ours(folder)) == ["PMNet, ours"]
    alter(folder / "4-pascal-resnet50-fold0-shot5", training={"run": "/gone/run"})
    assert len(ours(folder)) == 2
    assert not any("7.0" in name for name in ours(folder))


def test_the_last_checkpoint_does_not_replace_the_best(sweep) -> None:
    folder, records = sweep
    write_run(folder / "9-last", 0, 1, {"cat": 11.0})
    alter(folder / "9-last", mode="test", checkpoint={"path": "/x/checkpoints/last.ckpt"})
    rows = ours(folder)
    assert rows["PMNet, ours, checkpoint=last"][0] == "11.0"
    assert rows["PMNet, ours, checkpoint=best"][0] == f"{records[1, 0]['test']['miou']:.1f}"


def test_backbones_taught_for_each_fold_are_one_row(sweep) -> None:
    folder, _ = sweep
    for path in folder.glob("*/results.json"):
        weights = f"outputs/{path.parent.name}/backbone.safetensors"
        own = {"weights": weights, "trained_on": {"dataset": "pascal"}}
        alter(path.parent, backbone=own, config={"backbone": {"weights": weights}})
    assert list(ours(folder)) == ["PMNet, ours"]
    write_run(folder / "9-a1h", 0, 1, {"cat": 50.0})
    assert set(ours(folder)) == {"PMNet, ours, weights a1h", "PMNet, ours, weights pretrained on pascal"}


def test_a_model_is_named_and_what_follows_from_it_is_not(sweep) -> None:
    folder, _ = sweep
    for path in folder.glob("*/results.json"):
        alter(path.parent, config={"model": {"norm": "batch", "linear_heads": False}})
    write_run(folder / "9-dam", 0, 1, {"cat": 50.0}, model="dam")
    alter(folder / "9-dam", config={"model": {"norm": "group", "linear_heads": True}})
    rows = cells(markdown(miou(tabled(folder))))
    assert {name for name in rows if "ours" in name} == {"PMNet, ours", "dam, ours"}
    alter(folder / "9-dam", setting={"method": "PMNet"})
    table = miou(tabled(folder))
    names = [row.cells[0].strip() for row in table.rows if row.kind in ("ours", "difference")]
    assert names == ["PMNet, ours", "against published", "PMNet (dam), ours"], "no numbers of DAM are published"


def test_two_folders_of_ones_own_are_two_benchmarks(tmp_path: Path) -> None:
    for i, root in enumerate(("/data/cats", "/data/moss")):
        write_run(tmp_path / str(i), 0, 1, {"x": 10.0 + i}, dataset="folder", target="folder")
        alter(tmp_path / str(i), config={"dataset": {"root": root}, "target": None})
    found = benchmarks(collect([tmp_path]).tested)
    assert [(b.dataset, b.target) for b in found] == [("folder cats",) * 2, ("folder moss",) * 2]


@pytest.mark.parametrize("record", [{"mode": "pretrain", "backbone": "backbone.pt"}, {"mode": "predict"}])
def test_a_run_without_a_test_is_finished_without_numbers(sweep, record: dict[str, str]) -> None:
    folder, _ = sweep
    before = ours(folder)
    begin(folder / "8-small", ["experiment=pretrain_backbone", "fold=0"])
    (folder / "8-small" / "results.json").write_text(json.dumps(record))
    plan = json.loads((folder / "sweep.json").read_text())
    plan["jobs"].append({"overrides": ["experiment=pretrain_backbone", "fold=0"]})
    (folder / "sweep.json").write_text(json.dumps(plan))
    found = collect([folder])
    assert (len(found.jobs), len(found.finished), len(found.tested)) == (9, 9, 8)
    assert ours(folder) == before


def test_a_narrow_terminal_breaks_no_number(sweep) -> None:
    folder, _ = sweep
    for fold in range(4):
        write_run(folder / f"1{fold}-seed1", fold, 1, {"cat": 50.0 + fold, "dog": 60.0}, seed=1)
    table = miou(tabled(folder))
    for width in (60, 80, 120, 250):
        console = Console(file=io.StringIO(), width=width)
        console.print(*rich_tables(table, width), sep="\n")
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        shown = [c.strip() for line in lines if "\N{BOX DRAWINGS LIGHT VERTICAL}" in line for c in line.split("│")]
        for row in table.rows:
            for cell in row.cells[1:]:
                assert cell in shown


def test_rows_that_latex_takes_for_arguments(sweep) -> None:
    folder, _ = sweep
    write_run(folder / "0-pascal-resnet50-fold0-shot1", 0, 1, {"[red] car": 50.0, "*": 40.0})
    text = latex(per_class(tabled(folder)))
    assert not re.search(r"\\\\\s*[\[*]", text)
    assert "{[}red{]} car & 0 & 50.0" in text


def test_markdown_of_a_failure_is_a_list_without_markup(sweep) -> None:
    folder, _ = sweep
    (folder / "0-pascal-resnet50-fold0-shot1" / "failure.json").write_text('{"error": "<b>x</b> | y_z"}')
    one(folder)
    text = (folder / "report" / "report.md").read_text()
    assert r"- failed: 0-pascal-resnet50-fold0-shot1: \<b\>x\</b\> \| y\_z" in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (folder / "report" / name).is_file()


def stored_run(number: int, record: dict | None, state: str = "finished", job_type: str = "cross_category"):
    """As wandb.Api gives a run, with its files."""

    def download(root: str, replace: bool) -> None:
        Path(root).mkdir(parents=True)
        (Path(root) / "results.json").write_text(json.dumps(record))

    files = [SimpleNamespace(name="results.json", download=download)] if record else []
    return SimpleNamespace(
        id=f"id{number}", name=f"run{number}", state=state, job_type=job_type, files=lambda: files,
        url=f"https://wandb.ai/team/pmnet/runs/id{number}",
    )  # fmt: skip


@pytest.mark.slow
def test_runs_of_a_wandb_group(sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, records = sweep
    group = [stored_run(fold, records[1, fold]) for fold in range(3)]
    group += [stored_run(3, None, "running"), stored_run(4, None, "crashed"), stored_run(5, None, job_type="summary")]
    asked = []

    def runs(path: str, filters: dict, order: str):
        asked.append((path, filters))
        return group

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=runs))
    found = from_wandb(["team/pmnet/a/group"], tmp_path / "fetched")
    assert asked == [("team/pmnet", {"group": "a/group"})]
    assert missing(found) == ["unfinished: run3", "failed: run4: W&B has no results of this run (state: crashed)"]
    (benchmark,) = write(found, tmp_path / "report")
    row = cells(markdown(miou(benchmark)))["PMNet, ours"]
    assert row[:4] == [*(f"{records[1, fold]['test']['miou']:.1f}" for fold in range(3)), "-"]
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert page.links == [run.url for run in group[:3]]
    lines = csv.DictReader(io.StringIO((tmp_path / "report" / "report.csv").read_text()))
    assert [line["folder"] for line in lines] == page.links


def test_wandb_that_does_not_answer_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise wandb.errors.CommError("no connection.")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError, match=r"a/b/c from W&B: no connection\. Check the name and your API key"):
        from_wandb(["a/b/c"], tmp_path)
    with pytest.raises(UserError, match="entity/project/group, not a/b"):
        from_wandb(["a/b"], tmp_path)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.sources += [given["src"]] if "src" in given else []
        self.links += [given["href"]] if "href" in given else []


def test_page_needs_no_other_file_and_its_pictures_are_whole(sweep) -> None:
    folder, _ = sweep
    one(folder)
    text = (folder / "report" / "report.html").read_text()
    page = Page(text)
    assert len(page.sources) >= 3 + 8  # folds, classes, curves; and a panel a job
    for source in page.sources:
        assert source.startswith("data:image/")
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).load()
    assert "http" not in text
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert {(folder / "report" / link).resolve() for link in page.links} == {
        p.parent for p in folder.glob("*/results.json")
    }


@pytest.mark.slow
def test_hostile_names_are_shown_as_they_are(sweep) -> None:
    folder, _ = sweep
    name = "<script>alert(1)</script>|[red]_&%"
    write_run(folder / "30-[bold]x_y", 0, 1, {name: 12.3}, seed=3)
    _, benchmark = one(folder)
    page = Page((folder / "report" / "report.html").read_text())
    assert "script" not in page.tags
    assert "\\<script\\>" in markdown(per_class(benchmark))
    done = run_module("experiments.report", str(folder))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, ["There is no folder"]),
        (lambda path: path.mkdir(), ["No run found in", "results.json"]),
        (lambda path: (path.mkdir(), (path / "results.json").write_text('{"hello": [1, 2]}')), ["No run found in"]),
    ],
    ids=["no folder", "empty folder", "files of others"],
)
def test_nothing_to_report_on_is_one_message(tmp_path: Path, make, words: list[str]) -> None:
    make(tmp_path / "sweep")
    done = run_module("experiments.report", str(tmp_path / "sweep"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"test": {"miou": 1.0, "fb_iou": 2.0, "iou_per_class": ["a"]}},
        {"test": {"miou": 1.0, "fb_iou": 2.0, "iou_per_class": {"a": "b"}}},
        *({"setting": {key: value}} for key, value in (
            ("fold", "0"), ("fold", [1]), ("shot", "5"), ("folds", None), ("task", 3))),
        *({key: None} for key in ("checkpoint", "config", "backbone", "episodes", "training", "command")),
        {"baselines": {"untrained": {"miou": 1.0}, "all_foreground": {"miou": 1.0}}},
    ],
)  # fmt: skip
def test_record_of_another_shape_is_passed_over(tmp_path: Path, change: dict) -> None:
    write_run(tmp_path / "good", 0)
    write_run(tmp_path / "bad", 1)
    path = tmp_path / "bad" / "results.json"
    record = json.loads(path.read_text())
    for key, value in change.items():
        record[key] = record[key] | value if key == "setting" else value
    path.write_text(json.dumps(record))
    found = collect([tmp_path])
    assert [job.state for job in found.jobs] == ["unfinished", "finished"]
    assert "bad: results.json" in found.notes[0]
    write(found, tmp_path / "report")


def test_plans_and_failures_of_another_shape_do_no_harm(tmp_path: Path) -> None:
    write_run(tmp_path / "0", 0)
    begin(tmp_path / "1", ["fold=1"])
    (tmp_path / "1" / "failure.json").write_text('{"error": 5}')
    (tmp_path / "sweep.json").write_text('{"jobs": [1, {"overrides": ["fold=2"]}], "started": null, "command": 3}')
    found = collect([tmp_path])
    write(found, tmp_path / "report")
    assert missing(found) == ["failed: 1: 5", "not started: fold=2"]


@pytest.mark.slow
def test_csv_of_a_table_has_its_cells(sweep, tmp_path: Path) -> None:
    (benchmark,) = write(collect([sweep[0]]), tmp_path)
    table = miou(benchmark)
    text = (tmp_path / "tables" / "miou-cross_category-pascal-resnet50.csv").read_text()
    lines = list(csv.reader(io.StringIO(text)))
    assert lines == [table.columns, *(row.cells for row in table.rows)]
    assert any(line[0].startswith("HSNet") for line in lines)


def test_seeds_that_a_mean_is_not_over_are_named(tmp_path: Path) -> None:
    for seed in range(3):
        for fold in range(4):
            if (seed, fold) != (1, 2):
                write_run(tmp_path / f"{seed}{fold}", fold, seed=seed)
    (benchmark,) = benchmarks(collect([tmp_path]).tested)
    note = "PMNet, ours, 1-shot: the mean is over the seeds with all folds (seed 1 lacks fold 2)."
    assert note in benchmark.notes


def test_an_option_that_older_runs_lack_and_that_is_not_set_tells_no_rows_apart(tmp_path: Path) -> None:
    for fold in range(4):
        write_run(tmp_path / str(fold), fold)
    alter(tmp_path / "0", config=json.loads((tmp_path / "0" / "results.json").read_text())["config"] | {"new": None})
    (benchmark,) = benchmarks(collect([tmp_path]).tested)
    assert len(benchmark.series) == 1


def test_folders_of_one_name_are_one_dataset_only_with_the_same_classes(tmp_path: Path) -> None:
    cats, moss = {"base_classes": ["cat"], "novel_classes": ["lion"]}, {"base_classes": ["moss"], "novel_classes": []}
    for i, (root, drawn) in enumerate((("/a/data", cats), ("/b/data", cats), ("/c/data", moss))):
        write_run(tmp_path / str(i), 0, 1, {"x": 10.0 + i}, dataset="folder", target="folder")
        alter(tmp_path / str(i), config={"dataset": {"root": root}, "target": None}, episodes=drawn)
    assert {b.dataset for b in benchmarks(collect([tmp_path / "0", tmp_path / "1"]).tested)} == {"folder data"}
    assert {b.dataset for b in benchmarks(collect([tmp_path]).tested)} == {
        "folder /a/data", "folder /b/data", "folder /c/data",
    }  # fmt: skip


def test_planned_runs_are_found_however_the_folder_is_written(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = sweep
    run = next(path.parent for path in sorted(folder.rglob("results.json")))
    overrides = json.loads((run / ".hydra" / "overrides.yaml").read_text())
    (folder / "sweep.json").write_text(json.dumps({"jobs": [{"overrides": overrides}]}))
    monkeypatch.chdir(run.parent)
    assert not any("not started" in line for line in missing(collect([Path(run.name), folder])))


@pytest.mark.slow
def test_command_prints_the_tables(sweep) -> None:
    folder, records = sweep
    done = run_module("experiments.report", str(folder), "--out", str(folder / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (folder / "elsewhere").iterdir()} == {
        "report.html", "report.md", "report.tex", "report.csv", "figures", "tables",
    }  # fmt: skip
    mean = statistics.mean(records[5, fold]["test"]["miou"] for fold in range(4))
    assert f"{mean:.1f}" in done.stdout
    assert "8 finished of 8 runs" in done.stdout
    assert "FECANet (TMM'23)" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")
@pytest.mark.parametrize("width", [1280, 500])
def test_page_reads_in_a_browser(sweep, tmp_path: Path, width: int) -> None:
    """Every picture is drawn, and nothing but the wide tables, which scroll, is wider than the window."""
    folder, _ = sweep
    one(folder)
    measure = """<script>onload = () => document.body.setAttribute("data-seen", JSON.stringify({
      pictures: [...document.images].filter(i => i.checkVisibility()).map(i => i.naturalWidth * i.clientWidth),
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      text: document.body.innerText.length, width: innerWidth}))</script>"""
    text = (folder / "report" / "report.html").read_text().replace("</body>", f"{measure}</body>")
    (tmp_path / "page.html").write_text(text)
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    done = subprocess.run(
        ["chromium", *quiet.split(), "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path}/profile", f"--window-size={width},2000", "--dump-dom", f"file://{tmp_path}/page.html"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    seen = json.loads(re.search(r'data-seen="(.*?)"', done.stdout)[1].replace("&quot;", '"'))
    assert seen["width"] == width
    assert len(seen["pictures"]) >= 3
    assert all(size > 0 for size in seen["pictures"])
    assert seen["overflow"] <= 0
    assert seen["text"] > 1000


def test_what_a_model_chooses_does_not_name_its_row(tmp_path: Path) -> None:
    """The published optimiser, schedule and augmentation of a model; but what differs within a model does."""
    chosen = {
        "hsnet": {"optimizer": {"_target_": "Adam", "lr": 1e-3}, "scheduler": {}, "augment": {}},
        "ssp": {
            "optimizer": {"_target_": "SGD", "lr": 0.1},
            "scheduler": {"_target_": "Poly"},
            "augment": {"scale": 2},
        },
    }
    for i, (model, config) in enumerate(chosen.items()):
        write_run(tmp_path / str(i), model=model, method=model.upper())
        alter(tmp_path / str(i), config=config)
    assert [s for s in cells(markdown(miou(tabled(tmp_path)))) if "ours" in s] == ["HSNET, ours", "SSP, ours"]
    write_run(tmp_path / "2", model="ssp", method="SSP")
    alter(tmp_path / "2", config=chosen["ssp"] | {"augment": {}})
    rows = [s for s in cells(markdown(miou(tabled(tmp_path)))) if "ours" in s]
    assert any("augment" in row for row in rows if row.startswith("SSP"))


def test_published_numbers_of_further_methods_say_what_they_were_tuned_on(tmp_path: Path) -> None:
    """Those without a source domain stand beside every training on the same backbone."""
    setting = {"task": "cross_domain", "dataset": "pascal", "target": "isic"}
    write_run(tmp_path / "a" / "run", fold="all", **setting, backbone="resnet50")
    write_run(tmp_path / "b" / "run", fold="all", **setting, backbone="dinov3_large")
    resnet, dino = (tabled(tmp_path / name) for name in "ab")
    assert {"PATNet", "DCDNet", "IFA"} <= {entry["method"] for entry in resnet.published}
    assert {entry["method"] for entry in dino.published} == {"HERA", "FoRIS"}
    (dcdnet,) = (row.cells for row in made.table(resnet).rows if row.cells[0].startswith("DCDNet"))
    assert "DCDNet (AAAI'26) (DCDNet, table 1)" in dcdnet[0]
    assert dcdnet[made.COLUMNS.index("tuned at test")] == "the supports of the target"
    assert dcdnet[made.COLUMNS.index("head trained on")] == "pascal, all classes"
    (hera,) = (row.cells for row in made.table(dino).rows if "HERA" in row.cells[0])
    assert hera[made.COLUMNS.index("head trained on")] == "nothing"
