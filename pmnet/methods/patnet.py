"""PATNet: HSNet on features that each support's prototypes turn towards learned anchors.

Lei, Zhang, He, Chen, Du, Lu, "Cross-Domain Few-Shot Semantic Segmentation", ECCV 2022. Published program:
github.com/slei109/PATNet at 0155c5f, without a licence: this code was written from a description of it.

Each stage has two anchors, of background and foreground. A matrix maps a support's two prototypes to them, and
transforms all features of that support and of its query; HSNet does the rest. At test, the anchors can be tuned for
each episode, so that the query's predicted foreground is more like the supports'.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.errors import CheckpointError
from pmnet.methods import hsnet
from pmnet.methods.base import Method, resize, size_of
from pmnet.methods.correlation import EPS, masked
from pmnet.methods.hsnet import STAGES, HSNet, HSNetHead, of_head
from pmnet.methods.pooling import masked_mean
from pmnet.methods.release import filled, inputs
from pmnet.methods.votes import each

ANCHORS = {"layer2": "reference_layer1", "layer3": "reference_layer2", "layer4": "reference_layer3"}
COMPARED = "layer2"  # the stage whose prototypes are compared while tuning
TINY = 1e-6  # added to the lengths of prototypes and anchors, and to the sums of masks


class Seen(NamedTuple):
    """What is remembered of B episodes' supports.

    The transformed features of a block are R^T a: R are the two anchors, and a has two coordinates at each position.

    Attributes:
        to_coordinates: stage -> list of (B, K, C, 2), pseudo-inverses of the blocks' prototypes.
        coordinates: stage -> list of (B, K, 2, h, w), those of the masked features.
        products: stage -> (B, K, 2, 2), inner products of the anchors.
        foreground: of each block of layer2 the foreground prototype, (B, K, C).
        masks: (B, K, H, W).
    """

    to_coordinates: Features
    coordinates: Features
    products: dict[str, Tensor]
    foreground: list[Tensor]
    masks: Tensor


class PATNetHead(HSNetHead):
    """All that is learned: 2,580,968 parameters on a ResNet-50. The modules have the names of the authors' program.

    Args:
        channels: feature channels of "layer2", "layer3" and "layer4".
        blocks: number of blocks of these.
        tuning_steps: of Adam on the anchors, for each test episode; 0: the anchors stay as they were learned.
        tuning_lr: rate of these steps.
    """

    def __init__(
        self, channels: Mapping[str, int], blocks: Mapping[str, int], tuning_steps: int = 0, tuning_lr: float = 1e-3
    ) -> None:
        super().__init__(blocks)
        self.tuning_steps, self.tuning_lr = tuning_steps, tuning_lr
        for stage, name in ANCHORS.items():
            anchors = nn.Linear(channels[stage], 2)  # background, foreground; the biases are never used
            nn.init.kaiming_normal_(anchors.weight, nonlinearity="linear")
            nn.init.zeros_(anchors.bias)
            self.add_module(name, anchors)

    @property
    def anchors(self) -> dict[str, Tensor]:
        """stage -> (2, C)."""
        return {stage: self.get_parameter(f"{name}.weight") for stage, name in ANCHORS.items()}

    def see(self, support_feats: Features, support_masks: Tensor) -> Any:
        """A `Seen`; arguments as in `Head.see`."""
        with torch.autocast(support_masks.device.type, enabled=False):  # inverses need single precision
            feats = {m: [exact(f) for f in support_feats[m]] for m in STAGES}
            prototypes = {m: [both_sides(f, support_masks) for f in feats[m]] for m in STAGES}
            inverses = {m: [pseudo_inverse(p) for p in prototypes[m]] for m in STAGES}
            soft = {m: [masked(f, support_masks) for f in feats[m]] for m in STAGES}
            coordinates = {m: [in_coordinates(*x) for x in zip(soft[m], inverses[m], strict=True)] for m in STAGES}
            foreground = [p[..., 1, :] for p in prototypes[COMPARED]]
            return Seen(inverses, coordinates, products(self.anchors, support_masks), foreground, support_masks)

    def see_query(self, query_feats: Features) -> Features:
        return query_feats

    def pairs(self, query: Features, support: Any, size: tuple[int, int]) -> Tensor:
        of_query, of_support = self.units(query, support)
        return super().pairs(of_query, hsnet.Seen(of_support, support.masks), size)

    def units(self, query: Features, support: Any) -> tuple[Features, Features]:
        """stage -> list of (N, 2, h, w), for queries and supports, whose inner products are the cosines of the
        transformed features."""
        of_query: Features = {}
        of_support: Features = {}
        with torch.autocast(support.masks.device.type, enabled=False):
            for m, product_N22 in support.products.items():
                feature_inverse = zip(query[m], support.to_coordinates[m], strict=True)
                coordinates = [in_coordinates(exact(f), inverse) for f, inverse in feature_inverse]
                of_query[m] = [multiplied(unit(a, product_N22), product_N22) for a in coordinates]
                of_support[m] = [unit(a, product_N22) for a in support.coordinates[m]]
        return of_query, of_support

    def answers(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        if self.tuning_steps and not self.training:
            seen = self.tuned(query_feats, seen, size)
        return super().answers(query_feats, seen, size)

    def loss(self, *args: Any) -> Tensor:
        """Arguments as in `Head.loss`. The unused biases get gradients of 0, because training on several devices waits
        for a gradient of every parameter."""
        biases = [self.get_parameter(f"{name}.bias") for name in ANCHORS.values()]
        return super().loss(*args) + 0 * torch.stack([b.sum() for b in biases]).sum()

    # Tuning

    def tuned(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Seen:
        """Replaces the learned anchors by those tuned for each episode. The head's parameters stay as they are.

        Episodes are tuned one by one, so that an answer does not depend on the batch. Gradients are enabled here, even
        inside `torch.inference_mode()`.
        """
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(seen.masks.device.type, enabled=False):
            products_of = []
            for b in range(len(seen.masks)):
                query, support = (each(x, partial(separate, b)) for x in (query_feats, seen))
                products_of.append(products(self.tuning(query, support, size)[-1], support.masks))
        return seen._replace(products={m: torch.cat([p[m] for p in products_of]).detach() for m in ANCHORS})

    def tuning(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """The anchors of one episode after each step, stage -> (2, C)."""
        anchors = {m: torch.clone(a).detach().requires_grad_() for m, a in self.anchors.items()}
        optimizer = torch.optim.Adam(anchors.values(), lr=self.tuning_lr)
        path = []
        for _ in range(self.tuning_steps):
            loss = self.divergence(anchors, query_feats, seen, size)
            gradients = torch.autograd.grad(loss, list(anchors.values()))
            for anchor, gradient in zip(anchors.values(), gradients, strict=True):
                anchor.grad = gradient
            optimizer.step()
            path.append({m: torch.clone(a).detach() for m, a in anchors.items()})
        return path

    def divergence(
        self, anchors: Mapping[str, Tensor], query_feats: Features, seen: Seen, size: tuple[int, int]
    ) -> Tensor:
        """The loss of the tuning (see the function `divergence`) for the masks that these anchors predict."""
        answers = super().answers(query_feats, seen._replace(products=products(anchors, seen.masks)), size)
        return divergence(query_feats[COMPARED], seen.foreground, answers.softmax(dim=2)[:, :, 1].mean(dim=1))


# Prototypes and coordinates


def both_sides(feature_BKChw: Tensor, masks_BKHW: Tensor) -> Tensor:
    """The prototypes (B, K, 2, C) of background and foreground."""
    soft_BKhw = resize(masks_BKHW.to(feature_BKChw.dtype), size_of(feature_BKChw))
    feature_NChw, soft_Nhw = feature_BKChw.flatten(0, 1), soft_BKhw.flatten(0, 1)
    sides = [masked_mean(feature_NChw, weight, TINY) for weight in (1 - soft_Nhw, soft_Nhw)]
    return torch.stack(sides, dim=1).unflatten(0, masks_BKHW.shape[:2])


def pseudo_inverse(prototypes_BK2C: Tensor) -> Tensor:
    """(B, K, C, 2), of the prototypes divided by their lengths. A zero prototype, of an empty mask, is left out."""
    unit_BK2C = over_length(prototypes_BK2C.double())  # both prototypes of an image are nearly parallel
    single = torch.finfo(torch.float32).eps * unit_BK2C.shape[-1]  # the cut-off of the authors' program
    return torch.linalg.pinv(unit_BK2C, rtol=single).to(prototypes_BK2C.dtype)


def over_length(x: Tensor) -> Tensor:
    """(..., C): each vector divided by (its length + 1e-6)."""
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + TINY)


def in_coordinates(feature: Tensor, inverse: Tensor) -> Tensor:
    """(..., C, h, w) by (..., C, 2) -> (..., 2, h, w)."""
    return (inverse.mT @ feature.flatten(-2)).unflatten(-1, size_of(feature))


def products(anchors: Mapping[str, Tensor], masks_BKHW: Tensor) -> dict[str, Tensor]:
    """stage -> inner products of the anchors divided by their lengths, (B, K, 2, 2), the same for all supports."""
    units = {m: over_length(anchor_2C) for m, anchor_2C in anchors.items()}
    return {m: (u[:, None] * u[None]).sum(dim=2).expand(*masks_BKHW.shape[:2], 2, 2) for m, u in units.items()}


def multiplied(a_N2hw: Tensor, product_N22: Tensor) -> Tensor:
    return torch.einsum("nij,njhw->nihw", product_N22, a_N2hw)


def unit(a_N2hw: Tensor, product_N22: Tensor) -> Tensor:
    """Coordinates divided by (the length of the transformed features R^T a + 1e-5)."""
    squares_N1hw = (a_N2hw * multiplied(a_N2hw, product_N22)).sum(dim=1, keepdim=True)
    return a_N2hw / (squares_N1hw.clamp(min=1e-30).sqrt() + EPS)  # of a zero vector the gradient is 0


def divergence(query: list[Tensor], foreground: list[Tensor], query_mask_BHW: Tensor) -> Tensor:
    """The loss of the tuning: how the query's foreground prototypes diverge from those of the supports.

    Prototypes are compared as distributions over the channels; the sum over blocks and episodes, the mean over shots.

    Args:
        query: of each block (B, C, h, w).
        foreground: of each block (B, K, C).
        query_mask_BHW: in [0, 1].
    """
    total = query_mask_BHW.new_zeros(())
    for feature_BChw, support_BKC in zip(query, foreground, strict=True):
        soft_Bhw = resize(query_mask_BHW[:, None], size_of(feature_BChw))[:, 0]
        of_query_B1C = masked_mean(feature_BChw, soft_Bhw, TINY).log_softmax(dim=1)[:, None]
        of_support_BKC = support_BKC.log_softmax(dim=2)
        total = total + (of_support_BKC.exp() * (of_support_BKC - of_query_B1C)).sum(dim=(0, 2)).mean()
    return total


def separate(b: int, x: Tensor) -> Tensor:
    """A copy of episode b alone, (1, ...), that is not of inference mode, so that gradients can pass through it."""
    return exact(torch.clone(x[b : b + 1]).detach())


def exact(x: Tensor) -> Tensor:
    """In single precision at least; whole numbers as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


