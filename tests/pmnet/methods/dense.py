"""The golden files of HSNet's family and DCAMA, and small random features."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Feats = dict[str, list[Tensor]]


class DenseGolden:
    """One golden file. Features and weights are stored as float16, which is exact.

    Args:
        path: of the .npz.
    """

    def __init__(self, path: Path) -> None:
        self.file = np.load(path)

    def __getitem__(self, key: str) -> Tensor:
        value = torch.from_numpy(self.file[key])
        return value.float() if value.dtype == torch.float16 else value

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The values whose keys begin with `prefix/`, by the rest of the key."""
        return {key.removeprefix(f"{prefix}/"): self[key] for key in self.file.files if key.startswith(f"{prefix}/")}

    def blocks(self, prefix: str) -> Feats:
        found: Feats = defaultdict(list)
        for name, value in self.under(prefix).items():  # "layer3.0", "layer3.1", ... in this order
            found[name.split(".")[0]].append(value)
        return dict(found)

    def features(self) -> tuple[Feats, Feats, Tensor]:
        """Of the query and the supports, and the support masks; masked passes as "layer3_masked" and so on."""
        masks = self["support_masks"]
        support = {}
        for prefix, suffix in (("support", ""), ("masked_support", "_masked")):
            shots = [self.blocks(f"{prefix}{k}") for k in range(masks.shape[1])]
            for layer in shots[0]:
                support[layer + suffix] = [
                    torch.stack(each, 1) for each in zip(*(s[layer] for s in shots), strict=True)
                ]
        return self.blocks("query"), support, masks


def norm(gradient: Tensor) -> Tensor:
    """The L2 norm in double precision: that of millions of small values is off by 1e-4 in single."""
    return gradient.double().norm()


def random_feats(
    channels: dict[str, int], sides: dict[str, int], blocks: dict[str, int], B: int = 2, K: int = 3, seed: int = 0
) -> tuple[Feats, Feats, Tensor]:
    """Features of B queries and B * K supports, all of them square, and masks with a rectangle each."""
    random = torch.Generator().manual_seed(seed)

    def maps(m: str, *batch: int) -> list[Tensor]:
        return [torch.randn(*batch, channels[m], sides[m], sides[m], generator=random) for _ in range(blocks[m])]

    masks = torch.zeros(B, K, 48, 48, dtype=torch.uint8)
    for b in range(B):
        for k in range(K):
            top, left = torch.randint(0, 24, (2,), generator=random).tolist()
            masks[b, k, top : top + 16 + 4 * k, left : left + 20] = 1
    return {m: maps(m, B) for m in channels}, {m: maps(m, B, K) for m in channels}, masks


def part(feats: Feats, *index: slice) -> Feats:
    return {m: [f[index] for f in fs] for m, fs in feats.items()}
