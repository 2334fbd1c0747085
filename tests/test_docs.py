"""The documentation says what is: its commands, links, code blocks and tables are tried.

Python blocks after `<!-- runs -->` are executed; blocks after `<!-- file: PATH -->` are the example of CONTRIBUTING.md.
"""

import argparse
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from glob import glob
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from markdown.extensions.toc import slugify
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from datamodules.benchmarks.base import Benchmark
from datamodules.registry import all_datasets
from pmnet import PMNet, ResNetBackbone
from pmnet.methods import all_methods
from tests.conftest import ROOT, TINY, results, run

CONF = ROOT / "conf"
PAGES = sorted(
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        *glob("docs/**/*.md", root_dir=ROOT, recursive=True),
    )
)
PROJECT = ("pmnet", "datamodules", "experiments")
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:srun )?(?:\.venv/bin/)?(?P<command>(?:python|pmnet|make) .+)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# What is on the pages


class Block(NamedTuple):
    """A fenced block of code, and the comment in the line above it."""

    language: str
    comment: str
    code: str


@cache
def blocks(page: Path) -> list[Block]:
    fence = re.compile(
        r"(?:^ *<!-- (?P<comment>.*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```",
        re.MULTILINE | re.DOTALL,
    )
    return [
        Block(found["language"], found["comment"] or "", textwrap.dedent(found["code"]))
        for found in fence.finditer(page.read_text())
    ]


@cache
def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> Iterator[str]:
    """Lines of indented blocks, and whatever stands in backticks."""
    joined = prose(page).replace("\\\n", " ")
    yield from (line.strip() for line in joined.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", prose(page))


def commands() -> list[str]:
    """Every different command of this project on the pages."""
    found = (COMMAND.fullmatch(line) for page in PAGES for line in shell_lines(page))
    return sorted({match["command"] for match in found if match})


def words(command: str, example: Path) -> list[str]:
    """The words of a command; placeholders become names, /path/to the folder of the example."""
    filled = re.sub(r"<[^>]*>", "placeholder", command.split(" > ")[0]).replace("/path/to", str(example))
    return shlex.split(filled, comments=True)


def test_pages_have_commands_and_code():
    assert len(commands()) > 40
    assert sum(block.language == "python" for page in PAGES for block in blocks(page)) > 10


# Commands


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """A folder with what CONTRIBUTING.md says to save, and with images for its dataset."""
    root = tmp_path_factory.mktemp("pasted")
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if block.comment.startswith("file: "):
            path = root / block.comment.removeprefix("file: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "white": (200, 200, 200)}
    for name, colour in colours.items():
        (root / "data" / "shades" / name).mkdir(parents=True)
        for i in range(4):
            image = np.zeros((48, 64, 3), np.uint8)
            image[4 * i : 4 * i + 24, 8 * i : 8 * i + 32] = colour
            Image.fromarray(image).save(root / "data" / "shades" / name / f"{i}.png")
    return root


def composed(arguments: list[str]) -> DictConfig:
    """The config of `python run.py <arguments>`; of a sweep, that of its first job."""
    args = get_args_parser().parse_args(arguments)
    overrides = [first_of(override) for override in args.overrides]
    if args.config_dir:
        overrides.append(f"hydra.searchpath=[file://{args.config_dir}]")
    return compose("config", overrides, return_hydra_config=True)


def first_of(text: str) -> str:
    """An override with its first value, after looking whether the others are choices too."""
    override = OverridesParser.create().parse_override(text)
    if not override.is_sweep_override():
        return text
    if not override.is_choice_sweep():
        return f"{override.get_key_element()}={override.value().start}"
    values = list(override.sweep_string_iterator())
    if (CONF / override.key_or_group).is_dir():
        assert all((CONF / override.key_or_group / f"{value}.yaml").is_file() for value in values), text
    return f"{override.get_key_element()}={values[0]}"


class Parsed(Exception):
    """Carries what a command's parser made of its arguments, before the command does anything."""


def parsed(module: str, arguments: list[str], monkeypatch) -> argparse.Namespace | None:
    """Runs `python -m <module> <arguments>` up to its parser; None if that only printed something."""

    def stop_after(parse):
        def parse_and_stop(self, args=None, namespace=None):
            raise Parsed(parse(self, args, namespace))

        return parse_and_stop

    package = hasattr(import_module(module), "__path__")
    main = import_module(f"{module}.__main__" if package else module).main
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises((Parsed, SystemExit)) as caught:
            main()
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 0, f"{module} refuses {arguments}"
        return None
    return caught.value.args[0]


@pytest.fixture(scope="module")
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command, example, conf, monkeypatch):
    program, *arguments = words(command, example)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if word.isidentifier()} <= set(targets)
    elif arguments[:1] == ["run.py"]:
        composed(arguments[1:])
    elif program == "pmnet":
        parsed("pmnet", arguments if len(arguments) > 1 else [*arguments, "--help"], monkeypatch)
    elif arguments[0] == "-m" and arguments[1].split(".")[0] in PROJECT:
        args = parsed(arguments[1], arguments[2:] or ["--help"], monkeypatch)
        composed(getattr(args, "overrides", []))


