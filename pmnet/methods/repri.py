"""RePRI: a linear classifier for each episode, tuned on its supports and, without labels, on its query.

Boudiaf et al., "Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All You Need?", CVPR
2021. Published program: github.com/mboudiaf/RePRI-for-Few-Shot-Segmentation at aa54b19, MIT licence; this code was
written from a description of it.

An ordinary segmentation network, a PSPNet, learns the base classes; no episode is seen in training. For each episode,
gradient steps then tune a prototype and a bias. The loss is the supports' cross-entropy, the entropy of the query's
probabilities, and how far the query's share of foreground is from a first estimate of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmnet.backbones import Backbone, Features
from pmnet.errors import SettingError
from pmnet.methods.base import IGNORE, Criterion, Head, Method, resize, scored, size_of
from pmnet.methods.pfenet import flat
from pmnet.methods.release import filled, inputs, of_head

WIDTH, BINS = 512, (1, 2, 3, 6)  # of the pyramid pooling
TEMPERATURE = 20.0
EPS = 1e-10


class Seen(NamedTuple):
    """What is remembered of B episodes.

    Attributes:
        feature: (B, K, S, C), unit vectors; S = hs * ws.
        foreground: (B, K, S) bool.
        prototype: (B, C), the mean over the foreground of all shots.
    """

    feature: Tensor
    foreground: Tensor
    prototype: Tensor


class RePRIHead(Head):
    """The layers of a PSPNet above the backbone, and the tuning.

    Args:
        channels: feature channels of "layer4".
        base_classes: that the network learns beside the background.
        steps: of gradient descent, on each episode.
        estimate_after: the step after which the share of foreground is estimated again, and counts more.
        lr: of these steps.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        base_classes: int,
        steps: int = 49,
        estimate_after: int = 9,
        lr: float = 0.025,
    ) -> None:
        super().__init__()
        self.steps, self.estimate_after, self.lr = steps, estimate_after, lr
        read = channels["layer4"]
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), *convolution(read, WIDTH, kernel=1)) for bins in BINS
        )
        self.bottleneck = nn.Sequential(*convolution(read + len(BINS) * WIDTH, WIDTH, kernel=3), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(WIDTH, base_classes + 1, 1)

    def feature(self, feats: Features) -> Tensor:
        """(N, 512, h, w), made of layer4 after its last ReLU, unless it is given as "bottleneck"."""
        if "bottleneck" in feats:
            return feats["bottleneck"][-1]
        x = F.relu(feats["layer4"][-1])
        pooled = [resize(pool(x), size_of(x)) for pool in self.pyramid]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))

    def classify(self, feats: Features, size: tuple[int, int]) -> Tensor:
        """Logits (N, 1 + base classes, H, W), background first."""
        return resize(self.classifier(self.feature(feats)), size)

    # Episodes

    def see(self, support_feats: Features, support_masks: Tensor) -> Seen:
        B, K = support_masks.shape[:2]
        feature_NChw = self.feature(flat(support_feats))
        feature_BKSC = tokens(feature_NChw).unflatten(0, (B, K))
        mask_BKhw = F.interpolate((support_masks == 1).to(feature_BKSC.dtype), size_of(feature_NChw), mode="nearest")
        mask_BKS1 = mask_BKhw.flatten(2)[..., None]
        prototype_BC = (mask_BKS1 * feature_BKSC).sum(dim=(1, 2)) / (mask_BKS1.sum(dim=(1, 2)) + EPS)
        return Seen(feature_BKSC, mask_BKS1[..., 0].bool(), prototype_BC)

    def segment(self, query_feats: Features, seen: Seen, size: tuple[int, int]) -> Tensor:
        """Logits (B, 2, H, W) whose softmax is the tuned classifier's answer: 0, and the foreground's.

        Every episode is tuned by itself, with gradients even where they are switched off outside.
        """
        query_BChw = self.feature(query_feats)
        query_BQC = tokens(query_BChw)
        with torch.autocast(query_BQC.device.type, enabled=False):  # the steps are small
            classifier = tuned(query_BQC, seen, self.steps, self.estimate_after, self.lr)[-1]
            logit_B1hw = classifier.logits(query_BQC).unflatten(1, size_of(query_BChw))[:, None]
        return F.pad(resize(logit_B1hw, size), (0, 0, 0, 0, 1, 0))


