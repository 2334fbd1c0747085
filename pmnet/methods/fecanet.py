"""FECANet: HSNet with correlations of local context, support features that are not masked, and a memory of answers.

Liu, Peng, Chen, Wang, Yao, Hua, "FECANet: Boosting Few-Shot Semantic Segmentation with Feature-Enhanced Context-Aware
Network", IEEE Transactions on Multimedia 2023. Published program:
github.com/NUST-Machine-Intelligence-Laboratory/FECANET at 4d8d1fe, without a licence: this code was written from a
description of it.

Each stage has a correlation for every block, as in HSNet, and one more that compares the context of positions: how
alike they are to their neighbours. Optionally, query and support attend to one another before that (feature
enhancement). In training, the decoder sometimes takes an earlier prediction for the same query.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.errors import SettingError
from pmnet.memory import keep_freed_memory
from pmnet.methods.base import IGNORE, Criterion, Method, resize, scored, size_of
from pmnet.methods.conv4d import building_steps
from pmnet.methods.correlation import correlation, masked, unit
from pmnet.methods.hsnet import STAGES, WIDTHS, conv3, of_head, resized
from pmnet.methods.release import filled, inputs
from pmnet.methods.votes import VotingHead

SQUEEZES = {  # stage -> kernels and support strides of its steps
    "layer4": ((3, 3, 3), (2, 2, 1)),
    "layer3": ((5, 3, 3), (2, 2, 2)),
    "layer2": ((5, 5, 3), (4, 2, 2)),
}
ENHANCEMENTS = {"layer2": "fem_1", "layer3": "fem_2", "layer4": "fem_3"}
HISTORY = "history_mask"


class Seen(NamedTuple):
    """What is remembered of B episodes' supports.

    Attributes:
        units: stage -> list of (B, K, C, h, w), the blocks' unit vectors.
        stages: stage -> its output after the last ReLU, masked, (B, K, C, h, w); without feature enhancement, the unit
            vectors of its context.
    """

    units: Features
    stages: dict[str, Tensor]


class Query(NamedTuple):
    """What is computed once for all supports of a query.

    Attributes:
        units: stage -> list of (B, C, h, w), the blocks' unit vectors.
        stages: stage -> its output after the last ReLU, (B, C, h, w); without feature enhancement, the unit vectors
            of its context.
        history: (B, 2, h', w'), the probabilities of an earlier prediction, or zeros.
    """

    units: Features
    stages: dict[str, Tensor]
    history: Tensor


class FECANetHead(VotingHead):
    """All that is learned: 3,547,778 parameters on a ResNet-50, and 14,481,376 more with feature enhancement.

    The modules have the names of the authors' program.

    Args:
        channels: feature channels of "layer2", "layer3" and "layer4".
        blocks: number of blocks of these.
        fem: enhance the features. Queries and supports then have the same size.
    """

    def __init__(self, channels: Mapping[str, int], blocks: Mapping[str, int], fem: bool = False) -> None:
        keep_freed_memory()
        super().__init__()
        self.fem = fem
        for stage, (kernels, strides) in SQUEEZES.items():
            self.add_module(f"encoder_{stage}", building_steps((blocks[stage] + 1, *WIDTHS), kernels, strides))
        self.encoder_layer4to3, self.encoder_layer3to2 = (
            building_steps((128,) * 4, kernels=(3, 3, 3), strides=(1, 1, 1)) for _ in range(2)
        )
        self.residule1, self.residule2, self.residule3 = (
            nn.Sequential(nn.ReLU(), conv3(width, 128), nn.ReLU(), conv3(128, 128)) for width in (130, 128, 128)
        )
        self.decoder1 = nn.Sequential(conv3(128, 128), nn.ReLU(), conv3(128, 64), nn.ReLU())
        self.decoder2 = nn.Sequential(conv3(64, 64), nn.ReLU(), conv3(64, 2))
        self.ss = Context()
        if fem:
            for stage, name in ENHANCEMENTS.items():
                self.add_module(name, Enhancement(channels[stage]))

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        """Arguments as in `Head.see`."""
        stages = {m: masked(F.relu(support_feats[m][-1]), support_masks) for m in STAGES}
        return Seen(units(support_feats), stages if self.fem else self.contexts(stages))

    def see_query(self, query_feats: Features) -> Query:
        """
        Args:
            query_feats: "history_mask", if there is one, is (B, 2, h', w'), or a list of one.
        """
        stages = {m: F.relu(query_feats[m][-1]) for m in STAGES}
        none = stages["layer2"].new_zeros(len(stages["layer2"]), 2, 1, 1)
        given: Any = query_feats.get(HISTORY, none)
        history = given if isinstance(given, Tensor) else given[0]
        return Query(units(query_feats), stages if self.fem else self.contexts(stages), history.to(none.dtype))

    def contexts(self, stages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unit vectors of the context of (..., C, h, w)."""
        return {m: unit(self.ss(x.flatten(0, -4)).unflatten(0, x.shape[:-3])) for m, x in stages.items()}

    def pairs(self, query: Query, support: Seen, size: tuple[int, int]) -> Tensor:
        s4, s3, s2 = (self.squeezed(m, query, support) for m in STAGES)
        if len({s.shape[4:] for s in (s4, s3, s2)}) > 1:
            raise SettingError(
                "FECANet needs a backbone whose layer2, layer3 and layer4 have strides of 8, 16 and 32: choose "
                "another, such as backbone=resnet50."
            )
        x = self.encoder_layer4to3(resized(s4, size_of(query.units["layer3"][0])) + s3)
        x = self.encoder_layer3to2(resized(x, size_of(query.units["layer2"][0])) + s2)
        e = x.mean(dim=(4, 5))
        r = e + self.residule1(torch.cat([e, resize(query.history, size_of(e))], dim=1))
        r = e + self.residule2(r)
        r = e + self.residule3(r)
        return resize(self.decoder2(resize(self.decoder1(r), native(query.units))), size)

    def squeezed(self, stage: str, query: Query, support: Seen) -> Tensor:
        """(N, 128, hq, wq, hs', ws'), a few support positions of each stage."""
        of_query, of_support = query.stages[stage], support.stages[stage]
        if self.fem:
            of_query, of_support = self.get_submodule(ENHANCEMENTS[stage])(of_query, of_support)
            contexts = self.contexts({"query": of_query, "support": of_support})
            of_query, of_support = contexts["query"], contexts["support"]
        alike = correlation([*query.units[stage], of_query], [*support.units[stage], of_support])
        return self.get_submodule(f"encoder_{stage}")(alike)

    def positions(self, query: Query) -> int:
        if self.fem and self.training:
            return 0  # BatchNorm takes the whole batch's statistics
        return sum(len(blocks) * (blocks[0].shape[-2] * blocks[0].shape[-1]) ** 2 for blocks in query.units.values())


