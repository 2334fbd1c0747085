"""What a checkpoint keeps of a training, wherever it goes on."""

import io
import itertools
import shutil
import signal
import subprocess
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.files import read_json
from experiments.run.callbacks import StepSeed
from experiments.run.checkpoints import AtomicCheckpoints, Checkpoint, in_run, read, to_start_from, trained_in
from experiments.run.checkpoints import callbacks as checkpoint_callbacks
from experiments.run.ending import Asked
from experiments.run.trainer import OURS
from experiments.sweep.preemption import Requeue
from pmnet.errors import CheckpointError
from pmnet.training.module import FewShotModule
from tests.conftest import ROOT, TINY, command, results, run


class CutShort(L.Callback):
    """Breaks off in the validation after an epoch, as a time limit does."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.validations = epoch, 0

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise TimeoutError

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validations += 1


def fit(folder: Path, *callbacks: L.Callback, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
    """Three epochs of two batches; the trained weights."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*TINY, "trainer.max_epochs=3"])
    cfg.task.pair = "synthetic"
    L.seed_everything(0, verbose=False)
    data = instantiate(cfg.episodes)
    network = instantiate(cfg.model, backbone=instantiate(cfg.backbone))
    module = FewShotModule(network, data.test_class_ids, instantiate(cfg.loss), instantiate(cfg.optimizer))
    trainer = instantiate(
        {name: value for name, value in cfg.trainer.items() if name not in OURS},
        logger=False,
        callbacks=[StepSeed(0), *callbacks, *checkpoint_callbacks(folder)],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return {name: tensor.clone() for name, tensor in module.network.head.state_dict().items()}


@pytest.mark.slow
def test_validation_that_is_cut_short_does_not_cost_the_epoch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests' own handlers stay
    alone = fit(tmp_path / "alone")
    with pytest.raises(TimeoutError):
        fit(tmp_path / "cut", CutShort(1), Requeue(tmp_path / "cut"))
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3, "all of epoch 2 but its last batch"
    count = CutShort(99)
    resumed = fit(tmp_path / "cut", count, Requeue(tmp_path / "cut"), ckpt=last)
    assert count.validations == 2
    assert all(torch.equal(alone[name], resumed[name]) for name in alone)


@pytest.mark.slow
def test_best_score_goes_along_to_another_folder(tmp_path: Path) -> None:
    fit(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    state = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (key,) = [name for name in state if "val/miou" in name]
    best = checkpoint_callbacks(tmp_path / "b")[0]
    best.load_state_dict(state[key])
    assert best.best_model_score == state[key]["best_model_score"] > 0
    assert best.best_model_path == str(tmp_path / "b/checkpoints/best.ckpt")
    trainer = L.Trainer(logger=False)
    assert not best.check_monitor_top_k(trainer, best.best_model_score - 1)
    assert best.check_monitor_top_k(trainer, best.best_model_score + 1)


@pytest.mark.slow
def test_best_score_of_another_training_does_not(tmp_path: Path) -> None:
    """`ckpt=` begins a new one, whose folder has no best checkpoint yet."""
    fit(tmp_path / "a")
    state = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (key,) = [name for name in state if "val/miou" in name]
    best = checkpoint_callbacks(tmp_path / "new")[0]
    with pytest.warns(UserWarning, match="dirpath has changed"):
        best.load_state_dict(state[key])
    assert best.best_model_score is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_asked_to_end_it_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """No results of an earlier run are left as if they were this one's."""
    setting = [*TINY, f"hydra.run.dir={tmp_path}"]
    assert run(*setting, "trainer.max_epochs=1").returncode == 0
    before = results(tmp_path)
    process = subprocess.Popen(
        command(*setting, "trainer.max_epochs=1000", "resume=false"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 60
    while not (tmp_path / "checkpoints-before-1").exists() or not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert number.name in read_json(tmp_path / "failure.json")["error"]
    assert before
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.unlink()]
)
def test_one_damaged_file_does_not_cost_a_training(tmp_path: Path, caplog, damage) -> None:
    """The state before it is used; without that the best one; and only if all are damaged there is an error."""
    fit(tmp_path)
    (tmp_path / "checkpoints" / "previous.ckpt").write_bytes((tmp_path / "checkpoints" / "last.ckpt").read_bytes())
    for name, instead in (("last", "previous"), ("previous", "best")):
        damage(tmp_path / "checkpoints" / f"{name}.ckpt")
        start = to_start_from(None, tmp_path, True)
        if start is None:  # nothing is left of the last states, so nothing was interrupted
            assert not in_run(tmp_path, "last")
            return
        assert start.path.stem == instead
    assert caplog.text.count("cannot be read as a checkpoint") == 2
    damage(tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"last.ckpt cannot be read"):
        to_start_from(None, tmp_path, True)


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    """torch.load does not look at the checksums in the file."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"state_dict": {"weight": torch.zeros(1000)}}, path)
    content = bytearray(path.read_bytes())
    content[content.find(bytes(4000)) + 2003] ^= 64
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["state_dict"]["weight"].count_nonzero() == 1
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read"):
        read(path)


def test_damaged_best_checkpoint_is_not_replaced_by_another(tmp_path: Path) -> None:
    """The last epoch has other scores, and the results would not tell at a glance."""
    folder = tmp_path / "checkpoints"
    AtomicCheckpoints().save_checkpoint({"epoch": 2}, folder / "last.ckpt")
    assert trained_in(tmp_path).path.stem == "last"
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, folder / "best.ckpt")
    assert trained_in(tmp_path).path.stem == "best"
    (folder / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"best.ckpt cannot be read.*resume=false.*mode=test ckpt=.*last\.ckpt"):
        trained_in(tmp_path)


def test_signal_within_a_write_is_no_full_disk(tmp_path: Path, monkeypatch) -> None:
    """torch.save raises an error of its own on top of what a signal's handler raises."""

    def save(content: dict, file: io.BufferedWriter) -> None:
        real = file.write
        writes = itertools.count()

        def write(data: bytes) -> int:
            if next(writes) == 2:
                raise Asked(signal.SIGTERM)
            return real(data)

        file.write = write  # type: ignore[method-assign]
        torch_save(content, file)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as ended:
        AtomicCheckpoints().save_checkpoint({"weight": torch.zeros(1000)}, tmp_path / "last.ckpt")
    assert ended.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_last_state_but_one_is_kept(tmp_path: Path) -> None:
    io = AtomicCheckpoints()
    for epoch in range(3):
        io.save_checkpoint({"epoch": epoch}, tmp_path / "checkpoints" / "last.ckpt")
    assert [read(tmp_path / "checkpoints" / f"{n}.ckpt").content["epoch"] for n in ("previous", "last")] == [1, 2]


@pytest.mark.parametrize("most", [9, 20, -1, None])
def test_checkpoint_with_epochs_left_is_gone_on_with(most: int | None) -> None:
    Checkpoint(Path("last.ckpt"), {"epoch": 9}).check_epochs(most)


def test_checkpoint_with_more_epochs_than_wanted_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"9 epochs, more than trainer\.max_epochs=8\. Set .* above 9 .*export"):
        Checkpoint(Path("last.ckpt"), {"epoch": 9}).check_epochs(8)
