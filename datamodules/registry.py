"""All datasets of this package, found by their files: a new one is listed nowhere."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import datamodules
from datamodules.base import FewShotDataset


@cache
def all_datasets() -> dict[str, type[FewShotDataset]]:
    """Name -> class."""
    found: dict[str, type[FewShotDataset]] = {}
    for module in iter_modules(datamodules.__path__):
        if not module.ispkg:
            members = vars(import_module(f"datamodules.{module.name}")).values()
            found |= {m.name: m for m in members if isinstance(m, type) and hasattr(m, "name")}
    return dict(sorted((n, c) for n, c in found.items() if issubclass(c, FewShotDataset)))
