"""What PMMs and RPMMs share: prototypes as the means of a mixture, the layers that match and decode, the backbone.

Both are of Yang et al., "Prototype Mixture Models for Few-shot Semantic Segmentation", ECCV 2020, and of one program
(github.com/Yang-Bob/PMMs at 100d66b, no licence; this code was written from a description of it).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features, Reads
from pmnet.backbones.base import ByLayer
from pmnet.backbones.resnet import ResidualBackbone, build_trunk
from pmnet.backbones.weights import load_weights
from pmnet.errors import SettingError
from pmnet.methods.base import Head, Method, resize, size_of
from pmnet.methods.pfenet import flat, mask_at
from pmnet.methods.release import filled, inputs, of_head

WIDTH = 256  # channels of everything above the backbone
CONCENTRATION, ROUNDS = 20.0, 10  # of the expectation-maximisation
READS: Reads = {"layer2": "last", "layer3": "last"}
NAMES = {  # of the authors' modules -> ours
    "layer5": "embed",
    "layer55": "match",
    "layer56": "merge",
    "residule1": "residual.0",
    "residule2": "residual.1",
    "residule3": "residual.2",
    "layer6.layer6_0": "aspp.0",
    "layer6.layer6_1": "aspp.1",
    "layer6.layer6_2": "aspp.2",
    "layer6.layer6_3": "aspp.3",
    "layer6.layer6_4": "aspp.4",
    "layer7": "reduce",
    "layer9": "classify",
}


class Prototypes(NamedTuple):
    """The means of the two mixtures of one episode's supports, unit vectors.

    Attributes:
        foreground, background: (B, k, C).
    """

    foreground: Tensor
    background: Tensor


class MixtureHead(Head):
    """The layers of PMMs and RPMMs.

    Args:
        channels: feature channels of "layer2" and "layer3".
        sizes: prototypes of each side, one number a round.
        matched: channels that `merge` takes.
        step: what follows a convolution in `match`, `merge` and `reduce`.
        seed: of the starts of the mixtures, which are buffers `start{k}` (k, C).
    """

    def __init__(self, channels: Mapping[str, int], sizes: Sequence[int], matched: int, step: Any, seed: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        generator = torch.Generator().manual_seed(seed)
        for k in self.sizes:
            self.register_buffer(f"start{k}", unit(torch.randn(k, WIDTH, generator=generator)))
        read = channels["layer2"] + channels["layer3"]
        self.embed = nn.Sequential(conv3x3(read, WIDTH, dilation=2), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.match = nn.Sequential(conv3x3(2 * WIDTH, WIDTH, dilation=2), *step())
        self.merge = nn.Sequential(conv3x3(matched, WIDTH), *step())
        self.residual = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv3x3(width, WIDTH), nn.ReLU(), conv3x3(WIDTH, WIDTH))
            for width in (WIDTH + 2, WIDTH, WIDTH)
        )
        branches = [nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)]
        branches += [conv3x3(WIDTH, WIDTH, dilation) for dilation in (6, 12, 18)]
        self.aspp = nn.ModuleList(nn.Sequential(conv, nn.ReLU(), nn.Dropout2d(0.5)) for conv in branches)
        self.reduce = nn.Sequential(nn.Conv2d(5 * WIDTH, WIDTH, 1), *step())
        self.classify = nn.Conv2d(WIDTH, 2, 1)

    # Supports

    @torch.no_grad()
    def prototypes(self, support_feats: Features, support_masks: Tensor) -> list[Prototypes]:
        """The prototypes of every round; the positions of all K shots are one set. No gradient passes through them."""
        B, K = support_masks.shape[:2]
        feature_NChw = self.embedded(flat(support_feats))
        mask_BKhw = mask_at(support_masks, feature_NChw)
        feature_BSC = feature_NChw.unflatten(0, (B, K)).movedim(2, -1).flatten(1, 3)
        mask_BS1 = mask_BKhw.flatten(1).unsqueeze(2)
        sides = mask_BS1 * feature_BSC, (1 - mask_BS1) * feature_BSC
        starts = [getattr(self, f"start{k}") for k in self.sizes]
        return [Prototypes(*(means(side, start) for side in sides)) for start in starts]

    def embedded(self, feats: Features) -> Tensor:
        """(N, 256, h, w) at the size of layer2, made of layer2 and layer3 after their last ReLU."""
        low, high = feats["layer2"][-1], feats["layer3"][-1]
        return self.embed(F.relu(torch.cat([low, resize(high, size_of(low))], dim=1)))

    # Query

    def matched(self, query_BChw: Tensor, prototypes_BkC: Tensor) -> Tensor:
        """(B, 256, h, w): the query beside each foreground prototype in turn, summed.

        A convolution of two things side by side is the sum of two. That of the query is computed once; that of a
        prototype, which is the same at every position, differs only where a tap falls outside the map.
        """
        layers: list[Any] = list(self.match)
        conv, step = layers[0], nn.Sequential(*layers[1:])
        of_query, of_prototype_OCT = conv.weight[:, :WIDTH], conv.weight[:, WIDTH:].flatten(2)
        outside = {"padding": conv.padding, "dilation": conv.dilation}
        query_BOhw = F.conv2d(query_BChw, of_query, conv.bias, **outside)
        taps = torch.eye(of_prototype_OCT.shape[2]).to(query_BChw).view(-1, 1, 3, 3)
        inside_Thw = F.conv2d(torch.ones_like(query_BChw[:1, :1]), taps, **outside)[0]
        tapped_BkOT = torch.einsum("oct,bkc->bkot", of_prototype_OCT, prototypes_BkC.to(of_prototype_OCT.dtype))
        total = torch.zeros_like(query_BOhw)
        for prototype_BOT in tapped_BkOT.unbind(1):  # one after the other: BatchNorm sees them so in training
            spread_BOhw = torch.einsum("bot,thw->bohw", prototype_BOT, inside_Thw)
            total = total + step(query_BOhw + spread_BOhw)
        return total

    @torch.no_grad()
    def probability_map(self, query_BChw: Tensor, prototypes: Prototypes) -> Tensor:
        """(B, 2, h, w): the share of the background's and of the foreground's prototypes in a softmax over all."""
        mean_BkC = torch.cat([prototypes.background, prototypes.foreground], dim=1)
        product_BkQ = mean_BkC @ query_BChw.to(mean_BkC.dtype).flatten(2)
        sides = product_BkQ.softmax(dim=1).chunk(2, dim=1)
        return torch.stack([side.sum(dim=1) for side in sides], dim=1).unflatten(2, query_BChw.shape[-2:])

    def decode(self, x: Tensor, history: Tensor) -> Tensor:
        """Logits (B, 2, h, w) of what `merge` gave and an earlier answer (B, 2, h, w)."""
        first, *others = self.residual
        x = x + first(torch.cat([x, history.to(x.dtype)], dim=1))
        for residual in others:
            x = x + residual(x)
        of_image, *of_positions = self.aspp
        branches = [of_image(x.mean(dim=(2, 3), keepdim=True)).expand_as(x), *(branch(x) for branch in of_positions)]
        return self.classify(self.reduce(torch.cat(branches, dim=1)))


def conv3x3(inputs: int, outputs: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis, divided by their length."""
    return x / (1e-6 + x.norm(dim=-1, keepdim=True))


