"""Feature extractors. A new family is one file here and one yaml in `conf/backbone/`.

What is exported here is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmnet.backbones.base import Backbone, Reads
    from pmnet.backbones.cache import FeatureCache, Features
    from pmnet.backbones.efficientnet_lite import EfficientNetLiteBackbone
    from pmnet.backbones.resnet import ResNetBackbone
    from pmnet.backbones.small import SmallBackbone
    from pmnet.backbones.swin import SwinBackbone
    from pmnet.backbones.vit import ViTBackbone

HOMES = {
    "Backbone": "pmnet.backbones.base",
    "EfficientNetLiteBackbone": "pmnet.backbones.efficientnet_lite",
    "FeatureCache": "pmnet.backbones.cache",
    "Features": "pmnet.backbones.cache",
    "Reads": "pmnet.backbones.base",
    "ResNetBackbone": "pmnet.backbones.resnet",
    "SmallBackbone": "pmnet.backbones.small",
    "SwinBackbone": "pmnet.backbones.swin",
    "ViTBackbone": "pmnet.backbones.vit",
}

__all__ = [
    "Backbone", "EfficientNetLiteBackbone", "FeatureCache", "Features", "Reads", "ResNetBackbone", "SmallBackbone",
    "SwinBackbone", "ViTBackbone",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'pmnet.backbones' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
