"""The measurements of `python -m datamodules.bench`, on a few images. No test depends on the speed of the machine."""

import os

import numpy as np
import pytest

from datamodules import bench
from datamodules.episodes.dataset import Episodes
from pmnet.segment.formats import masks


def test_a_folder_is_opened_twice_and_its_masks_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, opened, read = os.environ["PMNET_CACHE"], [], []
    plain_read = masks.Legend.read
    monkeypatch.setattr(masks.Legend, "read", lambda legend, mask: read.append(mask) or plain_read(legend, mask))
    monkeypatch.setattr(bench, "LINKS", 2)
    monkeypatch.setattr(
        bench, "FolderDataset", lambda *args, **kwargs: opened.append((len(read), FOLDER(*args, **kwargs)))
    )
    assert min(bench.starts(3)) > 0
    assert [len(dataset.images_of(0, "test")) for _, dataset in opened] == [3, 3]
    assert [before for before, _ in opened] + [len(set(read))] == [0, 3, 3]
    assert os.environ["PMNET_CACHE"] == kept


def test_plain_loop_reads_the_same_episode(tmp_path) -> None:
    """Up to the rounding of the resizing."""
    dataset = bench.write_images(tmp_path / "data", 20)
    (spec,) = dataset.test_episodes(range(5), 1, 2)
    episode = Episodes(dataset, [spec], bench.SIZE)[0]
    (query, mask), *supports = bench.plain(tmp_path / "data", spec)
    assert (mask == (episode.query_mask == 1)).float().mean() > 0.99  # Pillow and PyTorch choose other pixels
    assert len(supports) == 2
    assert np.abs(query.numpy().astype(int) - episode.query.numpy()).max() <= 1


FOLDER = bench.FolderDataset
