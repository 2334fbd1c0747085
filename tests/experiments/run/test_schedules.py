"""A schedule that steps with every batch, over the whole training, also if the training is interrupted."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR

from pmnet import PMNet, SmallBackbone
from pmnet.errors import SettingError
from pmnet.training.module import FewShotModule
from tests.conftest import ROOT, TINY


class Rates(L.Callback):
    """Notes the rate of each step; breaks off before step `until`."""

    def __init__(self, until: int) -> None:
        self.rates: list[float] = []
        self.until = until

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.until:
            raise TimeoutError
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(
    folder: Path, until: int = 99, ckpt: Path | None = None, epochs: int = 3, interval: str = "step"
) -> list[float]:
    """Epochs of two batches."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*TINY, "episodes.val=2", "episodes.image_size=32"])
    data, schedule = instantiate(cfg.episodes), partial(PolynomialLR, total_iters="steps", power=1.0)
    loss, rates = torch.nn.CrossEntropyLoss(ignore_index=255), Rates(until)
    module = FewShotModule(
        PMNet(SmallBackbone("none")), data.test_class_ids, loss, partial(SGD, lr=0.6), schedule,
        schedule_interval=interval,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False, callbacks=[rates],
        limit_val_batches=0, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    try:
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    except TimeoutError:
        trainer.save_checkpoint(folder / "cut.ckpt")
    return rates.rates


def test_rate_falls_with_every_step(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    assert whole == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert fit(tmp_path, until=3) == pytest.approx(whole[:3])
    assert fit(tmp_path, ckpt=tmp_path / "cut.ckpt") == pytest.approx(whole[3:])


def test_default_is_a_step_each_epoch(tmp_path: Path) -> None:
    """Whatever the length that the schedule is given."""
    assert fit(tmp_path, interval="epoch") == pytest.approx([0.6, 0.6, 0.5, 0.5, 0.4, 0.4])


def test_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"scheduler.interval must be one of epoch, step"):
        fit(tmp_path, interval="week")
    with pytest.raises(SettingError, match=r"trainer.max_epochs or max_steps"):
        fit(tmp_path, epochs=-1)


@pytest.mark.parametrize("model", ["pfenet", "cyctr", "repri", "pmms"])
def test_published_schedules_step_with_every_batch(model: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"model={model}"])
    assert cfg.scheduler.interval == "step"
    assert "steps" in cfg.scheduler.values()


MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_an_experiment_replaces_what_a_model_publishes(model: str) -> None:
    """The optimiser and the schedule are those of one file, not a mixture of two."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["experiment=quickstart", f"model={model}"])
        plain = compose("config", [f"model={model}", "optimizer=adam", "scheduler=constant"])
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = instantiate(cfg.optimizer)(parameters)
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 2e-3)
    assert instantiate(cfg.scheduler)(optimizer).T_max == cfg.trainer.max_epochs
    assert instantiate(plain.optimizer)(parameters).defaults["lr"] == 1e-3
    assert not plain.scheduler
