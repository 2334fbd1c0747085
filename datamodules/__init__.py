"""Episodes: where images come from, and who meets whom."""

from datamodules.base import FewShotDataset
from datamodules.episode import Episode
from datamodules.module import FewShotDataModule

__all__ = ["Episode", "FewShotDataModule", "FewShotDataset"]
