"""Every method in a run: two steps of training, a test, and a test of the checkpoint with other batches."""

import csv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import open_dict

from experiments.report.collect import is_whole
from experiments.run import trainer
from experiments.run.checkpoints import lineage, load_released, read
from experiments.run.job import run_job
from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.backbones.vgg import OURS, PANET, VGGBackbone
from pmnet.errors import CheckpointError
from pmnet.methods import Method, all_methods, vat
from pmnet.methods.dcama import DCAMA
from pmnet.methods.hsnet import HSNet
from pmnet.methods.panet import PANet
from pmnet.methods.pfenet import PFENet
from pmnet.methods.ssp import SSP
from pmnet.segment.hub import built_with_facts, write
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
    with patch("experiments.run.failures.end_children"):  # the children of this process are those of all tests
        run_job(cfg)
    return results(folder)


@pytest.fixture(autouse=True)
def halved_vat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sides to which VAT resizes all features, halved: a sixteenth of the time."""
    monkeypatch.setattr(vat.VATHead, "sides", {layer: side // 2 for layer, side in vat.SIDES.items()})


def smallest_side(kind: type[Method]) -> int:
    """8n + 1 if the method takes it, else a power of two."""
    return 65 if 65 % kind.side_multiple == kind.side_offset else 64


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
    again = run_here(
        tmp_path / "tested", *setting, "mode=test", f"ckpt={tmp_path / 'trained'}", "episodes.test_batch_size=5"
    )
    assert again["test"] == record["test"]  # also of methods that are tuned while they are tested
    assert again["training"] == record["training"]
    photo = run_here(
        tmp_path / "photo", *setting, "mode=test", f"ckpt={tmp_path / 'trained'}", "protocol=pfenet", "dataset.size=88"
    )
    assert is_whole(photo)
    assert photo["episodes"]["protocol"]["scored"] == "photo"


# Checkpoints of the methods' authors


def released(method: HSNet, changed: float = 0.0) -> dict[str, torch.Tensor]:
    """A checkpoint in the names of HSNet's program: the head, and a backbone that differs from ours by `changed`."""
    head = {f"module.hpn_learner.{name}": tensor for name, tensor in method.head.state_dict().items()}
    trunk = {f"module.backbone.{name}": tensor + changed for name, tensor in method.backbone.trunk.state_dict().items()}
    return head | trunk


@pytest.fixture
def hsnet() -> HSNet:
    torch.manual_seed(1)
    return HSNet(SmallBackbone("none"))


def test_checkpoint_of_the_authors_is_tested(hsnet: HSNet, tmp_path: Path) -> None:
    """It scores as the network that it was made of."""
    torch.save({"state_dict": released(hsnet), "epoch": 3}, tmp_path / "authors.pt")
    torch.manual_seed(0)
    same = HSNet(SmallBackbone("none"))
    load_released(read(tmp_path / "authors.pt"), same)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), hsnet.parameters(), strict=True))
    setting = ["model=hsnet", "backbone=small", "episodes.image_size=65", "mode=test"]
    record = run_here(tmp_path / "run", *setting, f"ckpt={tmp_path / 'authors.pt'}")
    assert is_whole(record)
    assert record["training"] == {"run": str(tmp_path / "authors.pt"), "by": "the method's authors"}
    assert record["tested_classes_seen_in_training"] is None


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_processor_without_it_is_warned_about(
    tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "has_bfloat16", lambda: fast)
    for precision, warned in (("32-true", False), ("bf16-mixed", not fast)):
        caplog.clear()
        small = ["model=prototype", "backbone=small", "episodes.image_size=64", f"trainer.precision={precision}"]
        run_here(tmp_path / precision, *small)
        assert ("can take 50 times as long" in caplog.text) == warned


@pytest.mark.slow
@pytest.mark.parametrize("mode", [["mode=test"], ["trainer.max_epochs=1"]])
def test_classes_that_the_shipped_head_has_seen_are_named(tmp_path: Path, mode: list[str]) -> None:
    """Its file says what it was trained on: the synthetic classes of folds 1 to 3. Fine-tuning adds to that."""
    lite = ["model=pmnet_lite", "backbone=efficientnet_lite0", "backbone.weights=imagenet", "ckpt=pmnet_lite"]
    for fold, seen in ((0, []), (1, ["gridded disc", "honeycombed star"])):
        record = run_here(tmp_path / str(fold), *lite, *mode, f"fold={fold}")
        assert record["tested_classes_seen_in_training"][:2] == seen
        learned = record["training"].get("started_from", record["training"])
        assert "voc/bus" in learned["base_classes"]
        assert is_whole(record)


