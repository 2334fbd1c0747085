"""Datasets and few-shot episodes: where the images come from and how they are batched."""

from datamodules.episodes.dataset import FewShotDataset
from datamodules.episodes.episode import Episode
from datamodules.episodes.module import FewShotDataModule
from datamodules.episodes.protocol import Protocol

__all__ = ["Episode", "FewShotDataModule", "FewShotDataset", "Protocol"]
