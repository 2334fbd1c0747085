"""Exported graphs against the methods themselves; files of the hub against what was written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from pmnet.backbones import Backbone
from pmnet.cli import main
from pmnet.errors import CheckpointError, SettingError, WeightsError
from pmnet.methods import Head, Method
from pmnet.segment import export, hub
from pmnet.segment.recipe import Built, build, made
from pmnet.segment.segmenter import Segmenter
from tests.conftest import ROOT

SMALL = {"_target_": "pmnet.SmallBackbone", "weights": "quickstart"}
LITE = {"_target_": "pmnet.EfficientNetLiteBackbone", "weights": "imagenet"}
RESNET50 = {"_target_": "pmnet.ResNetBackbone", "name": "resnet50", "weights": "none"}
PMNET = {"_target_": "pmnet.PMNet"}
GROUPS = {"_target_": "pmnet.PMNet", "norm": "group", "linear_heads": True}
SHIPPED = {"_target_": "pmnet.PMNet", "evidence": ["prototype", "nearest"], "b3dconvs": False}
NEAREST = {"_target_": "pmnet.Nearest"}
SHAPES = [(1, 1, (64, 64), (64, 64)), (5, 2, (64, 96), (128, 64)), (2, 1, (96, 64), (64, 160))]


def random(model: dict, backbone: dict) -> Built:
    """A method with random weights of its head, and of a backbone that has none."""
    torch.manual_seed(0)
    method = made(model, Method, made(backbone, Backbone))
    recipe = {"model": model, "backbone": backbone, "image_size": [64, 96], "name": "test"}
    return Built(method.eval(), recipe | {"needs": method.backbone.provenance.as_dict()})


def check(built: Built, see, segment, shapes=SHAPES) -> None:
    """Runs both graphs, given as functions of arrays, beside the method: other sides, shots and batches."""
    for shots, batch, of_support, of_query in shapes:
        support, masks, _ = export.example(of_support, shots, 1)
        query = export.example(of_query, 1, batch)[2]
        with torch.no_grad():
            want = built.method.segment(query, built.method.see(support, masks))
        got = torch.as_tensor(segment(query, see(support, masks)))
        tolerance = export.TOLERANCE * want.abs().max()
        assert (got - want).abs().max() <= tolerance, (shots, of_support, of_query)
        clear = (want[:, 1] - want[:, 0]).abs() > tolerance  # where rounding cannot decide
        assert clear.float().mean() > 0.99
        assert torch.equal((got[:, 1] > got[:, 0])[clear], (want[:, 1] > want[:, 0])[clear])


def sessions(folder: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    see, segment = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("see", "segment"))
    names = [value.name for value in see.get_outputs()]
    assert [value.name for value in segment.get_inputs()] == ["query", *names]

    def run_see(support, masks):
        return see.run(None, {"support": support.numpy(), "masks": masks.numpy()})

    def run_segment(query, seen):
        return segment.run(["logits"], {"query": query.numpy(), **dict(zip(names, seen, strict=True))})[0]

    return run_see, run_segment


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, backbone",
    [(PMNET, RESNET50), (PMNET, LITE), (GROUPS, SMALL), (NEAREST, LITE), (SHIPPED, LITE)],
    ids=["pmnet-resnet50", "pmnet-lite", "dam-small", "nearest-lite", "shipped-lite"],
)
def test_onnx_graphs_compute_the_logits_of_the_method(model: dict, backbone: dict, tmp_path: Path) -> None:
    built = random(model, backbone)
    graphs = export.graphs(built)
    assert graphs.size is None, "the sides may vary"
    export.write_onnx(graphs, tmp_path)
    check(built, *sessions(tmp_path))
    assert export.compare(built, graphs, tmp_path) <= export.TOLERANCE


@pytest.mark.slow
def test_torch_graphs_compute_the_logits_of_the_method(tmp_path: Path) -> None:
    built = random(PMNET, SMALL)
    export.write_torch(export.graphs(built), tmp_path)
    see, segment = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("see", "segment"))
    with torch.no_grad():
        check(built, see, segment)


@pytest.mark.slow
def test_fixed_sides() -> None:
    built = random(NEAREST, SMALL)
    graphs = export.graphs(built, dynamic=False)
    assert "64 x 96" in graphs.takes
    with torch.no_grad():
        check(built, graphs.see.module(), graphs.segment.module(), [(3, 2, (64, 96), (64, 96))])


def test_plain_pmnet_computes_what_pmnet_does() -> None:
    for model in (GROUPS, PMNET | {"support_background": False}, PMNET | {"b3dconvs": False}):
        built = random(model, SMALL)
        support, masks, query = export.example((64, 96), shots=3, batch=1)
        with torch.no_grad():
            want = built.method(query, support, masks)
            with export.plain():
                got = built.method(query, support, masks)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class PickyHead(Head):
    def segment(self, query_feats, seen, size):
        value = query_feats["layer4"][-1].mean()
        return torch.full((1, 2, *size), 1.0) if value > 0 else torch.zeros(1, 2, *size)


class Picky(Method):
    query_reads = support_reads = {"layer4": "last"}

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, PickyHead())


@pytest.mark.slow
def test_methods_that_cannot_be_exported_are_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    votes = random({"_target_": "pmnet.methods.hsnet.HSNet"}, SMALL)
    with pytest.raises(SettingError, match=r"HSNet cannot be exported as a graph \(each shot votes.* pmnet, nearest,"):
        export.graphs(votes, dynamic=False)
    picky = Picky(votes.method.backbone).eval()
    capfd.readouterr()
    with pytest.raises(
        SettingError,
        match=r"Picky cannot be exported as a graph .*torch.export cannot follow its steps: .* pmnet, nearest,",
    ):
        export.graphs(Built(picky, votes.recipe), dynamic=False)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_example_segments_without_torch(tmp_path: Path) -> None:
    """As in the docs: in a process that cannot import torch, and with the method's own mask."""
    pytest.importorskip("onnxruntime")
    with pytest.raises(SystemExit, match="0"):
        main(["export", "nearest", "--out", str(tmp_path)])
    noise = np.random.default_rng(0)
    for name, size in (("example", (90, 120)), ("image", (100, 70))):
        Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((90, 120), np.uint8)
    mask[20:70, 30:90] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    files = [str(tmp_path / name) for name in ("", "example.png", "mask.png", "image.png", "found.png")]
    script = ROOT / "docs/examples/onnx_segment.py"
    subprocess.run([sys.executable, "-c", code, script, *files], check=True, cwd=tmp_path)

    def pixels(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(tmp_path / name).resize((384, 384)))).permute(2, 0, 1)

    shown = torch.from_numpy(np.array(Image.open(tmp_path / "mask.png").resize((384, 384), Image.Resampling.NEAREST)))
    method = build("nearest").method
    want = method.predict(pixels("image.png")[None], pixels("example.png")[None, None], (shown > 0)[None, None].byte())
    found = np.array(Image.open(tmp_path / "found.png"))
    small = Image.fromarray(want[0].numpy().astype(np.uint8) * 255).resize((70, 100), Image.Resampling.NEAREST)
    assert found.shape == (100, 70)
    assert (found == np.array(small)).mean() > 0.999


