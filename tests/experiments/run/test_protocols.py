"""Protocols and several test lists in whole runs, on a method that learns nothing."""

import csv
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.run.test_methods import run_here

SETTING = ["model=prototype", "backbone=small", "episodes.image_size=64", "episodes.test=10", "episodes.absent=0.2"]
NAMES = ("miou", "fb_iou")


@pytest.mark.slow
def test_several_lists_are_the_mean_of_single_ones(tmp_path: Path) -> None:
    together = run_here(tmp_path / "together", *SETTING, "test_seeds=3")
    alone = [run_here(tmp_path / f"{seed}", *SETTING, f"protocol.seed={seed}") for seed in (0, 1, 2)]
    for row, record in zip(together["test"]["lists"], alone, strict=True):
        assert row["episode_list_sha256"] == record["episodes"]["episode_list_sha256"]
        assert row["absent_list_sha256"] == record["episodes"]["absent"]["episode_list_sha256"]
        assert [row[name] for name in NAMES] == [record["test"][name] for name in NAMES]
        assert "lists" not in record["test"]
    for name in NAMES:
        scores = [record["test"][name] for record in alone]
        assert together["test"][name] == pytest.approx(np.mean(scores), abs=1e-3)
        assert together["test"]["std"][name] == pytest.approx(np.std(scores, ddof=1), abs=1e-3)
    classes = together["test"]["iou_per_class"]
    assert classes == pytest.approx(
        {c: np.mean([r["test"]["iou_per_class"][c] for r in alone]) for c in classes}, abs=1e-3
    )
    for seed, record in enumerate(alone):
        of_list = "episodes.csv" if seed == 0 else f"episodes-seed{seed}.csv"
        rows = list(csv.DictReader((tmp_path / "together" / of_list).open()))
        assert rows == list(csv.DictReader((tmp_path / f"{seed}" / "episodes.csv").open()))
        assert record["episodes"]["protocol"]["seeds"] == [seed]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsnet", "pfenet", "ssp", "panet", "patnet"])
def test_any_method_runs_under_any_protocol(name: str, tmp_path: Path) -> None:
    record = run_here(tmp_path / "run", *SETTING, f"protocol={name}", "dataset.size=80", "episodes.test=6")
    assert record["setting"]["protocol"] == record["episodes"]["protocol"]["name"] == name
    assert record["episodes"]["test_episodes"] == 6
    assert len(record["episodes"]["protocol"]["seeds"]) == (5 if name in ("ssp", "panet") else 1)
    assert 0 < record["test"]["miou"] < 100
