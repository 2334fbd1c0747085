"""The commands `prepare`, `show` and `episodes`, each with one benchmark as an example."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, run_module
from tests.data import deepglobe, pascal
from tests.datamodules.benchmarks.published_loop import golden

pytestmark = pytest.mark.slow

# prepare


def test_prepare_and_check(published, tmp_path):
    words = ["deepglobe", "--root", str(tmp_path)]
    done = run_module("datamodules.prepare", *words, "--source", str(published("deepglobe") / "archive.zip"))
    assert done.returncode == 0, done.stderr
    assert all(note in done.stdout for note in deepglobe.NOTES)
    assert run_module("datamodules.prepare", *words, "--check").returncode == 0
    (tmp_path / "deepglobe" / "manifest.json").unlink()
    done = run_module("datamodules.prepare", *words, "--check")
    assert done.returncode == 1
    assert "no manifest" in done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        ("isic", "ISIC2018_Task1-2_Training_Input.zip"),
        ("deepglobe --download", "kaggle.com/datasets/balraj98"),
        ("coco --source nowhere", "nowhere.*--source"),
        ("suim --check", "SUIM is not at"),
    ],
)
def test_prepare_says_what_it_needs(words, says, tmp_path):
    done = run_module("datamodules.prepare", *words.split(), "--root", str(tmp_path))
    assert done.returncode == 1
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr


def test_prepare_warns_if_the_lists_are_not_the_published_ones(published, tmp_path):
    done = run_module("datamodules.prepare", "isic", "--root", str(tmp_path), "--source", str(published("isic")))
    assert done.returncode == 0, done.stderr
    assert re.search("compar.*published ones.*--splits", done.stdout)


def test_full_disk_is_one_message_and_the_same_command_then_succeeds(published, tmp_path):
    words = ["fss", "--root", str(tmp_path), "--source", str(published("fss"))]
    command = f"ulimit -f 4; {sys.executable} -m datamodules.prepare {' '.join(words)}"  # no file over 4 kB
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "fss").exists()
    assert run_module("datamodules.prepare", *words).returncode == 0


@pytest.mark.slow
def test_killed_preparation_is_resumed(prepared, tmp_path):
    """Killed soon after the first files are in place, three times; then it runs to the end."""
    pascal.write(tmp_path / "source")
    words = ["pascal", "--source", str(tmp_path / "source"), "--root", str(tmp_path / "data")]
    command = [sys.executable, "-m", "datamodules.prepare", *words]
    ready = tmp_path / "data" / "pascal"
    for wait in (0.0, 0.15, 0.3):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and not list((tmp_path / "data").glob(".pascal.part/ready/JPEGImages/*")):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not ready.exists() or (ready / "manifest.json").exists()
    done = run_module("datamodules.prepare", *words)
    assert done.returncode == 0, done.stderr
    kept = json.loads((prepared("pascal") / "manifest.json").read_text())
    manifest = json.loads((ready / "manifest.json").read_text())
    assert all(manifest[key] == kept[key] for key in ("files", "lists", "rules"))


# show


def test_show_draws_a_contact_sheet_and_a_table(prepared, tmp_path):
    data, sheet = prepared("pascal").parent, tmp_path / "a.png"
    done = run_module("datamodules.show", "dataset=pascal", "fold=1", f"data={data}", "--out", str(sheet))
    assert done.returncode == 0, done.stderr
    assert "images to train" in done.stdout
    assert "7 cat" in done.stdout
    picture = np.array(Image.open(sheet).convert("RGB"))
    assert picture.shape[0] > 1000
    outline = (np.abs(picture.astype(int) - (255, 255, 60)).sum(axis=2) < 40).mean()
    assert 0.001 < outline < 0.2


# episodes


def test_episodes_writes_the_golden_list_and_opens_no_image(shared):
    done = run_module("datamodules.episodes", "dataset=pascal", "fold=0", "shot=5", "dataset.splits=../shared/splits")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == golden(shared, "pascal_fold0_5shot")
    assert "published lists" in done.stderr


@pytest.mark.parametrize(
    "overrides, first",
    [
        ("dataset=isic shot=5 dataset.splits=../shared/splits", "ISIC_00"),
        ("task=cross_dataset target=fss fold=2 target.splits=../shared/splits", "abe's_flyingfish/1.jpg"),
        ("dataset=fss dataset.splits=../shared/splits", "abe's_flyingfish/1.jpg"),
    ],
)
def test_episodes_knows_every_setting(shared, overrides, first):
    done = run_module("datamodules.episodes", *overrides.split())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0][0].startswith(first)


def test_episodes_says_what_is_missing(tmp_path):
    done = run_module("datamodules.episodes", "dataset=deepglobe", f"data={tmp_path}")
    assert done.returncode == 1
    assert "python -m datamodules.prepare deepglobe" in done.stderr
    assert "Traceback" not in done.stderr
