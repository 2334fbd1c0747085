"""All datasets of this package, found by their files: a new one is listed nowhere."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from datamodules import benchmarks, own
from datamodules.episodes.dataset import FewShotDataset


@cache
def all_datasets() -> dict[str, type[FewShotDataset]]:
    """Name -> class."""
    found: dict[str, type[FewShotDataset]] = {}
    for room in (benchmarks, own):
        for module in iter_modules(room.__path__, f"{room.__name__}."):
            kinds = (kind for kind in vars(import_module(module.name)).values() if isinstance(kind, type))
            found |= {k.name: k for k in kinds if issubclass(k, FewShotDataset) and hasattr(k, "name")}
    return dict(sorted(found.items()))
