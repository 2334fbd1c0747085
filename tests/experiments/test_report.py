"""The report of runs whose results are written by the test: every number is known beforehand."""

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

import pytest
from omegaconf import OmegaConf
from PIL import Image

from experiments.report.collect import collect
from experiments.report.figures import read_curves
from experiments.report.page import missing, write
from experiments.report.tables import fb_iou, latex, markdown, miou, per_class
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


def cells(text: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell, without bold."""
    rows = [
        [c.strip().replace("**", "") for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


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
    assert len(printed) == 11


def test_best_published_and_best_of_all_are_bold(sweep) -> None:
    folder, _ = sweep
    write_run(folder / "0-pascal-resnet50-fold0-shot1", 0, 1, {"cat": 99.0})
    table = miou(one(folder)[1])
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


def test_latex_has_the_cells_of_markdown_and_compiles(sweep, tmp_path: Path) -> None:
    folder, _ = sweep
    write_run(folder / "9-odd", 0, 1, {"100% c_l#s&s $x$ {y} ~^\\": 50.0}, target="fss", task="cross_dataset", folds=0)
    found = collect([folder])
    benchmarks = write(found, folder / "report")
    text = latex(miou(benchmarks[0]))
    lines = [line for line in text.splitlines() if "&" in line]
    assert {line.count("&") for line in lines} == {11}
    plain = [re.sub(r"\\textbf{(.*?)}", r"\1", line).removesuffix(r" \\").split(" & ") for line in lines]
    assert [row[1:] for row in plain] == list(cells(markdown(miou(benchmarks[0]))).values())[:1] + [
        r.cells[1:] for r in miou(benchmarks[0]).rows
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
    assert any(f"1 of 4 folds (without 1, 2, 3); over those it is {only:.1f}" in note for note in table.notes)
    page = (folder / "report" / "report.html").read_text()
    assert "5 finished, 1 failed, 1 unfinished, 1 not started of 8 runs" in page
    assert "The loss is nan." in page


def test_seeds_are_averaged_and_their_spread_is_shown(sweep) -> None:
    folder, records = sweep
    for fold in range(4):
        write_run(folder / f"1{fold}-seed1", fold, 1, {"cat": 50.0 + fold, "dog": 60.0}, seed=1)
    table = miou(one(folder)[1])
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
    table = miou(one(folder)[1])
    assert cells(markdown(table))["PMNet, ours"][0] == "33.0"
    assert any(note.startswith("11-again counts, and not 0-") for note in table.notes)


def test_configurations_are_named_by_what_differs(sweep) -> None:
    folder, _ = sweep
    for fold in range(4):
        write_run(folder / f"2{fold}-lr", fold, 1, {"cat": 40.0}, lr=0.01)
    rows = cells(markdown(miou(one(folder)[1])))
    assert {name for name in rows if "ours" in name} == {
        "PMNet, ours, optimizer.lr=0.001",
        "PMNet, ours, optimizer.lr=0.01",
    }
    assert rows["PMNet, ours, optimizer.lr=0.01"][4] == "40.0"


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
    benchmarks = write(collect([folder]), folder / "report")
    assert [(b.dataset, b.target) for b in benchmarks] == [("pascal", "pascal"), ("pascal", "isic"), ("coco", "coco")]
    isic = cells(markdown(miou(benchmarks[1])))
    assert isic["PMNet, ours"][0] == "44.4"
    assert isic["HSNet (ICCV'21)"][0] == "31.2"
    assert (folder / "report" / "figures" / "radar.png").exists()


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
        (lambda path: path.mkdir(), ["No run in", "results.json"]),
    ],
    ids=["no folder", "empty folder"],
)
def test_nothing_to_report_on_is_one_message(tmp_path: Path, make, words: list[str]) -> None:
    make(tmp_path / "sweep")
    done = run_module("experiments.report", str(tmp_path / "sweep"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_command_prints_the_tables(sweep) -> None:
    folder, records = sweep
    done = run_module("experiments.report", str(folder), "--out", str(folder / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (folder / "elsewhere").iterdir()} == {
        "report.html", "report.md", "report.tex", "report.csv", "figures",
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
