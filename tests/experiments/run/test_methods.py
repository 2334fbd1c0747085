"""Every method in a run: two steps of training, a test, and the same test of the checkpoint."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import open_dict

from experiments.report.collect import is_whole
from experiments.run.job import run_job
from pmnet.errors import SettingError
from pmnet.methods import Method, all_methods, vat
from pmnet.methods.pfenet import PFENet
from tests.conftest import ROOT, results

TINY = (
    "dataset=synthetic dataset.images_per_class=4 backbone.weights=none trainer=cpu trainer.max_epochs=1 "
    "episodes.batch_size=2 episodes.test_batch_size=2 episodes.per_epoch=4 "
    "episodes.val=2 episodes.test=5 episodes.workers=0 panels=0 reuse=false floors=false"
).split()


@pytest.mark.parametrize("optimizer", sorted(p.stem for p in (ROOT / "conf" / "optimizer").glob("*.yaml")))
@pytest.mark.parametrize("model", sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml")))
def test_every_method_takes_every_optimiser(model: str, optimizer: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"model={model}", f"optimizer={optimizer}"])
    weights = [{"params": [torch.zeros(1, requires_grad=True)], "adamw": adamw} for adamw in (False, True)]
    built = instantiate(cfg.optimizer)(weights)
    assert type(built).__name__ == cfg.optimizer._target_.split(".")[-1]


def run_here(folder: Path, *overrides: str) -> dict[str, Any]:
    """`python run.py <overrides>` in this process, which has imported everything already; the record of the run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        place = [f"hydra.run.dir={folder}", f"hydra.runtime.output_dir={folder}"]
        cfg = compose("config", [*TINY, *overrides, *place], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    folder.mkdir()
    run_job(cfg)
    return results(folder)


@pytest.fixture(autouse=True)
def halved_vat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sides to which VAT resizes all features, halved: a sixteenth of the time."""
    monkeypatch.setattr(vat.VATHead, "sides", {layer: side // 2 for layer, side in vat.SIDES.items()})


def smallest_side(kind: type[Method]) -> int:
    """8n + 1 if the method takes it, else a power of two."""
    try:
        kind.check_sides(kind, (65, 65))  # type: ignore[arg-type]
    except SettingError:
        return 64
    return 65


@pytest.mark.slow
@pytest.mark.parametrize("name", all_methods())
def test_method_trains_and_its_checkpoint_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    kind = all_methods()[name]
    setting = [f"model={name}", "backbone=small", f"episodes.image_size={smallest_side(kind)}"]
    if issubclass(kind, PFENet):
        setting.append("model.bins=[1.0,0.5]")  # fewer and smaller scales take less time
    record = run_here(tmp_path / "trained", *setting)
    assert is_whole(record)
    assert record["episodes"]["test_episodes"] == 5
    assert record["setting"]["model"] == name
    assert record["test"]["miou"] == pytest.approx(sum(record["test"]["iou_per_class"].values()) / 5, abs=1e-3)
    if record["parameters"]["learnable"] == 0:
        assert record["training"] == {}
        return
    assert record["training"]["steps"] == 2
    rows = list(csv.DictReader((tmp_path / "trained" / "metrics.csv").open()))
    (loss,) = (float(row["train/loss"]) for row in rows if row["train/loss"])
    assert 0 < loss < float("inf")
    again = run_here(tmp_path / "tested", *setting, "mode=test", f"ckpt={tmp_path / 'trained'}")
    assert again["test"] == record["test"]
    assert again["training"] == record["training"]
