"""PMMs: prototypes of a support as the means of a mixture, three of each side.

Yang et al., "Prototype Mixture Models for Few-shot Semantic Segmentation", ECCV 2020. Published program:
github.com/Yang-Bob/PMMs at 100d66b (`FPMMs.py`), no licence; this code was written from a description of it.

Expectation-maximisation finds three prototypes of the supports' foreground and three of their background. The query is
matched with each foreground prototype, and a map tells how likely each of its positions belongs to either side. A
decoder with an ASPP makes the answer of both. `rpmms.py` does so in three rounds.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.methods.base import Method
from pmnet.methods.mixture import (
    READS,
    WIDTH,
    MixtureHead,
    Prototypes,
    from_names,
    parameter_groups,
    trained_parts,
    upsampled,
)


class PMMsHead(MixtureHead):
    """
    Args:
        channels: feature channels of "layer2" and "layer3".
        seed: of the start of the mixtures.
    """

    def __init__(self, channels: Mapping[str, int], seed: int = 0) -> None:
        super().__init__(channels, (3,), WIDTH, lambda: (nn.BatchNorm2d(WIDTH), nn.ReLU()), seed)

    def see(self, support_feats: Features, support_masks: Tensor) -> Prototypes:
        return self.prototypes(support_feats, support_masks)[0]

    def segment(self, query_feats: Features, seen: Prototypes, size: tuple[int, int]) -> Tensor:
        query_BChw = self.embedded(query_feats)
        x = self.merge(self.matched(query_BChw, seen.foreground))
        return upsampled(self.decode(x, self.probability_map(query_BChw, seen)), size)


class PMMs(Method):
    """Takes any number of shots and any image sides. Trains the backbone's convolutions up to layer3.

    Args:
        backbone: with layer2 and layer3; published: `pmnet.methods.mixture.MixtureBackbone`.
        lr: rate of the backbone; new weights have 10 times, new biases 20 times of it. None: one rate for all.
        seed: of the start of the mixtures.

    Example:
        >>> import torch
        >>> from pmnet.methods.mixture import MixtureBackbone
        >>> from pmnet.methods.pmms import PMMs
        >>> method = PMMs(MixtureBackbone("resnet50", weights="none")).eval()
        >>> method.predict(torch.rand(1, 3, 97, 97), torch.rand(1, 5, 3, 97, 97), torch.ones(1, 5, 97, 97)).shape
        torch.Size([1, 97, 97])
    """

    query_reads = support_reads = READS
    side_multiple = 1
    batchnorm = "train"
    ignored = "background"
    head_type: ClassVar[Any] = PMMsHead

    def __init__(self, backbone: Backbone, lr: float | None = None, seed: int = 0) -> None:
        self.learned_layers = trained_parts(backbone)
        super().__init__(backbone, self.head_type(backbone.channels, seed=seed))
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):  # its statistics move, its weights do not
                module.requires_grad_(False)
        self.lr = lr

    def learned(self) -> list[Any]:
        return list(super().learned()) if self.lr is None else parameter_groups(self, self.lr)


def from_release(state_dict: Mapping[str, Tensor], seed: int = 0) -> PMMsHead:
    """The head from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored. A tensor `mu/3` (1, 256, 3) is the start
            of the mixtures, which the authors' checkpoints do not hold.
        seed: of the start of the mixtures otherwise.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    return from_names(PMMsHead, state_dict, seed)