class RePRI(Method):
    """Takes any number of shots and any image sides. Trained by `base_loss`, on images of base classes.

    Args:
        backbone: with layer4; all of it is trained. Published: `DilatedResNetBackbone`.
        base_classes: that the network learns beside the background.
        options: of `RePRIHead`: steps, estimate_after, lr.
        label_smoothing: of the training loss, the share of the target that the wrong classes divide among them.

    Attributes:
        tuned_on: what gradient steps at test use.

    Example:
        >>> import torch
        >>> from pmnet.backbones import SmallBackbone
        >>> from pmnet.methods.repri import RePRI
        >>> method = RePRI(SmallBackbone("none"), base_classes=15).eval()
        >>> method.predict(torch.rand(1, 3, 64, 64), torch.rand(1, 5, 3, 64, 64), torch.ones(1, 5, 64, 64)).shape
        torch.Size([1, 64, 64])
    """

    head: RePRIHead
    query_reads = support_reads = {"layer4": "last"}
    side_multiple = 1
    batchnorm = "train"
    tuned_on = "each test episode: its supports with their masks, and its query without"

    def __init__(self, backbone: Backbone, base_classes: int, label_smoothing: float = 0.1, **options: Any) -> None:
        self.learned_layers = tuple(name for name, _ in backbone.trunk.named_children())
        super().__init__(backbone, RePRIHead(backbone.channels, base_classes, **options))
        self.label_smoothing = label_smoothing

    def base_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The training loss, a scalar.

        Args:
            images: (N, 3, H, W), as those of `forward`.
            labels: (N, H, W): i + 1 = i-th base class, 0 = background, 255 = ignore (novel classes, padding).
        """
        classes = self.head.classifier.out_channels
        highest = int(labels.masked_fill(labels == IGNORE, 0).max())
        if highest >= classes:
            raise SettingError(
                f"There are labels up to {highest}, but model.base_classes={classes - 1}: set {highest}."
            )
        logits = self.head.classify(self.backbone_pass(images, self.query_reads), size_of(labels))
        spread = self.label_smoothing * logits.shape[1] / (logits.shape[1] - 1)  # PyTorch's share is for all classes
        return scored(nn.CrossEntropyLoss(ignore_index=255, label_smoothing=spread), logits, labels)

    def loss(self, batch: Any, criterion: Criterion) -> Tensor:
        """`base_loss` of a batch with "images" and "labels"; the criterion is not used.

        Raises:
            SettingError: the batch is one of episodes, or has more classes than `base_classes`.
        """
        if not hasattr(batch, "labels"):
            raise SettingError(
                "RePRI does not train on episodes, but on labelled images of the base classes: set "
                "episodes._target_=datamodules.episodes.pixels.LabelledDataModule."
            )
        return self.base_loss(batch.images, batch.labels)


# The tuning


class Classifier(NamedTuple):
    """Of each of B episodes.

    Attributes:
        weight: (B, C), the prototype.
        bias: (B,).
    """

    weight: Tensor
    bias: Tensor

    def logits(self, feature_BNC: Tensor) -> Tensor:
        """(B, N): cosines with the prototype times 20, less the bias."""
        return cosines(feature_BNC, self.weight) - self.bias[:, None]

    def probabilities(self, feature_BNC: Tensor) -> Tensor:
        """(B, N, 2): background, foreground."""
        foreground_BN = self.logits(feature_BNC).sigmoid()
        return torch.stack([1 - foreground_BN, foreground_BN], dim=2)


def tuned(
    query_BQC: Tensor, seen: Seen, steps: int, estimate_after: int, lr: float, valid_BQ: Tensor | None = None
) -> list[Classifier]:
    """The classifiers before the first step and after each.

    Args:
        query_BQC: unit vectors.
        valid_BQ: the query's positions that count; None: all of them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        query, support, foreground, weight = (torch.clone(x).detach() for x in (query_BQC, *seen))
        valid = torch.ones_like(query[:, :, 0]) if valid_BQ is None else torch.clone(valid_BQ).to(query.dtype)
        shots = support.shape[1]
        support, foreground = support.flatten(1, 2), foreground.flatten(1)
        classifier = Classifier(weight, cosines(query, weight).mean(dim=1))
        path = [classifier]
        for step in range(steps):
            classifier = Classifier(*(x.requires_grad_() for x in classifier))
            answer = classifier.probabilities(query)
            if step in (0, estimate_after):
                share = mean(answer, valid).detach()
            kl_counts = 1 / shots + (step >= estimate_after)
            ce, kl, entropy = terms(answer, valid, share, classifier.probabilities(support), foreground)
            loss = (ce + kl_counts * kl + entropy / shots).sum()  # no episode depends on another's classifier
            gradients = torch.autograd.grad(loss, classifier)
            classifier = Classifier(*(x.detach() - lr * g for x, g in zip(classifier, gradients, strict=True)))
            path.append(classifier)
    return [Classifier(*(x.detach() for x in classifier)) for classifier in path]


