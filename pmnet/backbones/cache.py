"""Features of a frozen backbone, kept, so that an image passes through it once however often it is drawn."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmnet.memory import free_memory, free_memory_of
from pmnet.version import VERSION

SPARE = 4e9  # bytes of memory that are left to everything else

Features = dict[str, list[Tensor]]
Entry = dict[str, Tensor]  # of one image: "layer3.5" -> (h, w, C)

log = logging.getLogger(__name__)


class FeatureCache:
    """Finds an image's features by what shapes them: its pixels, the weights, the precision and the kind of device.

    They stay on the network's device while `device_gb` and its memory last. With a `folder` they are written there too,
    a file an image, read through a memory map and found by every process that has the same folder, now or later.
    Otherwise, or when `disk_gb` are full, they stay in the host's memory (pinned, where there is a GPU) while `host_gb`
    and free memory last. What has no room is computed each time. An image of 384x384 takes 32 MB of a ResNet-50's
    features, half of that in bfloat16.

    A copy of a cache, and what is pickled of it, is empty.

    Args:
        device_gb: gigabytes on a GPU, as long as another 4 stay free.
        host_gb: gigabytes in the memory of this process, as long as another 4 stay free.
        folder: on a fast local disk; may be deleted at any time between runs. None keeps nothing on disk.
        disk_gb: gigabytes that this process writes to `folder` at most.
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
        """The features of B images; those not known yet are computed in one pass.

        Args:
            images: (B, 3, H, W), B > 0.
            weights: names the backbone and its weights.
            compute: the backbone: images -> layer -> list of (B, C, h, w).
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
        kind = images.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "as given"
        text = f"{VERSION} {weights} {tuple(images.shape[1:])} {images.dtype} {precision} {kind} {torch.__version__}"
        salt = hashlib.sha256(text.encode()).digest()
        pixels = images.detach().cpu().contiguous().view(torch.uint8)  # bytes of any dtype
        return [hashlib.blake2b(image.numpy(), digest_size=20, key=salt).hexdigest() for image in pixels]

    def find(self, key: str, device: torch.device) -> Entry | None:
        if key in self.kept or self.folder is None:
            return self.kept.get(key)
        try:
            with safe_open(self.path(key), "pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                sums = file.metadata()
            if sums != check_sums(entry):
                raise SafetensorError("its content is not what was written")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); its image passes through the backbone again.", self.path(key), error)
            return None
        if device.type != "cpu":
            entry = packed(entry, device)
            self.keep(key, entry, on_disk=True)
        return entry

    def keep(self, key: str, entry: Entry, on_disk: bool) -> None:
        """In memory, where there is room; what is on disk needs no place in the host's."""
        size = sum(feature.nbytes for feature in entry.values())
        device = next(iter(entry.values())).device
        if device.type != "cpu" and self.room["device"] >= size and free_memory_of(device) >= size + SPARE:
            self.room["device"] -= size
            self.kept[key] = entry
        elif not on_disk and self.room["host"] >= size and free_memory() >= size + SPARE:
            self.room["host"] -= size
            self.kept[key] = entry if device.type == "cpu" else packed(entry, torch.device("cpu"), pin=True)

    def write(self, key: str, entry: Entry) -> bool:
        """A whole file or none; a disk that is full is told of once. Returns whether there is a file."""
        size = sum(feature.nbytes for feature in entry.values())
        if self.room["disk"] < size:
            return False
        path = self.path(key)
        part = path.with_suffix(f".{uuid4().hex}.part")
        on_cpu = {name: feature.cpu() for name, feature in entry.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(on_cpu, part, check_sums(on_cpu))
            os.replace(part, path)
        except (SafetensorError, OSError) as error:
            self.room["disk"] = 0
            with suppress(OSError):
                part.unlink()
            log.warning("Features are not written to %s any more: %s", self.folder, error)
            return False
        self.room["disk"] -= size
        return True

    def path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


def packed(entry: Entry, device: torch.device, pin: bool = False) -> Entry:
    """A copy on a device, in one block: pinned memory comes in powers of two, a waste for each small tensor."""
    sizes = [feature.nbytes for feature in entry.values()]
    block = torch.empty(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pin)
    copy: Entry = {}
    for (name, feature), part in zip(entry.items(), block.split(sizes), strict=True):
        copy[name] = part.view(feature.dtype).view(feature.shape)
        copy[name].copy_(feature)
    return copy


def check_sums(entry: Entry) -> dict[str, str]:
    """Of what a disk may have damaged: names, shapes, and sums of their content."""
    return {
        name: f"{tuple(feature.shape)} {feature.dtype} {int(feature.view(torch.int16).sum(dtype=torch.int64))}"
        for name, feature in entry.items()
    }


def together(entries: list[Entry], device: torch.device) -> Features:
    """Features of single images as a batch, layer -> list of (B, C, h, w), channels last in memory."""
    features: Features = {}
    for name in sorted(entries[0], key=lambda name: (name.split(".")[0], int(name.split(".")[1]))):
        h, w, C = entries[0][name].shape
        batch_BHWC = entries[0][name].new_empty((len(entries), h, w, C), device=device)
        for i, entry in enumerate(entries):
            batch_BHWC[i].copy_(entry[name], non_blocking=True)
        features.setdefault(name.split(".")[0], []).append(batch_BHWC.permute(0, 3, 1, 2))
    return features
