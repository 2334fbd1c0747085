"""A method as two graphs for other programs: one sees the supports, one segments queries.

    see:      support (1, K, 3, H, W), masks (1, K, H, W)   ->  what the method keeps, as named tensors
    segment:  query (B, 3, H, W) and these tensors          ->  logits (B, 2, H, W)

Pixels are uint8, 0..255, masks uint8, 0 or 1. K and B may vary; so may the sides, as multiples of 32, unless the method
does not allow it.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import Head, Method
from pmnet.methods.base import resize, size_of
from pmnet.methods.pmnet import PMNetHead, decoder, hsfm
from pmnet.methods.pmnet.affinity import Affinity
from pmnet.methods.pmnet.hsfm import coarse_mask
from pmnet.segment.recipe import Built

OPSET = 20  # of ONNX
MULTIPLE = 32  # of the sides; strides of all backbones divide it
TOLERANCE = 1e-4  # of the largest logit
EXPORTED = ("pmnet", "nearest", "prototype", "panet")  # for messages


class See(nn.Module):
    """What a method keeps of supports, as a list of tensors."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, support: Tensor, masks: Tensor) -> list[Tensor]:
        method = self.method
        feats = method.backbone_pass(support.flatten(0, 1), method.support_reads)
        seen = pytree.tree_leaves(method.head.see(method.of_supports(feats, support, masks), masks))
        return [x.clone() if x is masks else x for x in seen]  # an output that is an input has no name of its own


class Segment(nn.Module):
    """Logits of B queries that share their supports.

    Args:
        method: any.
        tree: the structure of what its `see` returns.
    """

    def __init__(self, method: Method, tree: Any) -> None:
        super().__init__()
        self.method, self.tree = method, tree

    def forward(self, query: Tensor, seen: list[Tensor]) -> Tensor:
        expanded = [x.expand(query.shape[0], *x.shape[1:]) for x in seen]
        feats = self.method.backbone_pass(query, self.method.query_reads)
        return self.method.head.segment(feats, pytree.tree_unflatten(expanded, self.tree), size_of(query))


@dataclass(frozen=True)
class Graphs:
    """Both graphs of a method.

    Attributes:
        see: from supports to tensors.
        segment: from a query and these tensors to logits.
        names: of the tensors, in order.
        size: H, W of all images; None if the sides may vary.
    """

    see: ExportedProgram
    segment: ExportedProgram
    names: list[str]
    size: tuple[int, int] | None

    @property
    def takes(self) -> str:
        """One sentence on the images that the graphs take."""
        if self.size:
            return f"Sides are fixed: {self.size[0]} x {self.size[1]} (height x width). Shots and batch may vary."
        return f"Sides may vary, as multiples of {MULTIPLE} from {2 * MULTIPLE} on; so may shots and batch."


@torch.no_grad()
def graphs(built: Built, dynamic: bool = True) -> Graphs:
    """Traces a method with torch.export.

    Args:
        built: the method and its recipe, see `recipe.build`.
        dynamic: let the sides vary if the method allows it; otherwise they are those of the recipe.

    Raises:
        SettingError: the method cannot be traced, or its masks do not follow from logits.
    """
    method, (height, width) = built.method.cpu().eval(), built.recipe["image_size"]
    if type(method.head).mask is not Head.mask:
        raise refusal(method, "each shot votes, so that its mask does not follow from one graph's logits")
    why: Exception | None = None
    for size in (None, (height, width)) if dynamic else ((height, width),):
        try:
            with quiet():
                return traced(method, size)
        except Exception as error:  # torch.export raises errors of many kinds
            why = error
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    raise refusal(method, f"torch.export cannot follow its steps: {reason[:200]}") from why