def test_a_wrong_command_would_be_noticed(example, conf, monkeypatch):
    with pytest.raises(Exception, match="Could not override"):
        composed(["trainer.max_epoch=3"])
    with pytest.raises(AssertionError):
        composed(["fold=0,7", "-m"])
    with pytest.raises(AssertionError, match="refuses"):
        parsed("datamodules.prepare", ["pascal", "--dowload"], monkeypatch)


# Settings in running text


@cache
def known_keys() -> set[str]:
    """Dotted names of all values: of the default config, and of every file in conf/."""
    keys: set[str] = set()

    def walk(prefix: str, node: object) -> None:
        keys.add(prefix)
        if isinstance(node, dict):
            for name, value in node.items():
                walk(f"{prefix}.{name}".lstrip("."), value)

    walk("", OmegaConf.to_container(compose("config")))
    for path in CONF.glob("*/*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(path))
        content.pop("defaults", None)
        whole = "@package _global_" in path.read_text()
        for group in ("dataset", "target", "validation") if path.parent.name == "dataset" else (path.parent.name,):
            walk("" if whole else group, content)
    return keys


@every_page
def test_settings_in_running_text_exist(page, conf):
    for text in re.findall(r"`'?([\w.@]+=[^`\n]*?)'?`", prose(page)):
        for setting in text.split():
            key, _, value = setting.partition("=")
            group = CONF / {"target": "dataset", "validation": "dataset"}.get(key, key)
            if key.isupper() or key.startswith("hydra.") or not value:
                continue
            if page.parent.name == "methods" and "." not in key and not group.is_dir():
                continue  # cards also name options of the authors' programs
            if group.is_dir():
                choices = [v for v in value.split(",") if v not in ("...", "NAME", "null")]
                assert all((group / f"{choice}.yaml").is_file() for choice in choices), setting
            else:
                assert key in known_keys(), setting


# Links and paths


@every_page
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked), re.MULTILINE)
            assert anchor in {slugify(heading.replace("`", ""), "-") for heading in headings}, target


@every_page
def test_no_path_of_somebodys_machine(page):
    assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp|Users|mnt|opt)/\w", page.read_text())


# Code blocks


@every_page
def test_code_blocks_are_well_formed(page):
    for block in blocks(page):
        assert block.language in ("python", "yaml"), f"```{block.language}"
        if block.language == "python":
            compile(block.code, str(page), "exec")
        else:
            assert isinstance(yaml.safe_load(block.code), dict)


def runnable() -> list[tuple[Path, str]]:
    """Page and code; a block that continues the one before comes together with it."""
    found: list[tuple[Path, str]] = []
    for page in PAGES:
        for block in blocks(page):
            if block.comment == "runs":
                found.append((page, block.code))
            elif block.comment.startswith("runs, after"):
                found[-1] = (page, found[-1][1] + block.code)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page, code", runnable(), ids=lambda value: value.stem if isinstance(value, Path) else "")
def test_python_blocks_run(page, code, tmp_path, monkeypatch):
    """Small random weights stand for those that would have to be downloaded."""
    random = np.random.default_rng(0)
    for name, shape in (("support.jpg", (60, 80, 3)), ("support_mask.png", (60, 80)), ("query.jpg", (90, 70, 3))):
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(tmp_path / name)
    if "best.ckpt" in code:
        network = PMNet(ResNetBackbone("resnet18", weights="none"))
        saved = {f"network.{name}": network.state_dict()[name] for name in network.saved()}
        (tmp_path / "outputs/my-run/checkpoints").mkdir(parents=True)
        torch.save({"state_dict": saved}, tmp_path / "outputs/my-run/checkpoints/best.ckpt")
    monkeypatch.chdir(tmp_path)
    small = code.replace('"resnet50", weights="a1h", download=True', '"resnet18", weights="none"')
    assert "download" not in small
    exec(compile(small, str(page), "exec"), {"__name__": "pasted"})
    if "found.png" in code:
        assert Image.open("found.png").size == (384, 384)


