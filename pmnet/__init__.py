"""Few-shot segmentation: networks that segment an image by one or a few others with masks.

Needs no Hydra, Lightning or W&B; see `PMNet` for a short example. What is exported here is imported on first use, so
that `import pmnet` takes no longer than `import torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pmnet.version import VERSION

if TYPE_CHECKING:
    from pmnet.backbones import (
        Backbone,
        EfficientNetLiteBackbone,
        FeatureCache,
        ResNetBackbone,
        SmallBackbone,
        SwinBackbone,
        ViTBackbone,
    )
    from pmnet.methods import Head, Method
    from pmnet.methods.base import Support
    from pmnet.methods.nearest import Nearest
    from pmnet.methods.pmnet import PMNet, PMNetHead
    from pmnet.methods.prototype import Prototype
    from pmnet.segment import Box, Points, Result, Scribble, Segmenter

HOMES = {
    "Backbone": "pmnet.backbones",
    "Box": "pmnet.segment",
    "EfficientNetLiteBackbone": "pmnet.backbones",
    "FeatureCache": "pmnet.backbones",
    "Head": "pmnet.methods.base",
    "Method": "pmnet.methods.base",
    "Nearest": "pmnet.methods.nearest",
    "PMNet": "pmnet.methods.pmnet",
    "PMNetHead": "pmnet.methods.pmnet",
    "Points": "pmnet.segment",
    "Prototype": "pmnet.methods.prototype",
    "ResNetBackbone": "pmnet.backbones",
    "Result": "pmnet.segment",
    "Scribble": "pmnet.segment",
    "Segmenter": "pmnet.segment",
    "SmallBackbone": "pmnet.backbones",
    "Support": "pmnet.methods.base",
    "SwinBackbone": "pmnet.backbones",
    "ViTBackbone": "pmnet.backbones",
}

__all__ = [
    "Backbone", "Box", "EfficientNetLiteBackbone", "FeatureCache", "Head", "Method", "Nearest", "PMNet", "PMNetHead",
    "Points", "Prototype", "ResNetBackbone", "Result", "Scribble", "Segmenter", "SmallBackbone", "Support",
    "SwinBackbone", "ViTBackbone",
]  # fmt: skip
__version__ = VERSION


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'pmnet' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
