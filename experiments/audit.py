"""Audits runs: what was each number trained, selected and tuned on? `python -m experiments.audit RUN...`

RUN is the folder of a run, or a folder with many of them, such as a sweep. From the records of a run, its lists of
images are rebuilt: those that trained the backbone and the head, those that chose the epoch, and those of the test.
Test images that are among the others are found by name, by equal pixels, and as near-duplicates: saved again, resized,
or mirrored. The answers are printed and written to audit.json in the run's folder.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datamodules import FewShotDataModule, FewShotDataset
from datamodules.episodes.episode import EpisodeSpec
from datamodules.episodes.module import lists_of
from datamodules.episodes.pixels import LabelledDataModule
from datamodules.episodes.sampler import json_hash, list_hash
from datamodules.errors import DatasetError
from datamodules.registry import all_datasets
from experiments.errors import UserError
from experiments.files import read_json, write_json
from experiments.prints import Album, like, nearest
from experiments.report.collect import Job, collect
from experiments.report.made import digest, pretraining
from experiments.report.renderings import wide_console
from experiments.run.checkpoints import lineage
from pmnet.errors import PMNetError

EXAMPLES = 5
ROLES = ("dataset", "target", "validation")
CLEAN = "nothing tested was trained or tuned on"
CHANGED = "unknown: the data or the code that draws episodes have changed, the test list is another one"
Masks = Mapping[str, set[str]]  # name of an image -> common names of the classes whose masks were used


class Match(NamedTuple):
    """A test image that was used.

    Attributes:
        tested: name of the test image.
        used: name of the image that was used.
        how: "same name", "same pixels", "mirrored" or "near-duplicate".
        correlation: of the two thumbnails.
        mask: whether the mask of a tested class was used too.
    """

    tested: str
    used: str
    how: str
    correlation: float
    mask: bool


@dataclass
class Used:
    """Images that a part of a run used.

    Attributes:
        what: the images in words.
        album: where they are; None if they are not at hand.
        masks: the images and their classes.
        changed: whether the lists are not those of the run any more.
        of: name of the dataset.
        classes: names of the classes, in that dataset.
        data: the data module of a training.
    """

    what: str
    album: Album | None = None
    masks: Masks = field(default_factory=dict)
    changed: bool = False
    of: str = ""
    classes: Sequence[str] = ()
    data: FewShotDataModule | None = None

    @property
    def unknown(self) -> str:
        """Why it cannot be said what is among these images; empty if it can."""
        if self.changed:
            return f"{self.what}: its lists have changed"
        return "" if self.album else self.what

    def matches(self, tested: Masks, album: Album) -> list[Match]:
        """The test images that are among these images, each with the one that is most like it."""
        if not self.album or not self.masks or not tested:
            return []
        ours, theirs = album.prints(tested), self.album.prints(self.masks)
        names, prints = list(theirs), list(theirs.values())
        by_pixels = {each.pixels: name for name, each in theirs.items() if each.pixels}
        detail_NHW, detail_MD = (np.stack([p.detail for p in part.values()]) for part in (ours, theirs))
        detail_MD = detail_MD.reshape(len(prints), -1)
        straight, turned = (nearest(d.reshape(len(ours), -1), detail_MD) for d in (detail_NHW, detail_NHW[:, :, ::-1]))
        found = []
        for i, (name, each) in enumerate(ours.items()):
            closest = names[straight[1][i] if straight[0][i] >= turned[0][i] else turned[1][i]]
            twin = name if self.album is album and name in theirs else by_pixels.get(each.pixels, closest)
            same = ("same name", 1.0) if twin == name and self.album is album else like(each, theirs[twin])
            if same:
                found.append(Match(name, twin, *same, bool(tested[name] & self.masks[twin])))
        return found


# What runs used


class Library:
    """Datasets and lists of episodes, rebuilt from the configs of runs; each dataset's images are read once."""

    def __init__(self) -> None:
        self.datasets: dict[tuple[str, str], FewShotDataset] = {}
        self.albums: dict[str, Album] = {}
        self.album_of: dict[FewShotDataset, Album] = {}

    def dataset(self, config: dict[str, Any], role: str = "dataset") -> FewShotDataset:
        """The dataset of a config. Datasets of two roles are never one object, as in a run."""
        key = json.dumps(config, sort_keys=True)
        if (role, key) not in self.datasets:
            dataset: FewShotDataset = instantiate(OmegaConf.create(config))
            self.datasets[role, key] = dataset
            self.album_of[dataset] = self.albums.setdefault(key, Album(dataset))
        return self.datasets[role, key]

    def data(self, episodes: dict[str, Any]) -> FewShotDataModule:
        """The data module of the part `episodes` of a config."""
        parts = {role: self.dataset(episodes[role], role) for role in ROLES if episodes.get(role)}
        rest = {name: value for name, value in episodes.items() if name not in ROLES}
        data: FewShotDataModule = instantiate(OmegaConf.create(rest | {"_partial_": True}))(**parts)
        return data

    def used(self, what: str, dataset: FewShotDataset, lists: Mapping[str, Iterable[str]]) -> Used:
        """The images of some classes: `lists` has the names of each class's images."""
        masks: dict[str, set[str]] = defaultdict(set)
        for name, images in lists.items():
            for image in images:
                masks[image].add(dataset.common_name(name))
        return Used(what, self.album_of[dataset], masks, of=dataset.name, classes=list(lists))


