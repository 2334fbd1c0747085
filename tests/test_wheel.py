"""The library as it is installed: the built wheel and sdist, in an environment without the framework."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
SEGMENT = """
import torch
from pmnet import EfficientNetLiteBackbone, Nearest, PMNet
backbone = EfficientNetLiteBackbone("imagenet")
query, support, masks = torch.rand(1, 3, 96, 96), torch.rand(1, 2, 3, 96, 96), torch.ones(1, 2, 96, 96)
assert Nearest(backbone, "layer4").predict(query, support, masks).all()
assert PMNet(backbone).eval()(query, support, masks).shape == (1, 2, 96, 96)
"""


def needed(name: str, known: dict[str, object]) -> dict[str, object]:
    """The distributions that a requirement brings, with all that these require, without extras."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in known:
        known[key] = distribution(name)
        for line in known[key].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                try:
                    needed(requirement.name, known)
                except PackageNotFoundError:
                    continue  # of another platform
    return known


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


def installed(folder: Path, archive: Path, extra: str = "") -> Path:
    """The Python of a clean environment that holds the archive and links to what it requires, nothing else.

    Args:
        extra: whose requirements it holds too.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", archive]
    subprocess.run(pip, check=True, capture_output=True, cwd=folder)
    site = next(folder.glob("lib/python*/site-packages"))
    found: dict[str, object] = {}
    for line in distribution("pmnet").requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": name}) for name in ("", extra)):
            needed(requirement.name, found)
    for dist in found.values():
        for top in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(dist.locate_file(top))
    return python


@pytest.fixture(scope="module", params=["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def python(request, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("clean"), next(built.glob(request.param)))


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    folder = python.parents[1]  # outside the checkout
    return subprocess.run(
        [python, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_wheel_holds_the_library_alone(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pmnet"}
    assert {"pmnet/py.typed", "pmnet/weights/small_quickstart.safetensors"} <= set(names)
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "pmnet").rglob("*") if path.is_file()}
    own = {path for path in own if "__pycache__" not in path}
    assert {"pmnet/cli.py", "pmnet/segment/paint.js", "pmnet/weights/pmnet_lite.safetensors"} <= own
    assert own <= set(names)


def test_library_segments_without_the_framework(python: Path) -> None:
    done = run(python, "-c", SEGMENT)
    assert done.returncode == 0, done.stderr
    lacking = run(python, "-c", "import pmnet.training")
    assert "pip install 'pmnet[framework]'" in lacking.stderr


def test_command_runs(python: Path) -> None:
    command = python.with_name("pmnet")
    for arguments in (["--help"], ["info", "--help"]):
        done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "usage: pmnet" in done.stdout
    weights = next(python.parents[1].glob("lib/python*/site-packages/pmnet/weights/small_quickstart.safetensors"))
    done = subprocess.run([command, "info", weights], capture_output=True, text=True, check=False)
    assert re.search(r"values +907,", done.stdout) or re.search(r"tensors +\d+", done.stdout), done.stderr


def test_command_segments_with_the_shipped_head(python: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), np.uint8)
    for name, pixels in zip(("shown/a.jpg", "photos/b.jpg"), noise, strict=True):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(pixels).save(tmp_path / name)
    mask = np.zeros((90, 120), np.uint8)
    mask[20:70, 30:90] = 255
    Image.fromarray(mask).save(tmp_path / "shown/a.png")
    arguments = "--support", tmp_path / "shown", "--images", tmp_path / "photos", "--out", tmp_path / "out"
    done = run(python, "-m", "pmnet", "segment", *arguments)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out/b.png").size == (120, 90)


def test_import_loads_nothing_heavy(python: Path) -> None:
    heavy = "{'timm', 'torchvision', 'matplotlib', 'lightning', 'hydra', 'wandb'}"
    done = run(python, "-c", f"import pmnet, sys; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr
