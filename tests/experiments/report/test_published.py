"""Compares experiments/published.yaml with the tables in the paper's text; published_later.yaml with itself."""

import re
from collections import Counter

import pytest
from omegaconf import OmegaConf

from datamodules.registry import all_datasets
from experiments.report.benchmarks import published
from tests.conftest import ROOT

ENTRIES = OmegaConf.to_container(OmegaConf.load(ROOT / "experiments" / "published.yaml"))
LATER = OmegaConf.to_container(OmegaConf.load(ROOT / "experiments" / "published_later.yaml"))
OTHERWISE = {(1, "SSP", "coco", "resnet101", 5), (2, "HSNet", "pascal", "resnet50", 1)}  # as the header says


def numbers(entries) -> list[float]:
    return sorted(n for e in entries for n in [*e.get("folds", []), e["miou"]])


def test_every_number_of_the_tables_and_no_other(shared):
    text = (shared / "paper" / "pmnet.txt").read_text().replace("<u>", "").replace("</u>", "")
    printed = Counter()
    for line in text.splitlines():
        cells = [c.strip() for c in line.split("\t")]
        if sum(bool(re.fullmatch(r"\d+\.\d+", c)) for c in cells) < 5:
            continue
        values = [float(c) for c in cells if re.fullmatch(r"\d+\.\d+", c)]
        if len(values) == 11:  # with the number of parameters
            values = values[:10]
        printed += Counter(values)
    assert Counter(numbers(ENTRIES)) == printed


def test_tables_are_whole():
    assert Counter(e["table"] for e in ENTRIES) == {1: 72, 2: 24, 3: 70, 4: 5, 5: 5, 6: 3}
    keys = [
        (e["table"], e["dataset"], e["target"], e["backbone"], e["method"], e["shot"], e.get("ablation"))
        for e in ENTRIES
    ]
    assert len(set(keys)) == len(keys)
    for table in range(1, 7):
        assert any(e["method"] == "PMNet" and e["table"] == table for e in ENTRIES)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "folds" in e], ids=lambda e: f"{e['table']}-{e['method']}")
def test_means_are_of_the_folds(entry):
    key = (entry["table"], entry["method"], entry["target"], entry["backbone"], entry["shot"])
    difference = abs(sum(entry["folds"]) / 4 - entry["miou"])
    assert difference <= (0.3 if key in OTHERWISE else 0.1001)
    assert (difference > 0.1001) == (key in OTHERWISE)


def test_table_3_averages_its_targets():
    rows = {(e["method"], e["shot"], e["target"]): e["miou"] for e in ENTRIES if e["table"] == 3}
    for method, shot, target in rows:
        if target == "average":
            four = [rows[method, shot, t] for t in ("deepglobe", "isic", "chest_xray", "fss")]
            assert sum(four) / 4 == pytest.approx(rows[method, shot, "average"], abs=0.06), (method, shot)


def test_known_rows():
    def find(**wanted):
        (entry,) = [e for e in ENTRIES if all(e.get(k) == v for k, v in wanted.items())]
        return entry

    row = find(table=1, dataset="pascal", backbone="resnet50", method="PMNet", shot=1)
    assert (row["folds"], row["miou"], row["params"]) == ([67.3, 72.0, 62.4, 59.9], 65.4, 0.68)
    assert find(table=1, dataset="coco", backbone="resnet101", method="DCAMA", shot=5)["folds"] == [
        48.0,
        58.0,
        54.3,
        47.1,
    ]
    assert find(table=2, backbone="resnet101", method="RTD", shot=5)["folds"] == [67.2, 72.7, 72.0, 78.9]
    assert find(table=3, method="PATNet", target="isic", shot=5)["miou"] == 53.58
    assert find(table=6, ablation="no_background")["folds"] == [59.0, 65.0, 54.3, 51.2]


# Further methods


def key(entry) -> tuple:
    return tuple(entry[k] for k in ("task", "dataset", "target", "backbone", "method", "shot"))


def test_later_entries_are_of_other_methods_each_once_and_from_a_named_source():
    paper = {entry["method"] for entry in ENTRIES}
    assert len(set(map(key, LATER["entries"]))) == len(LATER["entries"]) > 150
    for entry in LATER["entries"]:
        assert entry["method"] not in paper
        assert entry["target"] in all_datasets()
        assert entry["dataset"] in {"none", "other", *all_datasets()}
        assert (entry["dataset"] in ("none", "other")) == ("trained_on" in entry)
        assert entry["shot"] in (1, 5)
        assert 0 < entry["miou"] < 100
    assert {entry["source"] for entry in LATER["entries"]} == set(LATER["sources"])


def test_later_means_are_of_the_folds():
    """But for the two that the header names."""
    others = {(e["method"], e["dataset"], e["shot"]) for e in LATER["entries"] if "folds" in e and off(e)}
    assert others == {("MIANet", "coco", 5), ("GF-SAM", "none", 1)}


def off(entry) -> bool:
    return abs(sum(entry["folds"]) / 4 - entry["miou"]) > 0.1001


def test_five_shots_are_better_than_one():
    """A shot or a fold that is swapped shows here: no method of these tables loses by more examples."""
    one = {key(e)[:-1]: e["miou"] for e in LATER["entries"] if e["shot"] == 1}
    worse = [key(e) for e in LATER["entries"] if e["shot"] == 5 and e["miou"] < one.get(key(e)[:-1], 0)]
    assert [(method, target) for _, _, target, _, method, _ in worse] == [("DR-Adapter", "chest_xray")]


def test_reports_read_both_files():
    names = {(e["method"], e["where"]) for e in published()}
    assert {("PMNet", "table 1"), ("HMNet", "HMNet, tables 1 and 2"), ("HERA", "README, Performance")} <= names
