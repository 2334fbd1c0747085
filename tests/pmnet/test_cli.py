"""`pmnet info`: what it says of every kind of file, and of what is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pmnet.cli import described, main
from pmnet.files import file_hash
from pmnet.segment.recipe import SHIPPED
from pmnet.segment.segmenter import Segmenter


def test_shipped_head() -> None:
    facts = described("pmnet_lite")
    assert facts == described(SHIPPED / "pmnet_lite.safetensors")
    assert facts["sha256"] == file_hash(SHIPPED / "pmnet_lite.safetensors")
    assert facts["method"] == "pmnet.PMNet"
    assert facts["image size"] == "384 x 384"
    assert facts["backbone"].startswith("efficientnet_lite0, weights imagenet")
    assert "voc/cow" in facts["trained on"]
    assert facts["licence"].startswith("MIT")


@pytest.mark.slow
def test_class_file(tmp_path: Path) -> None:
    image, mask = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64)
    mask[10:40, 10:40] = 1
    segmenter = Segmenter.load("nearest", device="cpu")
    segmenter.fit({"cow": [(image, mask)] * 2, "pig": [(image, mask)]}, negatives={"cow": [image], "pig": []})
    segmenter.save(tmp_path / "two.safetensors")
    facts = described(tmp_path / "two.safetensors")
    assert facts["classes"] == "cow (2 examples), pig (1 example)"
    assert facts["method"] == "pmnet.Nearest"
    assert facts["values"] == "0" or int(facts["values"].replace(",", "")) < 10  # the photos do not count


def test_checkpoint_of_a_run(tmp_path: Path) -> None:
    content = {
        "state_dict": {"network.a": torch.zeros(3, 2)},
        "recipe": {"model": {"_target_": "pmnet.PMNet", "norm": "batch"}, "image_size": [64, 96]},
        "backbone": {"backbone": "small", "weights": "none", "source": "random", "sha256": "abc"},
        "record": {"dataset": "shapes", "base_classes": ["gear", "star"]},
        "epoch": 4,
    }
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "best.ckpt")
    facts = described(tmp_path)
    assert facts == described(tmp_path / "checkpoints" / "best.ckpt")
    assert (facts["tensors"], facts["values"], facts["epochs"]) == (1, "6", 5)
    assert facts["method"] == "pmnet.PMNet"
    assert facts["backbone"] == "small, weights none (random)"
    assert facts["trained on"] == "shapes, 2 classes: gear, star"


@pytest.mark.parametrize("about", ["{", "[]", '{"classes": [3], "model": 1, "needs": [], "training": "x"}'])
def test_metadata_of_any_kind(about: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"pmnet": about, "by": "me"})
    facts = described(tmp_path / "a.safetensors")
    assert facts["values"] == "2"
    assert facts["metadata"] == {"by": "me"}


def test_what_is_no_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.safetensors").write_bytes(json.dumps({}).encode())
    for name, text in {"no.ckpt": "There is no file", "broken.safetensors": "is not a readable file"}.items():
        with pytest.raises(SystemExit, match="1"):
            main(["info", str(tmp_path / name)])
        message = capsys.readouterr().err
        assert text in message
        assert message.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "pmnet", "info", "pmnet_lite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