def refusal(method: Method, reason: str) -> SettingError:
    return SettingError(
        f"{type(method).__name__} cannot be exported as a graph ({reason}). Use --format safetensors, or a method that "
        f"can be: {', '.join(EXPORTED)}."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, torch warns of nothing, and where it fails does not print the graph, which has thousands of lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def traced(method: Method, size: tuple[int, int] | None) -> Graphs:
    """Both graphs; with varying sides if `size` is None."""
    sides = size or (4 * MULTIPLE, 5 * MULTIPLE)
    support, masks, query = example(sides, shots=2, batch=3)
    if size is None:
        query = example((6 * MULTIPLE, 7 * MULTIPLE), shots=1, batch=3)[2]
    kept, tree = pytree.tree_flatten_with_path(method.see(support, masks))
    names = [name_of(path) for path, _ in kept]
    leaves = [leaf.contiguous() for _, leaf in kept]
    shots, batch = Dim("shots", min=1), Dim("batch", min=1)

    def varying(of: str, first: int) -> dict[int, Any]:
        if size:
            return {}
        return {first + i: MULTIPLE * Dim(f"{of}_{side}", min=2) for i, side in enumerate(("rows", "columns"))}

    of_images = varying("support", 3)
    of_masks = {axis - 1: side for axis, side in of_images.items()}
    of_seen = [dict.fromkeys(range(1, leaf.ndim), Dim.AUTO) for leaf in leaves]
    with plain():
        see = torch.export.export(
            See(method), (support, masks), dynamic_shapes=({1: shots} | of_images, {1: shots} | of_masks)
        )
        segment = torch.export.export(
            Segment(method, tree), (query, leaves), dynamic_shapes=({0: batch} | varying("query", 2), of_seen)
        )
    return Graphs(see, segment, names, size)


def example(size: tuple[int, int], shots: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise: supports (1, K, 3, H, W), their masks (1, K, H, W), of a rectangle, and queries (B, 3, H, W)."""
    source = torch.Generator().manual_seed(0)
    support, query = (
        torch.randint(256, shape, dtype=torch.uint8, generator=source)
        for shape in ((1, shots, 3, *size), (batch, 3, *size))
    )
    masks = torch.zeros(1, shots, *size, dtype=torch.uint8)
    masks[..., size[0] // 4 : size[0] // 2, size[1] // 4 : -size[1] // 4] = 1
    return support, masks, query


def name_of(path: tuple[Any, ...]) -> str:
    """The place of a tensor in what `see` returns, for example "seen.features.layer3.0"."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(["seen", *parts])


# Plain forms of what saves memory or time: graphs have no loop over shots, and sides may be unknown


@contextmanager
def plain() -> Iterator[None]:
    """Within it, PMNet matches all shots at once, its softmax and its decoder are as the paper says, and timm pads
    unknown sides in one step."""
    with (
        patch.object(PMNetHead, "match", match),
        patch.object(hsfm, "filtered", filtered),
        patch.object(decoder, "fused", convolved),
        patch.object(import_module("timm.layers.conv2d_same"), "pad_same", padded),
    ):
        yield


def padded(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1), value: float = 0
) -> Tensor:
    """As timm's `pad_same`; unknown sides are multiples of `MULTIPLE`, so the stride divides them."""
    if all(isinstance(side, int) for side in x.shape[-2:]):
        return pad_same(x, list(kernel), list(stride), list(dilation), value)
    rows, columns = (max(d * (k - 1) + 1 - s, 0) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=value)


def match(self: PMNetHead, layer: str, query: list[Tensor], support: list[Tensor], support_masks: Tensor) -> Tensor:
    """As `PMNetHead.match`."""
    K = support_masks.shape[1]
    query_size, support_size = size_of(query[0]), size_of(support[0])
    mask_N1hw = resize(support_masks, support_size).flatten(0, 1)[:, None]
    supports = [feature.flatten(0, 1) for feature in support]
    if not self.support_background:
        supports = [feature * mask_N1hw for feature in supports]
    affinity = cast(Affinity, self.affinity[layer])
    each_shot = [q[:, None].expand(-1, K, *q.shape[1:]).flatten(0, 1) for q in affinity.query_tokens(query)]
    S = affinity(each_shot, affinity.support_tokens(supports))
    evidence = self.hsfm[layer](S, mask_N1hw.flatten(1), query_size, support_size)
    return coarse_mask(evidence, K).unflatten(2, query_size)


def filtered(E_NQSC: Tensor, mask_NS: Tensor) -> tuple[Tensor, Tensor]:
    """As `lean.filtered`, whose pooling takes no unknown sides."""
    return (mask_NS[:, None, None] @ E_NQSC.softmax(dim=2)).squeeze(2), E_NQSC.logsumexp(dim=2)


def convolved(conv: nn.Conv2d, coarse: Tensor, fine: Tensor) -> Tensor:
    """As `decoder.fused`."""
    return conv(torch.cat([decoder.up2(coarse), fine], dim=1))


# Files


def write_torch(found: Graphs, folder: Path) -> list[Path]:
    """Writes see.pt2 and segment.pt2; torch.export.load reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "see.pt2", folder / "segment.pt2"]
    for program, path in zip((found.see, found.segment), paths, strict=True):
        with quiet():
            torch.export.save(program, path)
    return paths


def write_onnx(found: Graphs, folder: Path) -> list[Path]:
    """Writes see.onnx and segment.onnx.

    Raises:
        SettingError: the packages for ONNX are not installed, or an operation has no form in ONNX.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "see": (found.see, ["support", "masks"], found.names),
        "segment": (found.segment, ["query", *found.names], ["logits"]),
    }
    paths = []
    for name, (program, inputs, outputs) in named.items():
        try:
            with quiet():
                written = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
        except ImportError as error:
            raise SettingError("ONNX needs more packages: pip install 'pmnet[export]'.") from error
        except Exception as error:  # of many kinds
            raise SettingError(
                f"ONNX lacks an operation of this method ({str(error).splitlines()[0]}). Use --format torch."
            ) from error
        assert written is not None
        rename(written.model.graph, inputs, outputs)
        paths.append(folder / f"{name}.onnx")
        written.save(paths[-1])
    return paths


def rename(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Gives the inputs and outputs of an ONNX graph their names."""
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name


def compare(built: Built, found: Graphs, folder: Path) -> float:
    """Runs ONNX files with onnxruntime on images of other sides and more shots than those of the trace.

    Returns:
        The largest difference of the logits from the method's own, as a share of the largest logit.

    Raises:
        CheckpointError: it exceeds `TOLERANCE`.
        SettingError: onnxruntime cannot run the files.
    """
    import onnxruntime

    size = found.size or (2 * MULTIPLE, 3 * MULTIPLE)
    support, masks, query = example(size, shots=3, batch=1)
    try:
        see, segment = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("see", "segment"))
        kept = see.run(None, {"support": support.numpy(), "masks": masks.numpy()})
        names = [value.name for value in segment.get_inputs()]
        got = segment.run(None, dict(zip(names, [query.numpy(), *kept], strict=True)))[0]
    except Exception as error:  # onnxruntime has one kind for each code
        raise SettingError(
            f"onnxruntime cannot run {folder}/*.onnx ({str(error).splitlines()[0]}). Use --format torch, or a method "
            f"that can be exported: {', '.join(EXPORTED)}."
        ) from error
    with torch.no_grad():
        want = built.method.segment(query, built.method.see(support, masks)).numpy()
    difference = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"The logits of {folder}/*.onnx differ from the method's by {difference:.1e} of the largest: do not use "
            "them, and report it."
        )
    return difference
