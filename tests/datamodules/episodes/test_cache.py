import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.episodes.cache import ImageCache
from datamodules.episodes.dataset import Episodes, resized
from datamodules.episodes.module import FewShotDataModule
from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from tests.data.folder import write_indexed

SIZE = (32, 64)


def read(root):
    return FolderDataset(str(root), folds=3, min_area=0.01)


@pytest.fixture
def root(tmp_path):
    return write_indexed(tmp_path / "data", classes=6, images_per_class=3)


def names_of(dataset):
    return sorted(dataset.files)


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".npy")


def test_cache_holds_what_the_files_contain(root, tmp_path):
    data = read(root)
    cache = ImageCache(tmp_path / "cache", data, reversed(names_of(data)), SIZE)
    assert sorted(cache) == names_of(data)
    for name in names_of(data):
        for kept, fresh in zip(cache[name], resized(data, name, SIZE), strict=True):
            assert torch.equal(kept, fresh)
    with pytest.raises(KeyError):
        cache["nobody"]


def test_cache_is_built_once_and_read_by_others(root, tmp_path):
    data = read(root)
    ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    (path,) = (tmp_path / "cache").glob("*.npy")
    written = path.stat().st_mtime_ns
    threads = [
        threading.Thread(target=ImageCache, args=(tmp_path / "cache", data, names_of(data), SIZE)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.stat().st_mtime_ns == written
    assert files(tmp_path / "cache") == [path.name]


def build(root, folder):
    data = read(root)
    cache = ImageCache(folder, data, names_of(data), SIZE)
    return cache.path.stat().st_ino, cache["003"][0].sum().item()


@pytest.mark.slow
def test_concurrent_processes_share_one_file(root, tmp_path):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        answers = list(pool.map(build, [root] * 3, [tmp_path / "cache"] * 3))
    assert len(set(answers)) == 1
    assert answers[0][1] == resized(read(root), "003", SIZE)[0].sum().item()


def test_another_size_list_or_image_is_another_file(root, tmp_path):
    folder, data = tmp_path / "cache", read(root)
    ImageCache(folder, data, names_of(data), SIZE)
    ImageCache(folder, data, names_of(data), (64, 64))
    ImageCache(folder, data, names_of(data)[:5], SIZE)
    assert len(files(folder)) == 3
    path = root / "images" / "000.jpg"
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    changed = read(root)
    cache = ImageCache(folder, changed, names_of(changed), SIZE)
    assert len(files(folder)) == 4
    assert torch.equal(cache["000"][0], resized(changed, "000", SIZE)[0])


def test_interrupted_building_leaves_no_file(root, tmp_path):
    data = read(root)
    (root / "images" / "007.jpg").write_bytes(b"broken")
    with pytest.raises(DatasetError, match=r"007\.jpg was changed"):
        ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".npy", ".part")]


def test_full_disk_is_reported_before_anything_is_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.episodes.cache.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DatasetError, match=r"needs .* GB in .*episodes\.cache"):
        ImageCache(tmp_path / "cache", read(root), names_of(read(root)), SIZE)
    assert files(tmp_path / "cache") == []


def test_pickled_cache_carries_no_pixels(root, tmp_path):
    data = read(root)
    cache = ImageCache(tmp_path / "cache", data, names_of(data), (320, 320))
    cache["000"]
    copy = pickle.dumps(cache)  # the dataset, which goes along with its episodes anyway, is part of it
    assert len(copy) < 3000 + len(pickle.dumps(data))
    assert torch.equal(pickle.loads(copy)["000"][0], cache["000"][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_episodes_are_the_same_with_and_without(root, tmp_path, workers):
    setting = {"fold": 0, "shot": 2, "train_shot": 1, "image_size": SIZE, "batch_size": 4, "test_batch_size": 3}
    setting |= {"per_epoch": 8, "val": 5, "test": 5, "novel_pixels": "ignore", "seed": 0}
    plain = FewShotDataModule(read(root), **setting, workers=0)
    cached = FewShotDataModule(read(root), **setting, workers=workers, cache=str(tmp_path / "cache"))
    for part in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(plain, part)(), getattr(cached, part)(), strict=True):
            assert a.spec == b.spec
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("query", "query_mask", "support_masks"))


def test_cached_images_are_not_decoded_again(root, tmp_path):
    data = read(root)
    specs = data.test_episodes([0, 1], 6, 1)
    cache = ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    for path in (root / "images").iterdir():
        path.write_bytes(b"gone")
    episodes = Episodes(data, specs, SIZE, cache=cache)
    assert all(episodes[i].query.shape == (3, *SIZE) for i in range(6))


@pytest.mark.parametrize("how", ["truncated", "header", "empty", "sums", "no sums"])
def test_cache_of_a_damaged_file_is_built_again(how, root, tmp_path):
    data = read(root)
    ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    (path,), (sums,) = (list((tmp_path / "cache").glob(f"*.{end}")) for end in ("npy", "sums"))
    content = path.read_bytes()
    if how == "no sums":
        sums.unlink()
    elif how == "sums":
        sums.write_bytes(sums.read_bytes()[:-9])
    else:
        path.write_bytes({"truncated": content[:-1000], "header": b"\0" * 80 + content[80:], "empty": b""}[how])
    cache = ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    for name in names_of(data):
        assert all(map(torch.equal, cache[name], resized(data, name, SIZE)))


def test_flipped_bits_are_noticed(root, tmp_path, caplog):
    data = read(root)
    ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    (path,) = (tmp_path / "cache").glob("*.npy")
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    cache = ImageCache(tmp_path / "cache", data, names_of(data), SIZE)
    for name in names_of(data):
        assert all(map(torch.equal, cache[name], resized(data, name, SIZE)))
    assert caplog.text.count("is damaged at") == 1
