"""Finds all datasets of this package by importing its files; a new dataset needs no registration."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from datamodules import benchmarks, own
from datamodules.episodes.dataset import FewShotDataset


@cache
def all_datasets() -> dict[str, type[FewShotDataset]]:
    """All dataset classes of `datamodules.benchmarks` and `datamodules.own`.

    Returns:
        Dataset name -> class, sorted by name.

    Example:
        >>> all_datasets()["suim"].__name__
        'SUIMDataset'
    """
    found: dict[str, type[FewShotDataset]] = {}
    for package in (benchmarks, own):
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            kinds = (kind for kind in vars(import_module(module.name)).values() if isinstance(kind, type))
            found |= {k.name: k for k in kinds if issubclass(k, FewShotDataset) and hasattr(k, "name")}
    return dict(sorted(found.items()))