def by_class(dataset: FewShotDataset, specs: Iterable[EpisodeSpec]) -> dict[str, list[str]]:
    """Class name -> its queries and supports in a list of episodes."""
    lists: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        lists[dataset.classes[spec.class_id]] += [spec.query, *spec.supports]
    return lists


def config_of(run: Path) -> dict[str, Any]:
    """The config of a run; empty if it is not there."""
    return read_json(run / "results.json").get("config") or {}


def of_backbone(record: dict[str, Any], data: FewShotDataModule, library: Library) -> Used:
    """The images that trained the backbone, as far as its weights say."""
    made = record.get("backbone") or {}
    trained, what = made.get("trained_on") or {}, pretraining(made)
    if made.get("weights") == "none":
        return library.used(what, data.dataset, {})
    if not trained:
        return Used(what)
    of, names = trained.get("dataset", ""), trained.get("classes", [])
    config = config_of(Path(made.get("source", "")).parent)
    same = (
        d for d in (data.dataset, data.target, data.validation) if (d.name, d.splits) == (of, trained.get("splits"))
    )
    here = library.dataset(config["dataset"]) if config.get("mode") == "pretrain" else next(same, None)
    if here is None or not set(names) <= set(here.classes):
        return Used(f"{what}, images not at hand", of=of, classes=names)
    lists = lists_of(here, [list(here.classes).index(name) for name in names], "train")
    return library.used(f"{what}, novel pixels painted over", here, lists)


def of_head(job: Job, library: Library) -> list[Used]:
    """The images that trained the head, then those of the training that it started from."""
    training = job.record.get("training") or {}
    if job.training_free:
        return []
    config = job.record.get("config") if job.record.get("mode") == "train" else config_of(job.trained_by or Path())
    if "by" in training or not training:
        found = [Used(f"weights of {training.get('by', 'an unrecorded training')}, images not at hand")]
    elif not config:
        found = [Used(f"the run {training.get('run')} is not there")]
    else:
        found = list(chain(config, library))
        wanted, data = training.get("train_lists_sha256"), found[0].data
        found[0].changed = bool(data and wanted and json_hash(data.train_lists) != wanted)
    records = list(lineage(training))
    found += [Used("weights that these started from, images not at hand") for _ in records[len(found) :]]
    for used, record in zip(found, records, strict=False):
        if not used.of:  # its images are not at hand, but its classes are recorded
            used.of, used.classes = record.get("dataset", ""), record.get("base_classes", ())
    return found


def chain(config: dict[str, Any], library: Library, most: int = 9) -> Iterator[Used]:
    """The images of a training, and of those that its weights come from."""
    data = library.data(config["episodes"])
    every = lists_of(data.dataset, data.train_choice.class_ids, "train")
    lists = every if isinstance(data, LabelledDataModule) else data.train_lists
    used = library.used(f"{data.dataset.name}, {len(lists)} classes", data.dataset, lists)
    used.data = data
    yield used
    if start := config.get("ckpt"):
        path = Path(start).expanduser()
        earlier = config_of(path if path.is_dir() else path.parent.parent) if most else {}
        if earlier:
            yield from chain(earlier, library, most - 1)
        else:
            yield Used(f"started from {start}, images not at hand")


