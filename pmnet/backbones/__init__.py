"""Feature extractors. A new family is one file here and one yaml in `conf/backbone/`."""

from pmnet.backbones.base import Backbone, Features, Reads
from pmnet.backbones.cache import FeatureCache
from pmnet.backbones.resnet import ResNetBackbone
from pmnet.backbones.small import SmallBackbone
from pmnet.backbones.swin import SwinBackbone

__all__ = ["Backbone", "FeatureCache", "Features", "Reads", "ResNetBackbone", "SmallBackbone", "SwinBackbone"]
