"""Segments a person's own images: show a few examples with masks, then predict.

    seg = Segmenter.load()
    seg.fit([("cow1.jpg", "cow1_mask.png"), ("cow2.jpg", "cow2_mask.png")])
    result = seg.predict("field.jpg")

Suffixes of tensor names as in `pmnet/methods/base.py`; C counts classes here.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate

from pmnet.backbones.base import Features, union
from pmnet.errors import SettingError
from pmnet.methods.base import Head, pick, repeated
from pmnet.segment import classfile, marks, tiles
from pmnet.segment.hub import Hub
from pmnet.segment.images import AnyImage, Frame, as_image, as_mask, image_files
from pmnet.segment.presence import PRESENT, Presence, calibrated, evidence, prototype
from pmnet.segment.recipe import DEFAULT, Built, build
from pmnet.version import VERSION

Example = tuple[AnyImage, AnyImage | marks.Mark]

JUST = 0.5005  # the smallest float16 above 0.5, about


@dataclass(frozen=True)
class Result:
    """What was found in an image of H x W pixels.

    Attributes:
        mask: (H, W) uint8; 0 = none, k = the k-th class.
        score: (H, W) float16 in 0..1; the probability of the most probable class.
        presences: class -> score in 0..1 of whether the image shows it; from 0.5 on it counts as present.
        classes: the classes' names.
        seconds: that this image took, without reading the file.
    """

    mask: np.ndarray
    score: np.ndarray
    presences: dict[str, float]
    classes: tuple[str, ...]
    seconds: float

    @property
    def presence(self) -> float:
        """The largest of `presences`."""
        return max(self.presences.values())

    def area(self, name: str) -> float:
        """The share of the image that a class covers, 0..1."""
        return float((self.mask == 1 + self.classes.index(name)).mean())


@dataclass
class Shown:
    """What was shown of one class.

    Attributes:
        images: (K, 3, H, W) uint8 at the network's size.
        masks: (K, H, W) uint8, 0 or 1; all 0 in a negative, and in a part of a support that shows none of it.
        negatives: how many of the images, the last ones, are negatives.
        side: of the longest support, in pixels, before resizing.
        seen: the method's output of `see`, for one episode.
        prototype: (C,), see `presence.py`.
        presence: the score of whether an image shows the class.
        close: the same at the scale of the objects, if these are small in large supports; for tiles.
    """

    images: Tensor
    masks: Tensor
    side: int
    negatives: int = 0
    seen: Any = None
    prototype: Tensor = field(default_factory=lambda: torch.zeros(0))
    presence: Presence | None = None
    close: "Shown | None" = None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]], side: int, negatives: int) -> "Shown":
        """Of pairs of an image and its mask at the network's size."""
        images, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return cls(images, masks, side, negatives)

    def at(self, side: int | None) -> "Shown":
        """This or `close`, whose scale is nearer to that of tiles of a side; None stands for whole images."""
        nearer = side is not None and self.close is not None and side**2 < self.side * self.close.side
        return self.close if nearer and self.close else self


def shown_of(parts: Mapping[str, Any]) -> Shown:
    """What a class file says was shown, before it is seen."""
    close = {"close": Shown(**parts["close"])} if "close" in parts else {}
    return Shown(**{**parts, **close})


