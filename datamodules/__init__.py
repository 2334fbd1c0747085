"""Episodes: where images come from, and who meets whom."""

from datamodules.episodes.dataset import FewShotDataset
from datamodules.episodes.episode import Episode
from datamodules.episodes.module import FewShotDataModule

__all__ = ["Episode", "FewShotDataModule", "FewShotDataset"]