def means(feature_BSC: Tensor, start_kC: Tensor) -> Tensor:
    """The means (B, k, C) of a mixture on the sphere, by expectation-maximisation over all positions."""
    with torch.autocast(feature_BSC.device.type, enabled=False):  # ten rounds amplify rounding
        feature_BSC, mean_BkC = feature_BSC.to(start_kC.dtype), start_kC.expand(len(feature_BSC), -1, -1)
        for _ in range(ROUNDS):
            belongs_BSk = (CONCENTRATION * feature_BSC @ mean_BkC.mT).softmax(dim=2)
            belongs_BSk = belongs_BSk / (1e-6 + belongs_BSk.sum(dim=1, keepdim=True))
            mean_BkC = unit(belongs_BSk.mT @ feature_BSC)
        return mean_BkC


def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """To the image's size, corners not aligned: the one resizing of this program that is not the others'."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def from_names(kind: Callable[..., MixtureHead], state_dict: Mapping[str, Tensor], seed: int) -> Any:
    """A head with the authors' tensors, in eval mode. The starts of the mixtures, which their checkpoints lack, are
    taken from tensors named `mu/{k}` (1, C, k) where there are such."""
    release = of_head(state_dict)
    read = inputs(release, "layer5.0.weight")
    head = kind({"layer2": read // 3, "layer3": read - read // 3}, seed=seed)
    absent = re.compile(r"start\d|.*num_batches_tracked")
    state = {name: tensor for name, tensor in head.state_dict().items() if absent.match(name)}
    for name, tensor in release.items():
        root = next((root for root in NAMES if name.startswith(f"{root}.")), "")
        if name.startswith("mu/"):
            state[name.replace("mu/", "start")] = tensor[0].mT
        elif not name.startswith("model_res."):
            state[NAMES.get(root, "") + name.removeprefix(root)] = tensor
    return filled(head, state)


# Training


class MixtureBackbone(ResidualBackbone):
    """The ResNet of PMMs: no layer4, layer3 dilated at the stride of layer2, strides in the first 1x1 convolutions.

    torchvision's weights fit by name, though they were trained with the strides in the 3x3 convolutions.

    Args:
        name: "resnet50" or "resnet101".
        weights: see `pmnet.backbones.weights.load_weights`; the authors' checkpoints load as well.
        download: fetch named weights that are not on this machine yet.

    Raises:
        SettingError: a ResNet without bottlenecks.
        WeightsError: the weights are missing, damaged, or of another network.
    """

    strides = {"layer1": 4, "layer2": 8, "layer3": 8}

    def __init__(self, name: str, weights: str, download: bool = False) -> None:
        super().__init__()
        self.trunk, self.provenance = load_weights(partial(dilated, name), name, weights, download, up_to_layer3)
        stages = {layer: getattr(self.trunk, layer) for layer in ("layer1", "layer2", "layer3")}
        self.channels = ByLayer({layer: stage[-1].conv3.out_channels for layer, stage in stages.items()})
        self.blocks = ByLayer({layer: len(stage) for layer, stage in stages.items()})

    def stem(self, images: Tensor) -> Tensor:
        return self.trunk.maxpool(F.relu(self.trunk.bn1(self.trunk.conv1(images))))


def dilated(name: str) -> nn.Module:
    trunk: Any = build_trunk(name)
    if not hasattr(trunk.layer1[0], "conv3"):
        raise SettingError(f"backbone.name={name} has no bottlenecks. Choose resnet50 or resnet101.")
    del trunk.layer4
    trunk.maxpool.ceil_mode = True
    for first, stride in ((trunk.layer2[0], 2), (trunk.layer3[0], 1)):
        first.conv1.stride = first.downsample[0].stride = (stride, stride)
        first.conv2.stride = (1, 1)
    for block in trunk.layer3:
        block.conv2.dilation = block.conv2.padding = (2, 2)
    return trunk


def up_to_layer3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a file of torchvision's or of the authors', the tensors that the backbone has."""
    bare = {re.sub(r"^(module\.|model_res\.)*", "", name): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in bare.items() if re.match(r"(conv1|bn1|layer[123]\.\d+)\.", name)}


def trained_parts(backbone: Backbone) -> tuple[str, ...]:
    """The parts of a trunk that PMMs train: all up to layer3."""
    return tuple(name for name, _ in backbone.trunk.named_children() if name not in ("layer4", "fc"))


def parameter_groups(method: Method, lr: float) -> list[dict[str, Any]]:
    """The backbone's convolutions at the rate, new weights at 10 times it, new biases at 20 times it."""
    head = list(method.head.named_parameters())
    return [
        {"params": [p for p in method.backbone.parameters() if p.requires_grad], "lr": lr},
        {"params": [p for name, p in head if not name.endswith("bias")], "lr": 10 * lr},
        {"params": [p for name, p in head if name.endswith("bias")], "lr": 20 * lr},
    ]