def of_epoch(record: dict[str, Any], data: FewShotDataModule | None, library: Library) -> Used:
    """The images that chose the tested epoch. `data`: of the training."""
    chosen = (record.get("checkpoint") or {}).get("selection")
    if not chosen or data is None:
        return Used("validation images not at hand" if chosen else "no epoch was chosen")
    lists = by_class(data.validation, data.val_specs)
    used = library.used(f"{len(data.val_specs)} episodes of {data.validation.name}", data.validation, lists)
    wanted = ((record.get("training") or {}).get("validation") or {}).get("episode_list_sha256")
    used.data, used.changed = data, bool(wanted and list_hash(data.val_specs) != wanted)
    return used


# Answers


def audit(job: Job, library: Library) -> dict[str, Any]:
    """The answers for one run, as plain values for audit.json.

    Raises:
        DatasetError, PMNetError, InstantiationException: the data cannot be read.
        UserError: the record has no config.
    """
    record = job.record
    if not (record.get("config") or {}).get("episodes"):
        raise UserError("results.json has no config. Run it again with this version")
    data = library.data(record["config"]["episodes"])
    recorded = record.get("episodes") or {}
    if list_hash(data.test_specs) != recorded.get("episode_list_sha256"):
        return {"verdict": CHANGED}
    specs = [spec for part in data.test_lists.values() for spec in part]
    specs += [spec.episode for part in data.absent_lists.values() for spec in part]
    tested, album = library.used("", data.target, by_class(data.target, specs)).masks, library.album_of[data.target]
    heads = of_head(job, library)
    epoch = of_epoch(record, heads[0].data if heads else None, library)
    uses = {"backbone": [of_backbone(record, data, library)], "head": heads, "epoch": [epoch]}
    matches = {part: [used.matches(tested, album) for used in of] for part, of in uses.items()}
    answers = {
        "test": {"dataset": data.target.name, "episodes": len(specs), "images": len(tested)},
        **{p: [summary(*pair) for pair in zip(of, matches[p], strict=True)] for p, of in uses.items()},
        "tested_classes_trained_on": {part: trained_on(uses[part], data) for part in ("backbone", "head")},
        "tuned_at_test": record.get("tuned_at_test"),
        "queries_among_own_supports": [match._asdict() for match in own_supports(specs, album)],
        "selection": selection(epoch, data, specs, library),
    }
    return {"verdict": verdict(answers), **answers}


def summary(used: Used, matches: Sequence[Match]) -> dict[str, Any]:
    """What was used, and which test images are among it, as plain values."""
    return {
        "what": used.what,
        "unknown": used.unknown,
        "images": len(used.masks),
        "masks": sum(map(len, used.masks.values())),
        "tested": len(matches),
        "with_tested_mask": sum(match.mask for match in matches),
        "how": dict(Counter(match.how for match in matches)),
        "examples": [match._asdict() for match in sorted(matches, key=lambda m: m.how == "same name")[:EXAMPLES]],
    }


def trained_on(uses: Iterable[Used], data: FewShotDataModule) -> dict[str, str]:
    """Tested class -> the class that was trained on, which another dataset may name differently."""
    names: dict[str, str] = {}
    for used in uses:
        kind = all_datasets().get(used.of, FewShotDataset)
        theirs = {kind.common_name(name): name for name in used.classes}
        names |= {name: theirs[data.target.common_name(name)] for name in data.seen(used.classes, used.of)}
    return names


def own_supports(specs: Iterable[EpisodeSpec], album: Album) -> list[Match]:
    """Queries that are among the supports of their own episode, whose masks are given."""
    found = {}
    for spec in set(specs):
        prints = album.prints([spec.query, *spec.supports])
        for name in spec.supports:
            if same := like(prints[spec.query], prints[name]):
                found[spec.query, name] = Match(spec.query, name, *same, True)
    return [found[pair] for pair in sorted(found)]


def selection(epoch: Used, data: FewShotDataModule, tested: list[EpisodeSpec], library: Library) -> str:
    """Whether the epoch was chosen on what is tested: a convention of the field, and no leak of training images."""
    if epoch.album is None or epoch.data is None:
        return epoch.what
    classes = data.seen(epoch.classes, epoch.of)
    if not classes:
        return "the epoch was chosen on other classes than the tested ones"
    chosen_on = set(epoch.data.val_specs) if epoch.album is library.album_of[data.target] else set()
    shared = sum(spec in chosen_on for spec in tested)
    return (
        f"the epoch was chosen on {len(classes)} of the {len(data.test_classes)} tested classes and on {shared} of the "
        f"{len(tested)} test episodes (the field's convention)"
    )