class Segmenter(Hub):
    """A method with its weights, and the classes it was shown.

    Args:
        built: the method and its recipe, see `build`.
        device: "auto" takes a GPU if there is one; otherwise the name of a torch device.
        keep_aspect: fit images into the network's sides and fill up with grey, instead of squeezing them.

    Example:
        >>> import torch
        >>> segmenter = Segmenter.load("nearest")
        >>> image = torch.randint(256, (3, 120, 160), dtype=torch.uint8)
        >>> mask = torch.zeros(120, 160)
        >>> mask[20:80, 40:90] = 1
        >>> result = segmenter.fit([(image, mask)]).predict(image)
        >>> result.mask.shape, result.score.dtype, list(result.presences)
        ((120, 160), dtype('float16'), ['object'])
    """

    def __init__(self, built: Built, device: str = "auto", keep_aspect: bool = False) -> None:
        self.recipe = built.recipe
        self.device = chosen_device() if device == "auto" else checked_device(device)
        self.method = built.method.to(self.device).eval()
        self.layer = list(self.method.backbone.blocks)[-1]
        self.frame = Frame(tuple(self.recipe["image_size"]), keep_aspect)
        self.shown: dict[str, Shown] = {}

    @classmethod
    def load(cls, source: str | Path = DEFAULT, device: str = "auto", keep_aspect: bool | None = None) -> Self:
        """Loads a method, or a class file that `save` wrote.

        Args:
            source: a class file; or the folder of a run, a checkpoint, a .safetensors file, "prototype", "nearest" or
                the name of a shipped head.
            device: "auto", or the name of a torch device.
            keep_aspect: see the class; None takes what the class file says, else False.

        Raises:
            SettingError: there is no such file or name.
            WeightsError: a file is damaged, or the weights of the backbone are not here.
            CheckpointError: the file does not say how its method is built, or does not fit.
        """
        if classfile.is_one(source):
            built, kept, shown = classfile.read(Path(source))
            segmenter = cls(built, device, kept if keep_aspect is None else keep_aspect)
            segmenter.shown = {name: shown_of(parts) for name, parts in shown.items()}
            for each in segmenter.shown.values():
                segmenter.see(each)
            return segmenter
        return cls(build(source), device, bool(keep_aspect))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their values in masks."""
        return tuple(self.shown)

    # Supports

    def fit(
        self,
        supports: Sequence[Example] | Mapping[str, Sequence[Example]],
        negatives: Sequence[AnyImage] | Mapping[str, Sequence[AnyImage]] = (),
    ) -> Self:
        """Shows the classes; what was shown before is forgotten.

        Args:
            supports: pairs of an image and its mask; or class -> pairs. An image is a path, a PIL image, an array
                (H, W, 3) or a tensor (3, H, W) of uint8. A mask is one of these with (H, W), where 0 is background
                and 255 is ignored if other values are there; or a `Box`, `Points` or `Scribble`.
            negatives: images that show none of the class; or class -> images. They set the threshold of its presence.

        Raises:
            SettingError: no support, more than 254 classes, or a mask that is empty or of another size.
            ImageError: a file cannot be read.
        """
        by_class = dict(supports) if isinstance(supports, Mapping) else {"object": supports}
        without = dict(negatives) if isinstance(negatives, Mapping) else dict.fromkeys(by_class, negatives)
        if unknown := without.keys() - by_class.keys():
            raise SettingError(f"There are negatives of {sorted(unknown)[0]!r}, of which there is no support.")
        if not by_class or not all(by_class.values()):
            raise SettingError("Give at least one pair (image, mask) of each class.")
        if len(by_class) > 254:
            raise SettingError(f"At most 254 classes fit into a mask, not {len(by_class)}.")
        shown = {name: self.read(name, pairs, without.get(name, ())) for name, pairs in by_class.items()}
        for each in shown.values():
            self.see(each)
        self.shown = shown
        self.calibrate()
        return self

    def read(self, name: str, pairs: Sequence[Example], negatives: Sequence[AnyImage]) -> Shown:
        """Reads and resizes the images and masks of one class."""
        whole: list[tuple[Tensor, Tensor]] = []
        close: list[tuple[Tensor, Tensor]] = []
        none, longest, closest = torch.zeros(self.frame.size, dtype=torch.uint8), 0, 0
        for number, (image_of, mask_of) in enumerate(pairs, start=1):
            image, parts = as_image(image_of), []
            size = (image.shape[-2], image.shape[-1])
            squeezed = self.frame.image(image)
            if isinstance(mask_of, marks.Mark):
                mask = self.grown(squeezed, mask_of, size)
            else:
                drawn = as_mask(mask_of, size) == 1
                mask, parts = self.fitted(drawn), tiles.close_ups(drawn, max(self.frame.size))
            if not mask.any():
                where = image_of if isinstance(image_of, (str, Path)) else f"number {number}"
                raise SettingError(f"The mask of support {where} of {name!r} marks nothing.")
            whole.append((squeezed, mask))
            close += [(self.frame.image(image[:, *at]), self.fitted(drawn[at])) for at in parts] or whole[-1:]
            longest, closest = max(longest, *size), max([closest, *(at[1].stop - at[1].start for at in parts)])
        for image_of in negatives:
            image = as_image(image_of)
            whole.append((self.frame.image(image), none))
            if closest:
                close.append((self.frame.image(image[:, *tiles.middle(image, closest)]), none))
        shown = Shown.of(whole, longest, len(negatives))
        shown.close = Shown.of(close, closest, len(negatives)) if closest else None
        return shown

    def fitted(self, mask_HW: Tensor) -> Tensor:
        """A mask (h, w) bool at the network's size, (H, W) uint8; what is too small for it becomes one pixel."""
        fitted = self.frame.mask(mask_HW.to(torch.uint8))
        if mask_HW.any() and not fitted.any():
            height, width = self.frame.inside((mask_HW.shape[0], mask_HW.shape[1]))
            fitted[:height, :width] = adaptive_max_pool2d(mask_HW[None].float(), (height, width))[0]
        return fitted

    @torch.no_grad()
    def grown(self, image: Tensor, mark: marks.Mark, size: tuple[int, int]) -> Tensor:
        """The mask (H, W) at the network's size that a box, points or a scribble mean."""
        layer = list(self.method.backbone.blocks)[-2]
        features = self.method.backbone_pass(image[None].to(self.device), {layer: "last"})
        return marks.grow(features[layer][-1][0], self.frame.mask(mark.seeds(size)))

    @torch.no_grad()
    def see(self, shown: Shown) -> None:
        """Processes the supports of one class once, for all queries.

        Negatives are left to `calibrate`: as supports with an empty mask they draw the query's positions to themselves,
        also those of the object.
        """
        supports = slice(len(shown.images) - shown.negatives)
        images, masks = shown.images[supports].to(self.device), shown.masks[supports].to(self.device)
        shown.seen = self.method.see(images[None], masks[None])
        shown.prototype = prototype(self.deepest(self.method.backbone_pass(images, {self.layer: "last"})), masks)
        if shown.close:
            self.see(shown.close)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Finds from supports and negatives from which score on a class counts as present."""
        for name, shown in self.shown.items():
            others = [other for another, other in self.shown.items() if another != name]
            shown.presence = calibrated(self, shown, others)
            if shown.close:
                shown.close.presence = calibrated(self, shown.close, [other.at(shown.close.side) for other in others])

    # Queries

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: AnyImage, tile: int | str | None = "auto", gate: bool = True
    ) -> Result: ...
    @overload
    def predict(
        self, images: Iterable[AnyImage], tile: int | str | None = "auto", gate: bool = True
    ) -> Iterator[Result]: ...
    def predict(
        self, images: AnyImage | Iterable[AnyImage], tile: int | str | None = "auto", gate: bool = True
    ) -> Result | Iterator[Result]:
        """Segments images.

        Args:
            images: one image as in `fit`; or a folder, or several images, of which the results come one by one.
            tile: side in pixels of the tiles into which a large image is cut, so that small objects are found; "auto"
                takes the side of the supports, or of the parts around their objects if these are small in large
                supports, if the image is more than twice as large; None never cuts.
            gate: leave out classes that are not present, see `Result.presences`.

        Raises:
            SettingError: no class was shown, or `tile` is none of these.
            ImageError: a file cannot be read.
        """
        if not self.shown:
            raise SettingError("No class was shown: call fit, or load a class file.")
        tiles.check(tile)
        if isinstance(images, (str, Path)) and Path(images).is_dir():
            return (self.result(as_image(path), tile, gate) for path in image_files(Path(images)))
        if isinstance(images, Iterable) and not isinstance(images, (str, np.ndarray, Tensor)):
            return (self.result(as_image(image), tile, gate) for image in images)
        return self.result(as_image(images), tile, gate)

    @torch.no_grad()
    def result(self, image: Tensor, tile: int | str | None, gate: bool) -> Result:
        """The result of one image (3, H, W) uint8."""
        begun = time.perf_counter()
        side = self.tile_side(image, tile)
        shown = [each.at(side) for each in self.shown.values()]
        found = self.piece(shown, image, gate) if side is None else tiles.joined(self, shown, image, side, gate)
        presences = dict(zip(self.classes, found.presences, strict=True))
        return Result(found.mask, found.score, presences, self.classes, time.perf_counter() - begun)

    def piece(self, shown: Sequence[Shown], image: Tensor, gate: bool) -> tiles.Piece:
        """What is found of the classes in an image, or in a tile of one, that is seen at once."""
        feats = self.features(self.frame.image(image))
        score_CHW = torch.stack([self.score(feats, each.seen) for each in shown])
        presences = [
            each.presence(evidence(score, self.deepest(feats)[0], each.prototype)) if each.presence else 1.0
            for each, score in zip(shown, score_CHW, strict=True)
        ]
        score_CHW = self.at(score_CHW, (image.shape[-2], image.shape[-1]))
        if gate:
            absent = [k for k, value in enumerate(presences) if value < PRESENT]
            score_CHW[absent] = score_CHW[absent].clamp(max=0.5)
        best, label = score_CHW.max(0)
        marked = best > 0.5
        score = torch.where(marked, best.half().clamp(min=JUST), best.half().clamp(max=0.5))  # whatever is rounded
        mask = torch.where(marked, label + 1, 0).to(torch.uint8)
        return tiles.Piece(mask.cpu().numpy(), score.cpu().numpy(), presences)

    def tile_side(self, image: Tensor, tile: int | str | None) -> int | None:
        """The side of the tiles in pixels; None if the image is not cut."""
        longest = max(image.shape[-2:])
        if tile == "auto":
            side = max((each.close or each).side for each in self.shown.values())
            tile = side if longest > 2 * side else None
        return tile if isinstance(tile, int) and tile < longest else None

    def features(self, image: Tensor) -> Features:
        """What the head and the presence score read of one query (3, H, W) uint8 at the network's size."""
        query = image[None].to(self.device)
        self.method.check_sides((query.shape[-2], query.shape[-1]))
        return self.method.backbone_pass(query, union(self.method.query_reads, {self.layer: "last"}))

    def deepest(self, feats: Features) -> Tensor:
        """The last feature of the deepest stage (B, C, h, w)."""
        return feats[self.layer][-1]

    def score(self, feats: Features, seen: Any) -> Tensor:
        """The probability (H, W) of one class, from features of one query."""
        size, head, feats = self.frame.size, self.method.head, pick(feats, self.method.query_reads)
        score = head.segment(feats, repeated(seen, 1), size).float().softmax(1)[0, 1]
        if type(head).mask is not Head.mask:  # for example, the shots vote: their mask is not that of the logits
            mask = head.mask(feats, repeated(seen, 1), size)[0]
            score = torch.where(mask, score.clamp(min=0.5001), score.clamp(max=0.5))
        return score

    def at(self, score_CHW: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores at the network's size -> (C, h, w) of an image of `size` h, w."""
        height, width = self.frame.inside(size)
        return interpolate(score_CHW[None, :, :height, :width], size, mode="bilinear")[0]

    def described(self) -> dict[str, Any]:
        """What the masks depend on, in plain values."""
        head, shown = hashlib.sha256(), hashlib.sha256()
        state = self.method.state_dict()
        for name in sorted(self.method.saved()):
            head.update(state[name].cpu().contiguous().numpy().tobytes())
        for each in self.shown.values():
            for part in filter(None, (each, each.close)):
                shown.update(part.images.numpy().tobytes() + part.masks.numpy().tobytes())
        facts = {
            "head": self.recipe["name"],
            "head_sha256": head.hexdigest(),
            "model": self.recipe["model"],
            "backbone": self.recipe["needs"]["backbone"],
        }
        sides = {"image_size": list(self.frame.size), "keep_aspect": self.frame.keep_aspect}
        return facts | sides | {"classes": list(self.classes), "supports_sha256": shown.hexdigest(), "pmnet": VERSION}

    def save(self, path: str | Path) -> None:
        """Writes a class file: the method and the supports at the network's size, without any pickle.

        It holds the reduced photos of the supports. `Segmenter.load` reads it back.

        Raises:
            SettingError: no class was shown, or the name does not end in .safetensors.
        """
        if not self.shown:
            raise SettingError("No class was shown, so there is nothing to save.")
        classfile.check_name(Path(path))
        classfile.write(Path(path), Built(self.method, self.recipe), self.frame.keep_aspect, self.shown)


def chosen_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def checked_device(name: str) -> torch.device:
    """The device of a name. Raises SettingError if this machine has none of it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError(
            f"There is no device {name!r} here: {str(error).splitlines()[0]} Use auto or cpu."
        ) from error
    return device
