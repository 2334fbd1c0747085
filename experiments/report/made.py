"""How the numbers of a report were made, from the runs' records: answers "what was this number tuned on?"."""

import hashlib
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.files import read_json
from experiments.report.benchmarks import NONE, Benchmark, method
from experiments.report.collect import Job
from experiments.report.tables import Row, Table

TITLE = "How these numbers were made"
COLUMNS = ["numbers", "backbone", "head trained on", "epoch", "test list", "images", "255 and novel pixels", "floors"]
COLUMNS += ["tuned at test", "audit"]
UNSAID, NOT_AUDITED = "?", "not audited"
NOVEL = {
    "background": "novel pixels are background in training",
    "ignore": "novel pixels are excluded from the loss",
    "remove": "training images that show a novel class are removed",
}
FITS = {"squeeze": "resized to", "pad": "fitted into"}
SCORED = {"network": "scored at this size", "photo": "scored at the photo's size"}


def table(b: Benchmark) -> Table:
    """One row for each group of numbers with equal answers: the published ones, then ours."""
    printed: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for entry in b.published:
        copy = ", a copy" if entry.get("copied") else ""
        printed[published_answers(entry)].append(f"{method(entry)} ({entry['where']}{copy})")
    rows = [Row([", ".join(dict.fromkeys(names)), *answers]) for answers, names in printed.items()]
    groups: dict[tuple[str, ...], list[tuple[str, Job]]] = defaultdict(list)
    for s in b.series:
        for (shot, fold), jobs in s.runs.items():
            for job in jobs:
                groups[answers_of(job)].append((f"{s.name}: {shot}-shot fold {fold}", job))
    for answers, members in groups.items():
        names, jobs = list(dict.fromkeys(name for name, _ in members)), [job for _, job in members]
        audit = how_to_audit(jobs) if answers[-1] == NOT_AUDITED else answers[-1]
        rows.append(Row(["; ".join(names), *answers[:-1], audit], "ours"))
    notes = [f"{UNSAID}: the published table does not say."] if printed else []
    return Table(f"{TITLE}. {b.title}", COLUMNS, rows, notes)


def published_answers(entry: dict[str, Any]) -> tuple[str, ...]:
    """The answers for a published number, as far as its text has them."""
    classes = "all classes" if entry.get("fold") == "all" else "base classes of each fold"
    head = entry.get("trained_on", f"{entry['dataset']}, {classes}")
    said = {
        "backbone": f"{entry['backbone']}, weights {UNSAID}",
        "head trained on": head,
        "test list": f"{entry['target']}, {entry.get('list', f'list {UNSAID}')}",
        "tuned at test": entry.get("tuned_at_test", UNSAID),
    }
    return tuple(said.get(column, UNSAID) for column in COLUMNS[1:])


def answers_of(job: Job) -> tuple[str, ...]:
    """The answers for a run, in the order of COLUMNS without the first."""
    record = job.record
    return (
        backbone(record.get("backbone") or {}),
        head(job),
        epoch(job),
        listed(record.get("episodes") or {}),
        images(record),
        pixels(job),
        ", ".join(record.get("baselines", {})).replace("_", " ") or "none",
        (record["tuned_at_test"] or "no") if "tuned_at_test" in record else UNSAID,
        audit_of(job).get("verdict", NOT_AUDITED),
    )


def backbone(made: dict[str, Any]) -> str:
    """Name and weights of a backbone, and what these were trained on."""
    return f"{made.get('backbone', UNSAID)}, weights {made.get('weights', UNSAID)}: {pretraining(made)}"


def pretraining(made: dict[str, Any]) -> str:
    """What a backbone's weights were trained on, in words."""
    trained, weights = made.get("trained_on") or {}, str(made.get("weights", UNSAID))
    if trained:
        held_out = f" (fold {trained['fold']})" if "fold" in trained else ""
        return f"{trained.get('dataset', UNSAID)}, {count(trained.get('classes', []), 'class')}{held_out}"
    if weights == "none":
        return "random weights, trained on nothing"
    if weights == UNSAID or "/" in weights or Path(weights).suffix in (".pth", ".pt", ".safetensors"):
        return "the file does not say what it was trained on"
    known = {"lvd142m": "LVD-142M", "lvd1689m": "LVD-1689M"}.get(weights, "ImageNet")
    return f"{known}, images not at hand"


