"""Which dataset may be tested after training on which."""

from datamodules.episodes.dataset import FewShotDataset
from datamodules.errors import DatasetError
from datamodules.registry import all_datasets

TASKS = ("cross_category", "cross_dataset", "cross_domain")
Kind = FewShotDataset | type[FewShotDataset]


def same_benchmark(source: Kind, target: Kind) -> bool:
    """Two folders of one's own are two datasets, though they have one name."""
    return source is target or (source.name == target.name and source.domain != "any")


def tasks_of(source: Kind, target: Kind) -> set[str]:
    """The tasks that a pair of datasets is good for; none where there can be no such test.

    Training needs base classes. Images of one's own ("any" domain) go with every dataset, in either task.
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
    """Raises DatasetError, with the possible pairs, where a pair of datasets is none of the task's.

    Args:
        target: None for the dataset itself.
    """
    if task not in TASKS:
        raise DatasetError(f"task={task} is not one of {', '.join(TASKS)}.")
    good_for = tasks_of(dataset, target or dataset)
    if task in good_for:
        return
    kinds = all_datasets().values()
    targets = {s.name: [t.name for t in kinds if task in tasks_of(s, t)] for s in kinds}
    pairs = "; ".join(f"{source} -> {', '.join(names)}" for source, names in targets.items() if names)
    what = f"dataset={dataset.name}" + (f" target={target.name}" if target else " without a target")
    instead = f" That pair is task={min(good_for)}." if good_for else ""
    raise DatasetError(f"task={task} cannot be {what}.{instead} Possible pairs (dataset -> target): {pairs}.")
