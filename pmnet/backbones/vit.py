"""DINOv2 and DINOv3 vision transformers, as timm builds them: one scale, turned into the four that methods ask for.

Axes in names of tensors: B batch, N tokens, C channels.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones.base import LAYERS, Backbone, Features, Reads
from pmnet.backbones.weights import load_weights
from pmnet.errors import SettingError

SIZES = ("small", "base", "large")
NAMES = {  # ours -> timm's
    **{f"dinov2_{size}": f"vit_{size}_patch14_dinov2" for size in SIZES},
    **{f"dinov2_{size}_reg4": f"vit_{size}_patch14_reg4_dinov2" for size in SIZES},
    **{f"dinov3_{size}": f"vit_{size}_patch16_dinov3" for size in SIZES},
}
STRIDES = dict(zip(LAYERS, (4, 8, 16, 32), strict=True))


class ViTBackbone(Backbone):
    """A DINOv2 (patch 14) or DINOv3 (patch 16) vision transformer.

    A transformer keeps one resolution from its first block to its last. Methods ask for four, so:

    - The blocks are split into four equal groups, "layer1" to "layer4": 3 blocks each in small and base, 6 in large.
    - The feature of a block is its output after the network's final LayerNorm, which the networks' authors apply to
      every block whose tokens they read. Class and register tokens are left out.
    - The map of tokens is resized to strides 4, 8, 16 and 32 of the image: a side of n pixels becomes
      ceil(n / stride) positions, bilinear where that is finer than the patches and an area mean where it is coarser.
      The finer maps hold no more detail than the tokens.

    Any image side is allowed. An image whose sides are not multiples of the patch is enlarged to the next ones, so that
    the patches cover it exactly and every map lies evenly over it. A `FeatureCache` keeps the maps before they are
    resized.

    Args:
        name: "dinov2_small", "dinov2_base" or "dinov2_large", each also with four registers ("dinov2_small_reg4");
            "dinov3_small", "dinov3_base" or "dinov3_large".
        weights: "lvd142m" (DINOv2), "lvd1689m" (DINOv3), a path, or "none"; see `pmnet.backbones.weights`. A file may
            have timm's names of tensors or the authors'.
        download: fetch named weights that are not on this machine yet.

    Raises:
        SettingError: unknown name.
        WeightsError: the weights are missing, damaged, or of another network.
    """

    def __init__(self, name: str, weights: str, download: bool = False) -> None:
        if name not in NAMES:
            raise SettingError(f"backbone.name={name} is not one of {', '.join(NAMES)}.")
        super().__init__()
        self.trunk, self.provenance = load_weights(partial(build_trunk, name), name, weights, download, renamed)
        self.depth = len(self.trunk.blocks) // len(LAYERS)  # of a group
        self.channels = dict.fromkeys(LAYERS, self.trunk.embed_dim)
        self.blocks = dict.fromkeys(LAYERS, self.depth)

    def forward(self, images: Tensor, reads: Reads | None = None) -> Features:
        maps = super().forward(images, reads)
        return {layer: [at_stride(m, STRIDES[layer], images) for m in blocks] for layer, blocks in maps.items()}

    def stem(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], tuple[int, int]]:
        """(B, 3, H, W) normalised -> tokens (B, N, C), what every block takes besides, and the grid of patches."""
        patch = self.trunk.patch_embed.patch_size
        H, W = (-(-side // step) * step for side, step in zip(images.shape[-2:], patch, strict=True))
        if images.shape[-2:] != (H, W):
            images = F.interpolate(images, (H, W), mode="bilinear")
        embedded = self.trunk._pos_embed(self.trunk.patch_embed(images))
        tokens_BNC, rotary = (
            embedded if isinstance(embedded, tuple) else (embedded, None)
        )  # DINOv3 rotates, DINOv2 adds
        return tokens_BNC, {} if rotary is None else {"rope": rotary}, (H // patch[0], W // patch[1])

    def stage(self, layer: str, x: Any) -> tuple[list[Tensor], Any]:
        tokens_BNC, position, grid = x
        first = LAYERS.index(layer) * self.depth
        maps = []
        for block in self.trunk.blocks[first : first + self.depth]:
            tokens_BNC = block(tokens_BNC, **position)
            patches_BNC = self.trunk.norm(tokens_BNC)[:, self.trunk.num_prefix_tokens :]
            maps.append(patches_BNC.unflatten(1, grid).permute(0, 3, 1, 2))
        return maps, (tokens_BNC, position, grid)


def at_stride(tokens: Tensor, stride: int, images: Tensor) -> Tensor:
    """(B, C, h, w) over whole images -> (B, C, ceil(H / stride), ceil(W / stride)) over the same."""
    size = [-(-side // stride) for side in images.shape[-2:]]
    if size == list(tokens.shape[-2:]):
        return tokens
    finer = all(to >= side for to, side in zip(size, tokens.shape[-2:], strict=True))
    return F.interpolate(tokens, size, mode="bilinear" if finer else "area")


def build_trunk(name: str) -> nn.Module:
    import timm  # takes seconds to import

    return timm.create_model(NAMES[name], pretrained=False, num_classes=0, dynamic_img_size=True)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under timm's names; what the authors' files hold for training alone is left out."""
    state = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    if "register_tokens" in state:  # DINOv2, whose authors add the class token's position when they run it
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    if "storage_tokens" in state:  # DINOv3
        state["reg_token"] = state.pop("storage_tokens")
        unused = ("periods", "bias_mask")  # positions that timm computes; which biases are 0: in the end, all are
        state = {name: tensor for name, tensor in state.items() if not name.endswith(unused)}
        state = {name: tensor for name, tensor in state.items() if not name.endswith("qkv.bias") or tensor.any()}
        for theirs, ours in (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")):
            state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    return state