# The example of CONTRIBUTING.md


def test_the_examples_own_test_passes(example, monkeypatch):
    monkeypatch.syspath_prepend(example)
    pasted: dict = {"__name__": "pasted"}
    exec(compile((example / "example/test_guided.py").read_text(), "test_guided.py", "exec"), pasted)
    torch.manual_seed(0)
    pasted["test_repeating_a_support_changes_nothing"]()


@pytest.mark.slow
def test_example_method_dataset_and_backbone_train_and_test(example, tmp_path):
    tiny = [o for o in TINY if not o.startswith(("dataset=", "backbone"))]
    chosen = ["model=guided", "dataset=shades", "backbone=plain", f"data={example / 'data'}", "trainer.max_epochs=2"]
    folder = [f"hydra.run.dir={tmp_path / 'run'}"]
    flag = f"--config-dir={example / 'example/conf'}"
    done = run(flag, *tiny, *chosen, *folder, env={"PYTHONPATH": str(example)})
    assert done.returncode == 0, done.stderr
    record = results(tmp_path / "run")
    assert list(record["test"]["iou_per_class"]) == ["red", "green"]
    assert record["training"]["base_classes"] == ["blue", "white"]
    assert record["parameters"]["learnable"] == 2 * (2 * 32 + 1)


# Cards and tables


def test_every_benchmark_has_a_card_with_its_facts():
    for name, kind in all_datasets().items():
        if not issubclass(kind, Benchmark):
            continue
        card = (ROOT / "docs/benchmarks" / f"{name}.md").read_text()
        facts = re.findall(r"https?://[^\s;]*\w", sys.modules[kind.__module__].__doc__)
        facts += [kind.title, f"{kind.test_length:,}"]
        if isinstance(kind.__dict__.get("classes"), tuple) and len(kind.classes) <= 20:
            facts += kind.classes
        assert not [fact for fact in facts if fact not in card], name


def test_every_method_has_a_card():
    assert not [name for name in all_methods() if not (ROOT / "docs/methods" / f"{name}.md").is_file()]


@pytest.mark.slow
def test_published_numbers_in_the_table_of_experiments(conf):
    page = (ROOT / "docs/benchmarks.md").read_text()
    rows = re.findall(r"^\| (\d) \| [^|]+ \| `(\w+)` \| ([\d.]+) \| ([\d.]*) ?\|$", page, re.MULTILINE)
    published = yaml.safe_load((ROOT / "experiments/published.yaml").read_text())
    for table, experiment, *shown in rows:
        choices = composed([f"experiment={experiment}"]).hydra.runtime.choices
        ablation = re.search(r"no_b3dconvs|no_background", experiment)
        setting = {
            "table": int(table),
            "method": "PMNet",
            "ablation": ablation[0] if ablation else None,
            "target": choices.get("target") or choices["dataset"],
            **{name: choices[name] for name in ("dataset", "backbone", "task")},
        }
        for shot, text in zip((1, 5), shown, strict=True):
            wanted = [e["miou"] for e in published if all(e.get(k) == v for k, v in (setting | {"shot": shot}).items())]
            assert wanted == ([float(text)] if text else []), (experiment, shot)
    of_pmnet = {experiment for _, experiment, *_ in rows}
    with_methods = {f"{experiment}_{model.stem}" for experiment in of_pmnet for model in CONF.glob("model/*.yaml")}
    experiments = {path.stem for path in CONF.glob("experiment/table*.yaml")}
    assert of_pmnet <= experiments <= of_pmnet | with_methods


# The site


class Loaded(HTMLParser):
    """Addresses of what a page loads by itself: scripts, styles, pictures, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return
        if tag in ("script", "img", "iframe", "link", "source", "video", "audio", "object"):
            self.found += [given[name] or "" for name in ("src", "href", "data", "srcset") if name in given]


@pytest.mark.slow
def test_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert not [address for address in loaded.found if re.match(r"(\w+:)?//", address)], page
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", page.read_text()), page
        assert str(ROOT) not in page.read_text(), page
        assert not re.search(r"<(p|li|h1)[^>]*>\s*(python (run|-m)|make )", page.read_text()), (
            f"{page}: code shown as text"
        )
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", style.read_text()), style
    assert 'href="prototype.html"' in (tmp_path / "methods/index.html").read_text()
    assert "GuidedHead" in (tmp_path / "contributing.html").read_text()
