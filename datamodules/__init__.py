"""Datasets and few-shot episodes: where the images come from and how they are batched.

What is exported here is imported on first use, so that commands that only read files need not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.episodes.dataset import FewShotDataset
    from datamodules.episodes.episode import Episode
    from datamodules.episodes.module import FewShotDataModule
    from datamodules.episodes.protocol import Protocol

HOMES = {
    "Episode": "datamodules.episodes.episode",
    "FewShotDataModule": "datamodules.episodes.module",
    "FewShotDataset": "datamodules.episodes.dataset",
    "Protocol": "datamodules.episodes.protocol",
}
__all__ = ["Episode", "FewShotDataModule", "FewShotDataset", "Protocol"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'datamodules' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
