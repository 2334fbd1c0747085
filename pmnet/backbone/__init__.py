"""Frozen feature extractors. A new family is one file here and one yaml in `conf/backbone/`."""

from pmnet.backbone.base import Backbone, Features
from pmnet.backbone.resnet import ResNetBackbone
from pmnet.backbone.small import SmallBackbone
from pmnet.backbone.swin import SwinBackbone

__all__ = ["Backbone", "Features", "ResNetBackbone", "SmallBackbone", "SwinBackbone"]
