"""Features of a frozen backbone, kept, so that an image passes through it once however often it is drawn."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pmnet.memory import free_memory

SPARE = 4e9  # bytes of memory that are left to everything else

Features = dict[str, list[Tensor]]

log = logging.getLogger(__name__)


class FeatureCache:
    """Finds an image's features by what shapes them: its pixels, the weights, the precision and the kind of device.

    They stay on the network's device while `device_gb` lasts, then in the host's memory (pinned, where there is a GPU)
    while `host_gb` and free memory last, then in `folder`: a file an image, read through a memory map, found by every
    process that has the same folder, now or later. What has no room is computed each time. An image of 384x384 takes
    32 MB of a ResNet-50's features, half of that in bfloat16.

    Args:
        device_gb: gigabytes on an accelerator; of no effect where there is none.
        host_gb: gigabytes in the memory of this process, as long as another 4 stay free.
        folder: on a fast local disk; may be deleted at any time between runs. None keeps nothing on disk.
        disk_gb: gigabytes that this process writes to `folder` at most.
    """

    def __init__(
        self, device_gb: float = 8, host_gb: float = 12, folder: str | Path | None = None, disk_gb: float = 100
    ) -> None:
        self.room = {"device": device_gb * 1e9, "host": host_gb * 1e9, "disk": disk_gb * 1e9 if folder else 0}
        self.folder = Path(folder).expanduser() if folder else None
        self.kept: dict[str, dict[str, Tensor]] = {}

    def __call__(self, images: Tensor, weights: str, compute: Callable[[Tensor], Features]) -> Features:
        """The features of B images; those not known yet are computed in one pass.

        Args:
            images: (B, 3, H, W).
            weights: names the backbone's weights, by their hash.
            compute: the backbone: images -> layer -> list of (B, C, h, w).
        """
        keys = self.keys(images, weights)
        found = {key: entry for key in set(keys) if (entry := self.find(key)) is not None}
        new = sorted({key: i for i, key in enumerate(keys) if key not in found}.values())
        if new:
            computed = compute(images[new])
            for place, i in enumerate(new):
                found[keys[i]] = {
                    f"{layer}.{block}": feature[place].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
                    for layer, blocks in computed.items()
                    for block, feature in enumerate(blocks)
                }
                self.keep(keys[i], found[keys[i]])
        return together([found[key] for key in keys], images.device)

    def keys(self, images: Tensor, weights: str) -> list[str]:
        kind = images.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "as given"
        text = f"{weights} {tuple(images.shape[1:])} {images.dtype} {precision} {kind} {torch.__version__}"
        salt = hashlib.sha256(text.encode()).digest()
        pixels = (image.contiguous().numpy().tobytes() for image in images.cpu())
        return [hashlib.blake2b(p, digest_size=20, key=salt).hexdigest() for p in pixels]

    def find(self, key: str) -> dict[str, Tensor] | None:
        if key in self.kept or self.folder is None:
            return self.kept.get(key)
        try:
            return safetensors.torch.load_file(self.path(key))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); its image passes through the backbone again.", self.path(key), error)
            return None

    def keep(self, key: str, entry: dict[str, Tensor]) -> None:
        size = sum(feature.nbytes for feature in entry.values())
        device = next(iter(entry.values())).device.type
        place = next((place for place in self.room if self.takes(place, size, device)), None)
        if place is None:
            return
        self.room[place] -= size
        if place == "disk":
            self.write(key, entry)
        elif place == "device" or device == "cpu":
            self.kept[key] = entry
        else:
            self.kept[key] = {name: feature.cpu().pin_memory() for name, feature in entry.items()}

    def takes(self, place: str, size: int, device: str) -> bool:
        if self.room[place] < size or (place == "device" and device == "cpu"):
            return False
        return place != "host" or free_memory() >= size + SPARE

    def write(self, key: str, entry: dict[str, Tensor]) -> None:
        """A whole file or none; a disk that is full is told of once."""
        path = self.path(key)
        part = path.with_suffix(f".{uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({name: feature.cpu() for name, feature in entry.items()}, part)
            os.replace(part, path)
        except (SafetensorError, OSError) as error:
            self.room["disk"] = 0
            with suppress(OSError):
                part.unlink()
            log.warning("Features are not written to %s any more: %s", self.folder, error)

    def path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


def together(entries: list[dict[str, Tensor]], device: torch.device) -> Features:
    """Features of single images as a batch, layer -> list of (B, C, h, w), channels last in memory."""
    features: Features = {}
    for name in sorted(entries[0], key=lambda name: (name.split(".")[0], int(name.split(".")[1]))):
        h, w, C = entries[0][name].shape
        batch_BHWC = entries[0][name].new_empty((len(entries), h, w, C), device=device)
        for i, entry in enumerate(entries):
            batch_BHWC[i].copy_(entry[name], non_blocking=True)
        features.setdefault(name.split(".")[0], []).append(batch_BHWC.permute(0, 3, 1, 2))
    return features