def native(feats: Features) -> tuple[int, int]:
    """The size of the logits before they are resized to the image's: twice that of layer2."""
    h, w = size_of(feats["layer2"][0])
    return 2 * h, 2 * w


def units(feats: Features) -> Features:
    return {m: [unit(f) for f in feats[m]] for m in STAGES}


class Context(nn.Module):
    """How alike each position is to its neighbours: 9 cosines, and what two convolutions make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv1 = conv3(9, 128), conv3(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 201, h, w)."""
        x = F.normalize(x, dim=1)
        h, w = size_of(x)
        padded = F.pad(x, (1, 1, 1, 1))
        neighbours = [padded[..., dy : dy + h, dx : dx + w] for dx in range(3) for dy in range(3)]
        cosines = torch.stack([(x * neighbour).sum(dim=1) for neighbour in neighbours], dim=1)
        wider = F.relu(self.conv(cosines))
        return torch.cat([cosines, wider, F.relu(self.conv1(wider))], dim=1)


class Enhancement(nn.Module):
    """The feature enhancement module (FEM) of one stage: query and support attend to one another.

    As in the authors' program, attention weights over the positions of one image are applied to values of the other
    image. So both images have the same size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.common_v, self.key, self.query = (nn.Conv2d(channels, half, 1) for _ in range(3))
        self.Trans_s, self.Trans_q = (
            nn.Sequential(nn.Conv2d(half, channels, 1), nn.BatchNorm2d(channels)) for _ in range(2)
        )
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):  # at first, features stay as they are
                nn.init.zeros_(part.weight)
        self.ChannelGate = Gate(channels)

    def forward(self, query: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, h, w) both -> both, enhanced."""
        if query.shape != support.shape:
            raise SettingError(
                f"FECANet with model.fem=true takes supports of the query's size: features are {size_of(query)} and "
                f"{size_of(support)}. Resize the images, or choose model.fem=false."
            )
        scores_NSQ = self.key(support).flatten(2).mT @ self.query(query).flatten(2)
        of_support = self.common_v(support).flatten(2) @ scores_NSQ.softmax(dim=2).mT
        of_query = self.common_v(query).flatten(2) @ scores_NSQ.softmax(dim=1)
        return (
            self.Trans_q(of_query.unflatten(2, size_of(query))) * self.ChannelGate(query) + query,
            self.Trans_s(of_support.unflatten(2, size_of(query))) * self.ChannelGate(support) + support,
        )