# Files of the hub


def test_safetensors_file_is_the_head_and_says_how_it_is_built(tmp_path: Path) -> None:
    built = random(PMNET, SMALL)
    facts = {"training": {"dataset": "shapes", "base_classes": ["gear", "star"]}, "licence": "mit"}
    hub.write(Built(built.method, built.recipe | facts), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.safetensors"]
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == built.method.saved()
        assert not [name for name in file.keys() if name.startswith("backbone.")]  # noqa: SIM118
        recipe = json.loads(file.metadata()["pmnet"])
    assert recipe["needs"]["sha256"] == built.method.backbone.provenance.sha256
    assert recipe["training"] == facts["training"]
    new = tmp_path / "new"
    new.touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == new.stat().st_mode  # others may read it as usual
    again = build(tmp_path / "model.safetensors")
    for name, tensor in built.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], tensor), name
    assert hub.built_with_facts(tmp_path / "model.safetensors").recipe["licence"] == "mit"


def test_card_of_the_shipped_head(tmp_path: Path) -> None:
    """What the file says of its training and licence is on the card, and stays in the file."""
    with pytest.raises(SystemExit, match="0"):
        main(["export", "pmnet_lite", "--out", str(tmp_path), "--format", "safetensors"])
    card = (tmp_path / "README.md").read_text()
    assert "license: mit\n" in card
    assert "not stated" not in card
    assert "voc/cow" in card
    first, second = (build(source).recipe for source in ("pmnet_lite", tmp_path / "model.safetensors"))
    assert second["training"] == first["training"]
    assert second["licence"] == first["licence"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml")))
def test_head_of_every_method_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", [f"model={name}", "backbone.weights=none"])
    model, backbone = (OmegaConf.to_container(config[group], resolve=True) for group in ("model", "backbone"))
    torch.manual_seed(0)
    method = made(model, Method, made(backbone, Backbone)).eval()
    recipe = {"model": model, "backbone": backbone, "image_size": [64, 96], "name": name}
    hub.write(Built(method, recipe | {"needs": method.backbone.provenance.as_dict()}), tmp_path)
    segmenter = Segmenter.load(tmp_path / "model.safetensors", device="cpu")
    assert type(segmenter.method) is type(method)
    for key, tensor in method.state_dict().items():
        assert torch.equal(segmenter.method.state_dict()[key], tensor), key


def test_checkpoint_of_a_run_says_what_it_was_trained_on(tmp_path: Path) -> None:
    built = random(PMNET, SMALL)
    state = built.method.state_dict()
    content = {
        "state_dict": {f"network.{name}": state[name] for name in built.method.saved()},
        "recipe": {name: built.recipe[name] for name in ("model", "backbone", "image_size")},
        "backbone": built.recipe["needs"],
        "record": {"dataset": "shapes", "fold": 2, "base_classes": ["gear"]},
    }
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run/checkpoints/best.ckpt")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(tmp_path / "run"), "--out", str(out), "--format", "safetensors", "--license", "mit"])
    card = (out / "README.md").read_text()
    for fact in ("# run", "shapes; fold 2; classes: gear", "license: mit", built.recipe["needs"]["sha256"]):
        assert fact in card, fact


def test_segmenter_of_a_folder(tmp_path: Path) -> None:

    built = random(PMNET, SMALL)
    Segmenter(built).save_pretrained(tmp_path)
    segmenter = Segmenter.from_pretrained(tmp_path, device="cpu")
    support, masks, query = export.example((64, 96), shots=1, batch=1)
    with torch.no_grad():
        got, want = (method(query, support, masks) for method in (segmenter.method, built.method))
    assert torch.equal(got, want)


def test_nothing_is_fetched_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda *where: asked.append(where))
    with pytest.raises(WeightsError, match="download=True"):
        hub.weights_of("owner/name", None, download=False)
    with pytest.raises(WeightsError, match=r"There is no model\.safetensors"):
        hub.weights_of(tmp_path, None, download=False)
    with pytest.raises(WeightsError, match="no repository can have this name"):
        hub.weights_of("no/such/folder", None, download=False)
    assert not asked