def head(job: Job) -> str:
    """What the head was trained on: dataset, classes and images."""
    training, tested = job.record.get("training") or {}, job.record.get("episodes") or {}
    if job.training_free:
        return "nothing: the method learns nothing"
    classes, by = training.get("base_classes"), training.get("by")
    if by:
        weights = f"weights of {by}, {Path(training.get('run', UNSAID)).name}"
        learned = f"{training.get('dataset', UNSAID)}, {count(classes, 'base class')}" if classes else "not recorded"
        return f"{learned}: {weights}"
    if classes is None:
        return UNSAID
    fold = job.setting.get("fold", UNSAID)
    which = f" (fold {fold})" if classes == tested.get("base_classes") else ""
    count_of = training.get("images") or (audit_of(job).get("head") or [{}])[0].get("images")
    seen = f", {count_of:,} images" if count_of else ""
    earlier = training.get("started_from") or {}
    start = (job.record.get("config") or {}).get("ckpt") if job.record.get("mode") == "train" else earlier.get("file")
    knew = f" ({count(earlier['base_classes'], 'base class')})" if earlier.get("base_classes") else ""
    return (
        f"{training.get('dataset', UNSAID)}, {count(classes, 'base class')}{which}{seen}: {training.get('splits')}"
        + (f"; started from {start}{knew}" if start else "")
    )


def epoch(job: Job) -> str:
    """How the tested epoch was chosen."""
    checkpoint = job.record.get("checkpoint") or {}
    if job.training_free:
        return "nothing to choose"
    if (job.record.get("training") or {}).get("by"):
        return UNSAID
    last = Path(checkpoint["path"]).stem if "path" in checkpoint else UNSAID
    return checkpoint.get("selection") or (f"not selected: {last}.ckpt" if last != UNSAID else UNSAID)


def listed(episodes: dict[str, Any]) -> str:
    """Number, dataset, seeds and hash of the test episodes."""
    seeds = (episodes.get("protocol") or {}).get("seeds", [0])
    rows = str(episodes.get("episode_list_sha256", UNSAID))[:8]
    of = f" of {episodes['target']}" if "target" in episodes else ""
    absent = (episodes.get("absent") or {}).get("episodes")
    return (
        f"{episodes.get('test_episodes', UNSAID)} episodes{of}, {episodes.get('splits', UNSAID)}, "
        f"seed {', '.join(map(str, seeds))}, list {rows}" + f"; {absent} more without the class" * bool(absent)
    )


def images(record: dict[str, Any]) -> str:
    """The size of images, and the size at which masks are compared."""
    size = ((record.get("config") or {}).get("episodes") or {}).get("image_size")
    if size is None:
        return UNSAID
    height, width = (size, size) if isinstance(size, int) else size
    rules = (record.get("episodes") or {}).get("protocol") or {}
    fit, scored = FITS[rules.get("fit", "squeeze")], SCORED[rules.get("scored", "network")]
    return f"{fit} {height}x{width}, {scored}"


def pixels(job: Job) -> str:
    """What pixels of value 255 and of novel classes count as."""
    novel = (job.record.get("training") or {}).get("novel_pixels")
    return "; ".join(["255 is not scored", *([NOVEL[novel]] if novel in NOVEL else [])])


def audit_of(job: Job) -> dict[str, Any]:
    """The audit of a run; empty if there is none, or if results.json has changed since."""
    if job.folder is None or not (job.folder / "results.json").is_file():
        return {}
    audit = read_json(job.folder / "audit.json")
    return audit if audit.get("results_sha256") == digest(job.folder / "results.json") else {}


def digest(path: Path) -> str:
    """sha256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def how_to_audit(jobs: Sequence[Job]) -> str:
    """The command that audits these runs."""
    folders = [str(job.folder) for job in jobs if job.folder and not job.url]
    if not folders:
        return f"{NOT_AUDITED}: the runs are not on this machine"
    together = os.path.commonpath(folders)
    return f"{NOT_AUDITED}: python -m experiments.audit {shlex.quote(together)}"


def count(names: Iterable[str], what: str) -> str:
    """Number of classes, and the first of them.

    Example:
        >>> count(["cat", "dog", "bus", "car"], "class")
        '4 classes: cat, dog, bus, ...'
    """
    names = list(names)
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'es' * (len(names) != 1)}: {some}" if names else NONE