def verdict(answers: dict[str, Any]) -> str:
    """One line: what tested images and classes were trained or tuned on."""
    images, found, unknown = answers["test"]["images"], [], []
    for part in ("backbone", "head"):
        total = Counter[str]()
        for used in answers[part]:
            total.update(used["how"])
            unknown += [f"{part}: {used['unknown']}"] if used["unknown"] else []
        tested = max((used["tested"] for used in answers[part]), default=0)
        masks = sum(used["with_tested_mask"] for used in answers[part])
        if tested:
            how = ", ".join(f"{number} {name}" for name, number in sorted(total.items()))
            with_mask = f"{masks} with a tested mask" if masks else "none with a tested mask"
            found.append(f"{tested} of {images} test images trained the {part} ({how}; {with_mask})")
        classes = answers["tested_classes_trained_on"][part]
        if classes:
            names = [a if a == b else f"{a} (as {b})" for a, b in list(classes.items())[:EXAMPLES]]
            found.append(f"{len(classes)} tested classes trained the {part}: {', '.join(names)}")
    if own := answers["queries_among_own_supports"]:
        found.append(f"{len(own)} queries are among their own supports")
    tuned = answers["tuned_at_test"]
    hidden = any(text.startswith("head") for text in unknown)
    clean = (
        "nothing tested is among the images at hand" if hidden else "nothing tested was trained on" if tuned else CLEAN
    )
    tuning = [f"tuned at test on {tuned}"] if tuned else []
    return "; ".join([*(found or [clean]), *tuning, *unknown])


# The command


def report(audits: Mapping[str, dict[str, Any]]) -> Iterator[Table | Text]:
    """A table with a row for each run; below it, the verdict of each, how its epoch was chosen, and examples."""
    table = Table("run", "test images", "backbone", "head", "epoch", show_lines=True)
    for name, answers in audits.items():
        parts = ["\n".join(map(cell, answers.get(part, []))) or "-" for part in ("backbone", "head", "epoch")]
        table.add_row(*map(Text, (name, str(answers.get("test", {}).get("images", "-")), *parts)))
    yield table
    for name, answers in audits.items():
        yield Text(f"{name}: {answers['verdict']}", "bold")
        yield from [Text(f"  {answers['selection']}")] if "selection" in answers else []
        for part in ("backbone", "head"):
            for example in (e for used in answers.get(part, []) for e in used["examples"]):
                how = f"{example['how']}, correlation {example['correlation']:.3f}"
                yield Text(f"  {part}: test image {example['tested']} = {example['used']} ({how})", "yellow")


def cell(used: dict[str, Any]) -> str:
    """What a part of a run used, and how many test images are among it."""
    return used["unknown"] or f"{used['tested']} of them in {used['images']:,} images: {used['what']}"


def explain(error: Exception) -> str:
    """The message of an error that the user can fix."""
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
    return str(cause).rstrip(".")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m experiments.audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of many, such as a sweep"
    )
    folders = parser.parse_args(arguments).runs
    console, errors = wide_console(), Console(stderr=True, soft_wrap=True, highlight=False)
    library, audits, failed = Library(), dict[str, dict[str, Any]](), False
    try:
        jobs = collect(folders).tested
        if not jobs:
            raise UserError("None of these runs has finished a test: there is nothing to audit")
    except UserError as error:
        errors.print(Text.assemble(("Error:", "bold red"), f" {error}"))
        sys.exit(2)
    for job in jobs:
        assert job.folder is not None
        try:
            answers = audit(job, library)
            results = {"results_sha256": digest(job.folder / "results.json")}
            write_json(job.folder / "audit.json", answers | results)
            audits[job.name] = answers
        except (UserError, DatasetError, PMNetError, InstantiationException, OSError) as error:
            failed = True
            errors.print(Text.assemble(("Error:", "bold red"), f" {job.name} cannot be audited: {explain(error)}."))
    for part in report(audits) if audits else ():
        console.print(part, soft_wrap=isinstance(part, Text))
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