def terms(
    query_BQ2: Tensor, valid_BQ: Tensor, share_B2: Tensor, support_BS2: Tensor, foreground_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each (B,): the supports' cross-entropy; the divergence of the query's share of both sides from the estimate; the
    query's entropy."""
    true_BS = torch.where(foreground_BS, support_BS2[:, :, 1], support_BS2[:, :, 0])
    now_B2 = mean(query_BQ2, valid_BQ)
    divergence = (now_B2 * (now_B2 / (share_B2 + EPS)).log()).sum(dim=1)
    entropy_BQ2 = -query_BQ2 * (query_BQ2 + EPS).log()
    return -(true_BS + EPS).log().mean(dim=1), divergence, mean(entropy_BQ2, valid_BQ).sum(dim=1)


def mean(value_BQ2: Tensor, valid_BQ: Tensor) -> Tensor:
    """(B, 2): over the valid positions."""
    return (value_BQ2 * valid_BQ[:, :, None]).sum(dim=1) / (valid_BQ.sum(dim=1, keepdim=True) + EPS)


def cosines(feature_BNC: Tensor, weight_BC: Tensor) -> Tensor:
    """(B, N): 20 times the cosine."""
    product_BN = torch.einsum("bnc,bc->bn", feature_BNC, weight_BC)
    lengths_BN = weight_BC.norm(dim=1, keepdim=True) * feature_BNC.norm(dim=2)
    return TEMPERATURE * product_BN / (lengths_BN + EPS)


def tokens(feature_NChw: Tensor) -> Tensor:
    """(N, h * w, C), unit vectors in float32 at least."""
    precise = torch.promote_types(feature_NChw.dtype, torch.float32)
    return F.normalize(feature_NChw.to(precise).flatten(2).mT, dim=2)


def convolution(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


# The authors' checkpoints


def from_release(state_dict: Mapping[str, Tensor], **options: Any) -> RePRIHead:
    """The head from the authors' tensor names.

    Args:
        state_dict: a whole checkpoint. The backbone's tensors are ignored here; the backbone reads them from the same
            file (`backbone.weights=<path>`).
        options: of the tuning: steps, estimate_after, lr.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    release = {name.replace("ppm.features", "pyramid"): tensor for name, tensor in of_head(state_dict).items()}
    channels = {"layer4": inputs(release, "pyramid.0.1.weight")}
    head = RePRIHead(channels, len(release.get("classifier.weight", [])) - 1, **options)
    counters = {name: t for name, t in head.state_dict().items() if name.endswith("num_batches_tracked")}
    return filled(head, counters | release)
