"""A schedule that steps with every batch, over the whole training, also if the training is interrupted."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR

from datamodules import Episode
from datamodules.episodes.episode import EpisodeSpec
from experiments.run.callbacks import StepSeed
from pmnet import PMNet, SmallBackbone
from pmnet.errors import SettingError
from pmnet.training.module import FewShotModule
from tests.conftest import ROOT, TINY


class Steps(L.Callback):
    """Notes the rate and the episodes of each step; after step `until`, saves a checkpoint and breaks off."""

    def __init__(self, until: int) -> None:
        self.rates: list[float] = []
        self.episodes: list[list[EpisodeSpec]] = []
        self.until = until

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Episode, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.episodes.append(batch.spec)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.until:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "cut.ckpt")
            raise TimeoutError


def fit(
    folder: Path, until: int = 99, ckpt: Path | None = None, epochs: int = 3, interval: str = "step", workers: int = 0
) -> tuple[Steps, dict[str, torch.Tensor]]:
    """Trains for epochs of three batches; returns what each step was, and the weights at the end."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*TINY, "episodes.val=2", "episodes.image_size=32", "episodes.per_epoch=12"])
    cfg.episodes.workers = workers
    data, schedule = instantiate(cfg.episodes), partial(PolynomialLR, total_iters="steps", power=1.0)
    loss, steps = torch.nn.CrossEntropyLoss(ignore_index=255), Steps(until)
    torch.manual_seed(0)
    module = FewShotModule(
        PMNet(SmallBackbone("none")), data.test_class_ids, loss, partial(SGD, lr=0.9), schedule,
        schedule_interval=interval,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False, callbacks=[StepSeed(0), steps],
        limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with suppress(TimeoutError):
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return steps, module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_training_cut_within_an_epoch_goes_on_as_if_it_had_not_been(tmp_path: Path, workers: int) -> None:
    """The number of steps is asked for, and so the loader made, before the place in the epoch is restored."""
    whole, weights = fit(tmp_path)
    assert whole.rates == pytest.approx([(9 - step) / 10 for step in range(9)])
    for until in (1, 4, 5) if workers == 0 else (5,):
        begun, _ = fit(tmp_path, until=until, workers=workers)
        rest, resumed = fit(tmp_path, ckpt=tmp_path / "cut.ckpt", workers=workers)
        assert len(begun.rates) == until
        assert begun.rates + rest.rates == whole.rates
        assert begun.episodes + rest.episodes == whole.episodes
        assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_default_is_a_step_each_epoch(tmp_path: Path) -> None:
    """Whatever the length that the schedule is given."""
    steps, _ = fit(tmp_path, interval="epoch")
    assert steps.rates == pytest.approx([0.9] * 3 + [0.8] * 3 + [0.7] * 3)


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


@pytest.mark.slow
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