class PATNet(HSNet):
    """Takes any number of shots and any image sides.

    Args:
        backbone: with layer2, layer3 and layer4 at strides of 8, 16 and 32.
        tuning_steps, tuning_lr: see `PATNetHead`.

    Attributes:
        tuned_on: what gradient steps at test use; empty without tuning.

    Example:
        >>> import torch
        >>> from pmnet.backbones import ResNetBackbone
        >>> from pmnet.methods.patnet import PATNet
        >>> method = PATNet(ResNetBackbone("resnet18", weights="none"), tuning_steps=2).eval()
        >>> method.predict(torch.rand(1, 3, 72, 80), torch.rand(1, 2, 3, 72, 80), torch.ones(1, 2, 72, 80)).shape
        torch.Size([1, 72, 80])
    """

    protocol = "patnet"

    def __init__(self, backbone: Backbone, tuning_steps: int = 0, tuning_lr: float = 1e-3) -> None:
        head = PATNetHead(backbone.channels, backbone.blocks, tuning_steps, tuning_lr)
        Method.__init__(self, backbone, head)
        episode = "each test episode: its supports with their masks, and its query without"
        self.tuned_on = episode if tuning_steps else ""


def from_release(state_dict: Mapping[str, Tensor], tuning_steps: int = 0, tuning_lr: float = 1e-3) -> PATNetHead:
    """The head, in eval mode, from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint; the backbone's tensors are ignored.
        tuning_steps, tuning_lr: see `PATNetHead`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    state = of_head(state_dict)
    blocks = {m: inputs(state, f"encoder_{m}.0.conv1.weight") for m in STAGES}
    try:
        channels = {m: state[f"{name}.weight"].shape[1] for m, name in ANCHORS.items()}
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"Not a checkpoint of PATNet by its authors: no anchors, {error}.") from error
    return filled(PATNetHead(channels, blocks, tuning_steps, tuning_lr), state)
