"""Every experiment and every task, from the publishers' files to results.json, on tiny benchmarks."""

import json
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from datamodules.prepare.ready import prepare
from experiments.report.benchmarks import PUBLISHED, in_paper, same_name
from pmnet.methods import all_methods
from tests.conftest import ROOT, results, run
from tests.data import fss
from tests.data.fixture import FIXTURES, KINDS

FOUND = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
EXPERIMENTS = [name for name in FOUND if name.startswith(("table", "fss"))]
ROWS = [name for name in EXPERIMENTS if name.endswith(tuple(f"_{method}" for method in all_methods()))]  # of others
TABLES = [name for name in EXPERIMENTS if name not in ROWS]
TINY = (
    "backbone.weights=none trainer=cpu trainer.max_epochs=1 trainer.limit_train_batches=2 episodes.image_size=64 "
    "episodes.batch_size=2 episodes.val=3 episodes.test=6 episodes.workers=0 panels=1"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All benchmarks, prepared; FSS-1000 with lists, because built ones would have other test classes."""
    root = tmp_path_factory.mktemp("benchmarks")
    given = {"fss": fss.write_lists(root / "splits" / "fss")}
    for name, fixture in FIXTURES.items():
        source = fixture.write(root / "published" / name)
        prepare(KINDS[name], [source], root / "data", given.get(name), download=False)
    return root / "data"


def sweep(data: Path, folder: Path, *overrides: str) -> dict[str, dict]:
    """Runs jobs in one process; the results by the job's folder name."""
    done = run(*overrides, *TINY, f"data={data}", "hydra/launcher=basic", f"hydra.sweep.dir={folder}", "-m")
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}


@pytest.mark.slow
def test_every_table_runs(data, tmp_path):
    found = sweep(data, tmp_path, f"experiment={','.join(TABLES)}")
    assert len(found) == len(TABLES) == 15
    by_table = dict(zip(TABLES, (found[k] for k in sorted(found, key=lambda k: int(k.split("-")[0]))), strict=True))
    for name, record in by_table.items():
        assert record["training"]["steps"] == 2, name
        assert record["episodes"]["test_episodes"] == 6
        assert 0 <= record["test"]["miou"] <= 100
    table3 = by_table["table3_isic"]
    assert len(table3["episodes"]["base_classes"]) == 20
    assert "validation episodes of fss" in table3["checkpoint"]["selection"]
    assert table3["setting"] | {"target": "isic", "dataset": "pascal", "task": "cross_domain"} == table3["setting"]
    assert by_table["table2_resnet50"]["episodes"]["novel_classes"] == (
        "aeroplane boat chair diningtable dog person".split()
    )
    assert by_table["table2_resnet50"]["tested_classes_seen_in_training"] == []
    assert by_table["table4"]["episodes"]["novel_classes"] == ["abe's_flyingfish", "bus"]
    assert by_table["table5"]["episodes"]["novel_classes"][0] == "background"
    assert by_table["table6_no_b3dconvs"]["config"]["model"]["b3dconvs"] is False


@pytest.mark.slow
def test_classes_of_coco_that_pascal_shares_are_shown(data, tmp_path):
    jobs = sweep(
        data, tmp_path, "experiment=table2_resnet50", "target.coco_folds=standard", "backbone=small", "fold=0,3"
    )
    seen = {k.split("-")[0]: r["tested_classes_seen_in_training"] for k, r in jobs.items()}
    assert seen["0"] == ["bicycle", "bird", "bottle"]
    assert seen["1"] == ["pottedplant", "sheep", "sofa", "train", "tvmonitor"]


@pytest.mark.slow
def test_trained_network_is_tested_on_another_target_and_shot(data, tmp_path):
    """Where nothing but the other target's files are at hand."""
    setting = ["backbone=small", *TINY]
    first = run("task=cross_domain", "target=suim", *setting, f"data={data}", f"hydra.run.dir={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chest_xray").symlink_to(data / "chest_xray")
    setting += ["mode=test", f"ckpt={tmp_path / 'first'}", "task=cross_domain", f"data={tmp_path / 'data'}"]
    done = run(*setting, "shot=5", "target=chest_xray", f"hydra.run.dir={tmp_path / 'second'}")
    assert done.returncode == 0, done.stderr
    a, b = results(tmp_path / "first"), results(tmp_path / "second")
    assert a["training"] == b["training"]
    assert (b["setting"]["target"], b["setting"]["shot"]) == ("chest_xray", 5)
    assert list(b["test"]["iou_per_class"]) == ["lung"]
    assert "pascal -> chest_xray" in done.stdout
    done = run(*setting, "fold=1", "target=chest_xray", f"hydra.run.dir={tmp_path / 'third'}")
    assert done.returncode == 1
    assert "was trained on pascal, 20 classes" in done.stderr


@cache
def published() -> list[dict]:
    return OmegaConf.to_container(OmegaConf.load(PUBLISHED))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_gives_the_command_and_the_published_numbers(name):
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert any(f"python run.py experiment={name} " in line for line in lines)
    assert any(line.startswith("# Cost: ") for line in lines)
    if not name.startswith("table"):
        return
    method = lines[1].split(": ")[1].split(",")[0] if name in ROWS else "PMNet"
    entries = [e for e in published() if e["table"] == int(name[5]) and same_name(e["method"], method)]
    own = {x for e in entries for x in [e["miou"], *e.get("folds", [])]}
    said = [line.split(": ")[1] for line in lines if line.startswith("# Published mIoU")]
    assert said
    for numbers in said:
        assert {float(x.strip(",")) for x in numbers.split() if x != "mean"} <= own


def test_every_published_row_of_a_method_here_is_an_experiment():
    """For tables 1 to 5; the paper's own ones are `TABLES`."""
    names = {kind.__name__.lower(): name for name, kind in all_methods().items()}
    expected = set()
    for e in published():
        model = names.get(e["method"].lower().replace("-", ""))
        if e["table"] <= 5 and "task" in e and model and e["method"] != "PMNet":
            place = {1: f"{e['dataset']}_{e['backbone']}", 2: e["backbone"], 3: e["target"]}.get(e["table"])
            expected.add("_".join(filter(None, [f"table{e['table']}", place, model])))
    assert expected == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_row_is_compared_with_the_published_one(name):
    """The setting of the experiment is one of the published entries, under the paper's name of its backbone."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"experiment={name}"], return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    setting = {"task": cfg.task.name, "dataset": choices.dataset, "target": choices.get("target") or choices.dataset}
    setting |= {"backbone": in_paper(choices.backbone)}
    method = cfg.model._target_.split(".")[-1]
    assert [e for e in published() if setting.items() <= e.items() and same_name(e["method"], method)]
