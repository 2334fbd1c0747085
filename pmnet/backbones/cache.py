"""A cache of a frozen backbone's features: each image passes through the backbone once, however often it is sampled."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmnet.memory import free_memory, free_memory_of
from pmnet.replacing import replacing
from pmnet.version import VERSION

SPARE = 4e9  # bytes of memory that the cache leaves free

Features = dict[str, list[Tensor]]
Entry = dict[str, Tensor]  # features of one image: "layer3.5" -> (h, w, C)

log = logging.getLogger(__name__)


class FeatureCache:
    """Stores features by everything that determines them: pixels, weights, precision and kind of device.

    Features go to the first place with room:

    1. a GPU, up to `device_gb`;
    2. `folder`, up to `disk_gb`: one file per image, memory-mapped, shared by all processes and later runs;
    3. this process's main memory, up to `host_gb`, pinned if there is a GPU.

    Features on a GPU are also written to `folder`. If no place has room, features are computed again each time. A
    384x384 image takes 32 MB with a ResNet-50, half of that in bfloat16.

    Copying or pickling a cache gives an empty one.

    Args:
        device_gb: gigabytes to use on a GPU; 4 GB always stay free.
        host_gb: gigabytes to use in this process's memory; 4 GB always stay free.
        folder: folder on a fast local disk, which you may delete between runs; None disables the disk cache.
        disk_gb: gigabytes that this process may write to `folder`.

    Example:
        >>> import torch
        >>> from pmnet import FeatureCache, SmallBackbone
        >>> backbone = SmallBackbone("quickstart").freeze()
        >>> backbone.cache = FeatureCache(host_gb=2)
        >>> image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        >>> backbone(image)["layer4"][0].shape
        torch.Size([1, 128, 2, 2])
        >>> torch.equal(backbone(image)["layer4"][0], backbone(image)["layer4"][0])  # from the cache
        True
    """

    def __init__(
        self, device_gb: float = 8, host_gb: float = 12, folder: str | Path | None = None, disk_gb: float = 100
    ) -> None:
        self.budget = {"device": device_gb * 1e9, "host": host_gb * 1e9, "disk": disk_gb * 1e9 if folder else 0}
        self.folder = Path(folder).expanduser() if folder else None
        self.room, self.kept = dict(self.budget), dict[str, Entry]()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"room": dict(self.budget), "kept": {}}

    def __call__(self, images: Tensor, weights: str, compute: Callable[[Tensor], Features]) -> Features:
        """Looks up the features of B images; those not cached yet are computed in one forward pass.

        Args:
            images: (B, 3, H, W), any dtype, B > 0.
            weights: identifies the backbone, its weights and the requested blocks.
            compute: the backbone's forward pass, images -> layer -> list of (B, C, h, w).

        Returns:
            layer -> list of (B, C, h, w), channels last in memory.
        """
        keys = self.keys(images, weights)
        found = {key: entry for key in set(keys) if (entry := self.find(key, images.device)) is not None}
        new = sorted({key: i for i, key in enumerate(keys) if key not in found}.values())
        if new:
            computed = compute(images[new])
            for place, i in enumerate(new):
                entry = {
                    f"{layer}.{block}": feature[place].permute(1, 2, 0)
                    for layer, blocks in computed.items()
                    for block, feature in enumerate(blocks)
                }
                found[keys[i]] = packed(entry, images.device)
                self.keep(keys[i], found[keys[i]], on_disk=self.write(keys[i], found[keys[i]]))
        return together([found[key] for key in keys], images.device)

    def keys(self, images: Tensor, weights: str) -> list[str]:
        """One hash per image."""
        kind = images.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "as given"
        text = f"{VERSION} {weights} {tuple(images.shape[1:])} {images.dtype} {precision} {kind} {torch.__version__}"
        salt = hashlib.sha256(text.encode()).digest()
        pixels = images.detach().cpu().contiguous().view(torch.uint8)  # bytes of any dtype
        return [hashlib.blake2b(image.numpy(), digest_size=20, key=salt).hexdigest() for image in pixels]

    def find(self, key: str, device: torch.device) -> Entry | None:
        """The features from memory or disk; None if they are not cached."""
        if key in self.kept or self.folder is None:
            return self.kept.get(key)
        try:
            with safe_open(self.path(key), "pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
                sums = file.metadata()
            if sums != check_sums(entry):
                raise SafetensorError("its checksums do not match")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s). Its features are computed again.", self.path(key), error)
            return None
        if device.type != "cpu":
            entry = packed(entry, device)
            self.keep(key, entry, on_disk=True)
        return entry

    def keep(self, key: str, entry: Entry, on_disk: bool) -> None:
        """Stores features in memory if there is room. Features on disk are not stored in main memory as well."""
        size = sum(feature.nbytes for feature in entry.values())
        device = next(iter(entry.values())).device
        if device.type != "cpu" and self.room["device"] >= size and free_memory_of(device) >= size + SPARE:
            self.room["device"] -= size
            self.kept[key] = entry
        elif not on_disk and self.room["host"] >= size and free_memory() >= size + SPARE:
            self.room["host"] -= size
            self.kept[key] = entry if device.type == "cpu" else packed(entry, torch.device("cpu"), pin=True)

    def write(self, key: str, entry: Entry) -> bool:
        """Writes a complete file or none. After an error, one warning is logged and no more files are written.

        Returns:
            Whether the file was written.
        """
        size = sum(feature.nbytes for feature in entry.values())
        if self.room["disk"] < size:
            return False
        path = self.path(key)
        on_cpu = {name: feature.cpu() for name, feature in entry.items()}
        try:
            with replacing(path) as part:
                safetensors.torch.save_file(on_cpu, part, check_sums(on_cpu))
        except (SafetensorError, OSError) as error:
            self.room["disk"] = 0
            log.warning("Cannot write features to %s (%s). No more features are written to disk.", self.folder, error)
            return False
        self.room["disk"] -= size
        return True

    def path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


def packed(entry: Entry, device: torch.device, pin: bool = False) -> Entry:
    """Copies features to a device in one block. Pinned blocks are rounded up to powers of two, so one wastes less."""
    sizes = [feature.nbytes for feature in entry.values()]
    block = torch.empty(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pin)
    copy: Entry = {}
    for (name, feature), part in zip(entry.items(), block.split(sizes), strict=True):
        copy[name] = part.view(feature.dtype).view(feature.shape)
        copy[name].copy_(feature)
    return copy


def check_sums(entry: Entry) -> dict[str, str]:
    """Names, shapes, dtypes and sums of all features, to detect damage on disk."""
    return {
        name: f"{tuple(feature.shape)} {feature.dtype} {int(feature.view(torch.int16).sum(dtype=torch.int64))}"
        for name, feature in entry.items()
    }


def together(entries: list[Entry], device: torch.device) -> Features:
    """Batches the features of single images: layer -> list of (B, C, h, w), channels last in memory."""
    features: Features = {}
    for name in sorted(entries[0], key=lambda name: (name.split(".")[0], int(name.split(".")[1]))):
        h, w, C = entries[0][name].shape
        batch_BHWC = entries[0][name].new_empty((len(entries), h, w, C), device=device)
        for i, entry in enumerate(entries):
            batch_BHWC[i].copy_(entry[name], non_blocking=True)
        features.setdefault(name.split(".")[0], []).append(batch_BHWC.permute(0, 3, 1, 2))
    return features