def test_a_backbone_of_a_file_is_refused(tmp_path: Path) -> None:
    built = random(PMNET, SMALL)
    recipe = built.recipe | {"backbone": SMALL | {"weights": "outputs/run/backbone.safetensors"}}
    with pytest.raises(SettingError, match="a file of this machine"):
        hub.write(Built(built.method, recipe), tmp_path)


def test_push_uploads_the_head_and_the_card_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done = {}

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            done.update(private=private)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            done.update(files=sorted(path.name for path in Path(folder_path).iterdir()))
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)

    assert Segmenter(random(PMNET, SMALL)).push_to_hub("owner/name").endswith("owner/name")
    assert done == {"private": True, "files": ["README.md", "model.safetensors"]}


def test_wrong_logits_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Wrong:
        def __init__(self, path: Path) -> None:
            self.path = path

        def get_inputs(self) -> list:
            return [type("Value", (), {"name": "query"})]

        def run(self, names: object, inputs: dict) -> list:
            return [] if "support" in inputs else [np.zeros((1, 2, 64, 96), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(CheckpointError, match="differ from the method's"):
        export.compare(random(NEAREST, SMALL), export.Graphs(None, None, [], None), tmp_path)


def test_files_that_onnxruntime_cannot_run_are_one_message(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "see.onnx").write_bytes(b"none")
    with pytest.raises(SettingError, match=r"onnxruntime cannot run .* Use --format torch"):
        export.compare(random(NEAREST, SMALL), export.Graphs(None, None, [], None), tmp_path)
