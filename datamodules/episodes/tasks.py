"""The rules for which pairs of training and test datasets each task allows."""

from datamodules.episodes.dataset import FewShotDataset
from datamodules.errors import DatasetError
from datamodules.registry import all_datasets

TASKS = ("cross_category", "cross_dataset", "cross_domain")
Kind = FewShotDataset | type[FewShotDataset]


def same_benchmark(source: Kind, target: Kind) -> bool:
    """Whether training and test use the same dataset. Two `folder` datasets are different despite their common name."""
    return source is target or (source.name == target.name and source.domain != "any")


def tasks_of(source: Kind, target: Kind) -> set[str]:
    """The tasks that allow a pair of datasets.

    Training needs base classes, so a test-only `source` allows no task. The user's own images (domain "any") can be
    paired with every dataset, as cross_dataset or cross_domain.

    Args:
        source: training dataset, or its class.
        target: test dataset, or its class.

    Returns:
        A subset of `TASKS`, empty if the pair is impossible.

    Example:
        >>> kinds = all_datasets()
        >>> tasks_of(kinds["coco"], kinds["pascal"]), tasks_of(kinds["pascal"], kinds["isic"])
        ({'cross_dataset'}, {'cross_domain'})
    """
    if source.test_only:
        return set()
    if same_benchmark(source, target):
        return {"cross_category"}
    if "any" in (source.domain, target.domain):
        return {"cross_dataset", "cross_domain"}
    if source.domain != target.domain:
        return {"cross_domain"}
    return {"cross_dataset"} if source.name in target.tested_after else set()


def check_pair(task: str, dataset: FewShotDataset, target: FewShotDataset | None) -> None:
    """Checks that a task allows a pair of datasets.

    Args:
        task: one of `TASKS`.
        dataset: training dataset.
        target: test dataset; None for `dataset` itself.

    Raises:
        DatasetError: the task does not allow the pair; the message lists the pairs that it allows.
    """
    if task not in TASKS:
        raise DatasetError(f"task={task} is not one of {', '.join(TASKS)}.")
    allowed = tasks_of(dataset, target or dataset)
    if task in allowed:
        return
    kinds = all_datasets().values()
    targets = {s.name: [t.name for t in kinds if task in tasks_of(s, t)] for s in kinds}
    pairs = "; ".join(f"{source} -> {', '.join(names)}" for source, names in targets.items() if names)
    what = f"dataset={dataset.name} " + (f"with target={target.name}" if target else "without a target")
    instead = f" For that pair, set task={min(allowed)}." if allowed else ""
    raise DatasetError(f"task={task} does not allow {what}.{instead} It allows (dataset -> target): {pairs}.")