@pytest.mark.slow
def test_classes_of_earlier_trainings_stay_seen(tmp_path: Path) -> None:
    """After a fine-tuning that starts from a fine-tuned run, and in the file that is exported of it."""
    lite = ["model=pmnet_lite", "backbone=efficientnet_lite0", "backbone.weights=imagenet"]
    run_here(tmp_path / "first", *lite, "ckpt=pmnet_lite", "fold=0")
    second = run_here(
        tmp_path / "second", *lite, f"ckpt={tmp_path / 'first'}", "fold=2", "trainer.max_epochs=2", "seed=1"
    )
    kinds = [record["file"] for record in lineage(second["training"]) if "file" in record]
    assert kinds == ["last.ckpt", "pmnet_lite.safetensors"]
    seen = second["tested_classes_seen_in_training"]
    assert seen == sorted(second["episodes"]["novel_classes"])  # fold 0 and the head were both trained on fold 2
    write(built_with_facts(tmp_path / "first"), tmp_path / "out")
    tested = run_here(
        tmp_path / "third", *lite, "mode=test", f"ckpt={tmp_path / 'out' / 'model.safetensors'}", "fold=0"
    )
    assert tested["tested_classes_seen_in_training"] == []
    tested = run_here(
        tmp_path / "fourth", *lite, "mode=test", f"ckpt={tmp_path / 'out' / 'model.safetensors'}", "fold=1"
    )
    assert "gridded disc" in tested["tested_classes_seen_in_training"]
    assert [record.get("file") for record in lineage(tested["training"])] == [None, "pmnet_lite.safetensors"]


def test_checkpoint_of_another_method_says_whose_it_is(hsnet: HSNet, tmp_path: Path) -> None:
    torch.save(released(hsnet), tmp_path / "authors.pt")
    with pytest.raises(CheckpointError, match=r"does not fit model=dcama.* It fits model=hsnet or model=hsnet_hm"):
        load_released(read(tmp_path / "authors.pt"), DCAMA(SmallBackbone("none")))
    torch.save({"some": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"does not fit model=hsnet.* It fits no other method"):
        load_released(read(tmp_path / "other.pt"), hsnet)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
        load_released(read(tmp_path / "none.pt"), hsnet)


def test_checkpoint_with_another_backbone_is_refused(hsnet: HSNet, tmp_path: Path) -> None:
    torch.save(released(hsnet, changed=0.5), tmp_path / "authors.pt")
    with pytest.raises(CheckpointError, match="another backbone than small with weights 'none'"):
        load_released(read(tmp_path / "authors.pt"), hsnet)
    with pytest.raises(CheckpointError, match=r"with other options or another backbone: 'head.encoder_layer2"):
        load_released(read(tmp_path / "authors.pt"), HSNet(ResNetBackbone("resnet18", "none")))


def test_whole_networks_are_loaded_whole(tmp_path: Path) -> None:
    """PANet has no head: all that is learned is in the backbone."""
    trained = PANet(VGGBackbone("none"))
    theirs = dict(zip(OURS, PANET, strict=True))
    state = {}
    for name, tensor in trained.backbone.trunk.state_dict().items():
        module, _, leaf = name.rpartition(".")
        state[f"module.encoder.backbone.{theirs[module]}.{leaf}"] = tensor + 1
    torch.save(state, tmp_path / "authors.pt")
    network = PANet(VGGBackbone("none"))
    load_released(read(tmp_path / "authors.pt"), network)
    assert all(torch.equal(a, b + 1) for a, b in zip(network.parameters(), trained.parameters(), strict=True))


def test_released_network_brings_its_backbone(tmp_path: Path) -> None:
    """SSP's program trains layer2 and layer3 of a backbone that ends there; its file holds all of it."""
    torch.manual_seed(1)
    trained = SSP(DilatedResNetBackbone("resnet50s", "none", "torchvision")).eval()
    state = {}
    for name, tensor in trained.backbone.trunk.state_dict().items():
        theirs = name.replace("conv1.", "layer0.0.", 1) if name.startswith("conv1.") else name
        theirs = theirs.replace("bn1.", "layer0.1.", 1) if theirs.startswith("bn1.") else theirs
        if not name.startswith("layer4."):
            state[f"module.{theirs}"] = tensor
    torch.save(state, tmp_path / "authors.pt")
    network = SSP(DilatedResNetBackbone("resnet50s", "none", "torchvision")).eval()
    load_released(read(tmp_path / "authors.pt"), network)
    query, support, masks = torch.rand(1, 3, 65, 65), torch.rand(1, 1, 3, 65, 65), torch.zeros(1, 1, 65, 65)
    masks[..., 20:40, 20:40] = 1
    with torch.no_grad():
        assert torch.equal(network(query, support, masks), trained(query, support, masks))
    assert network.backbone.provenance.source == "SSP's authors"