class Gate(nn.Module):
    """A weight in 0..1 for each channel, computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 16
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, narrow), nn.ReLU(), nn.Linear(narrow, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, 1, 1)."""
        return self.mlp(x.mean(dim=(2, 3))).sigmoid()[..., None, None]


class FECANet(Method):
    """Takes any number of shots and any image sides.

    Args:
        backbone: with layer2, layer3 and layer4 at strides of 8, 16 and 32.
        fem: see `FECANetHead`.
        recall: probability in training that the decoder takes the last prediction for the same query and class.

    Attributes:
        memory: (name of a query, class) -> the foreground's probability in the last prediction, (2h, 2w) float16. Not
            saved in checkpoints; every process has its own.

    Example:
        >>> import torch
        >>> from pmnet.backbones import ResNetBackbone
        >>> from pmnet.methods.fecanet import FECANet
        >>> method = FECANet(ResNetBackbone("resnet18", weights="none")).eval()
        >>> method.predict(torch.rand(1, 3, 72, 80), torch.rand(1, 5, 3, 72, 80), torch.ones(1, 5, 72, 80)).shape
        torch.Size([1, 72, 80])
    """

    protocol = "hsnet"
    query_reads = support_reads = {"layer2": "all", "layer3": "all", "layer4": "all"}
    strides = {"layer2": 8, "layer3": 16, "layer4": 32}
    side_multiple = 1
    ignored = "background"
    head: FECANetHead

    def __init__(self, backbone: Backbone, fem: bool = False, recall: float = 0.3) -> None:
        super().__init__(backbone, FECANetHead(backbone.channels, backbone.blocks, fem))
        self.recall = recall
        self.memory: dict[tuple[str, int], Tensor] = {}

    def loss(self, episode: Any, criterion: Criterion) -> Tensor:
        """The training loss, a scalar: of every support's own answer, the last of which goes into `memory`.

        Arguments as in `Method.loss`.
        """
        query_feats, support_feats = self.features(episode.query, episode.support, episode.support_masks)
        size, K = native(query_feats), episode.support_masks.shape[1]
        query_feats = {**query_feats, HISTORY: [self.recalled(episode, size)]}
        seen = self.head.see(support_feats, episode.support_masks)
        answers_BK2hw = self.head.answers(query_feats, seen, size)
        for spec, share in zip(episode.spec, answers_BK2hw[:, -1].detach().softmax(dim=1)[:, 1], strict=True):
            self.memory[spec.query, spec.class_id] = share.to("cpu", torch.float16)
        masks = episode.query_mask.masked_fill(episode.query_mask == IGNORE, 0).repeat_interleave(K, dim=0)
        return scored(criterion, resize(answers_BK2hw.flatten(0, 1), size_of(masks)), masks)

    def recalled(self, episode: Any, size: tuple[int, int]) -> Tensor:
        """(B, 2, 2h, 2w): the last predictions for a random part of the queries, zeros for the others."""
        history = torch.zeros(len(episode.spec), 2, *size)
        for b, spec in enumerate(episode.spec):
            share = self.memory.get((spec.query, spec.class_id))
            if share is not None and torch.rand(()) < self.recall:
                history[b] = resize(torch.stack([1 - share, share])[None].float(), size)[0]
        return history.to(episode.query.device)


def from_release(state_dict: Mapping[str, Tensor], fem: bool | None = None) -> FECANetHead:
    """The head, in eval mode, from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored.
        fem: enhance the features. None: if the checkpoint has the tensors for it. False: ignore these tensors.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = of_head(state_dict)
    enhanced = {name for name in state if name.startswith("fem_")}
    if fem is None:
        fem = bool(enhanced)
    if not fem:
        state = {name: value for name, value in state.items() if name not in enhanced}
    blocks = {m: inputs(state, f"encoder_{m}.0.conv1.weight") - 1 for m in STAGES}
    channels = {m: inputs(state, f"{name}.key.weight") if fem else 0 for m, name in ENHANCEMENTS.items()}
    return filled(FECANetHead(channels, blocks, fem), state)
