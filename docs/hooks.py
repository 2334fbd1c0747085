"""What the site finds by itself, so that a new method or benchmark is one new card and nothing is listed twice.

The cards of `docs/benchmarks/` and `docs/methods/` go into the navigation. Each card ends with the API of its module.
The table of methods comes from `conf/model/`: the name, the first comment of the file, and the card of its class.
`<!-- table of later numbers -->` shows `experiments/published_later.yaml`.
`<!-- modules of PACKAGE -->` becomes the API of each module of a package, `<!-- module NAME -->` that of one.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import yaml

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "conf" / "model"
SECTIONS = {"benchmarks": "datamodules.benchmarks", "methods": "pmnet.methods"}  # folder of cards -> package
LATER = ROOT / "experiments" / "published_later.yaml"
TABLE, NUMBERS = "<!-- table of methods -->", "<!-- table of later numbers -->"
API = re.compile(r"<!-- (module|modules of) ([\w.]+) -->")


def on_config(config: Any) -> Any:
    """Adds the cards to their sections of the navigation, sorted by title."""
    for section in config.nav:
        ((title, pages),) = section.items()
        if title.lower() in SECTIONS:
            pages += [f"{title.lower()}/{card.name}" for card in cards(title.lower())]
    return config


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fills in what the page asks for, and appends the API of its module to a card."""
    markdown = markdown.replace(TABLE, table_of_methods()).replace(NUMBERS, table_of_later_numbers())
    markdown = API.sub(lambda found: (api_of if found[1] == "module" else apis_of)(found[2]), markdown)
    folder, name = Path(page.file.src_uri).parent.name, Path(page.file.src_uri).stem
    if folder not in SECTIONS or not has_module(f"{SECTIONS[folder]}.{name}"):
        return markdown
    options = "members: false" if folder == "benchmarks" else "show_root_toc_entry: false"
    target = dataset_class(name) if folder == "benchmarks" else f"{SECTIONS[folder]}.{name}"
    return f"{markdown}\n\n## API\n\n::: {target}\n    options: {{heading_level: 3, {options}}}\n"


class Examples(griffe.Extension):
    """Lets the docstrings' `Example:` be what Griffe calls `Examples:`, so that it is shown as code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def cards(folder: str) -> list[Path]:
    """The cards of a folder, sorted by their titles."""
    found = (path for path in (ROOT / "docs" / folder).glob("*.md") if path.stem != "index")
    return sorted(found, key=lambda card: title_of(card).lower())


def title_of(card: Path) -> str:
    return card.read_text().splitlines()[0].lstrip("# ")


def apis_of(package: str) -> str:
    paths = sorted((ROOT / package.replace(".", "/")).glob("*.py"))
    return "\n".join(api_of(f"{package}.{path.stem}") for path in paths if not path.stem.startswith("_"))


def api_of(module: str) -> str:
    return f"::: {module}\n    options: {{heading_level: 3, show_root_full_path: true}}"


def has_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def dataset_class(name: str) -> str:
    """Full name of the dataset class in a benchmark's file."""
    source = (ROOT / "datamodules" / "benchmarks" / f"{name}.py").read_text()
    found = re.search(r"^class (\w+)\(Benchmark\)", source, re.MULTILINE)
    assert found, f"datamodules/benchmarks/{name}.py has no subclass of Benchmark"
    return f"datamodules.benchmarks.{name}.{found[1]}"


def table_of_methods() -> str:
    rows = [f"| `{path.stem}` | {linked(path.stem)} | {comment_of(path)} |" for path in sorted(MODELS.glob("*.yaml"))]
    return "\n".join(["| `model=` | card | what it is |", "| --- | --- | --- |", *rows])


@cache
def table_of_later_numbers() -> str:
    """A row for each method, training, backbone and benchmark; the best of a training and backbone last."""
    content = yaml.safe_load(LATER.read_text())
    scores: dict[tuple[str, ...], dict[int, float]] = {}
    for entry in content["entries"]:
        source = content["sources"][entry["source"]]
        text = f"[{source['where']}]({source['text']})" if source["text"].startswith("http") else source["where"]
        text += ", a copy" if entry.get("copied") else ""
        trained = entry.get("trained_on", entry["dataset"])
        trained += "; tuned on the target's supports" if "tuned_at_test" in entry else ""
        key = (entry["target"], trained, entry["backbone"], entry["method"], entry.get("venue", ""), text)
        scores.setdefault(key, {})[entry["shot"]] = entry["miou"]
    order = sorted(scores, key=lambda key: (*key[:3], scores[key].get(1, 0)))
    rows = [" | ".join((*key[:5], *(str(scores[key].get(shot, "")) for shot in (1, 5)), key[5])) for key in order]
    heads = ["tested on", "trained on", "backbone", "method", "venue", "1 shot", "5 shots", "read in"]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *(f"| {row} |" for row in rows)])


def linked(name: str) -> str:
    """Link to the card of a choice of `conf/model/`: its own, or that of the method it is a variant of."""
    for card in (ROOT / "docs" / "methods" / f"{stem}.md" for stem in (name, module_of(name))):
        if card.exists():
            return f"[{title_of(card)}]({card.name})"
    return ""


def module_of(name: str) -> str:
    """The file in `pmnet/methods/` of the class that a choice of `conf/model/` builds."""
    config = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    target = config.get("_target_") or (config.get("model") or {}).get("_target_")
    if target is None:
        return module_of(next(base for base in config["defaults"] if isinstance(base, str) and base != "_self_"))
    return target.removeprefix("pmnet.").removeprefix("methods.").split(".")[0].lower()


def comment_of(path: Path) -> str:
    """The first line of a yaml's comment."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next(line for line in lines if line and not line.startswith("@package"))
