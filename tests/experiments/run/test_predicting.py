"""mode=predict against `pmnet segment` with the same examples."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.errors import UserError
from experiments.files import read_json
from experiments.run import results
from experiments.run.predicting import predict
from pmnet.errors import SettingError
from tests.conftest import ROOT
from tests.pmnet.segment.test_folder import command, examples
from tests.pmnet.segment.test_segmenter import picture, write


def predicted(out: Path, **options: object) -> None:
    given = [f"predict.{name}={value}" for name, value in options.items()]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", ["mode=predict", "ckpt=nearest", "trainer.accelerator=cpu", *given])
    out.mkdir()
    predict(cfg, out)


@pytest.mark.slow
def test_masks_are_those_of_pmnet_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "origin", lambda cfg: {})  # it asks the job that Hydra started
    support, negatives = examples(tmp_path / "examples"), tmp_path / "negatives"
    write(negatives / "n.png", picture(7)[0])
    for k in (4, 5):
        write(tmp_path / "photos" / f"{k}.png", picture(k)[0])
    predicted(tmp_path / "a", support=support, images=tmp_path / "photos", negatives=negatives)
    words = ("--support", support, "--images", tmp_path / "photos", "--negatives", negatives, "--head", "nearest")
    assert command("segment", *words, "--out", tmp_path / "b", "--device", "cpu") == 0
    for name in ("4.png", "5.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_json(tmp_path / "a" / "results.json")["classes"] == ["examples"]


@pytest.mark.parametrize("name", ["support", "images", "negatives"])
def test_folders_that_are_not_there(name: str, tmp_path: Path) -> None:
    folders = {"support": tmp_path, "images": tmp_path} | {name: tmp_path / "nowhere"}
    with pytest.raises(UserError, match=f"predict.{name}: there is no .*nowhere"):
        predicted(tmp_path / "out", **folders)


def test_negatives_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    support = examples(tmp_path / "examples")
    with pytest.raises(SettingError, match=r"There is no image in .*empty"):
        predicted(tmp_path / "out", support=support, images=support, negatives=tmp_path / "empty")
