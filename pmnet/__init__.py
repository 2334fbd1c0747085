"""PMNet, the method: a network that segments from a few examples by matching pixels.

Importable and usable without Hydra, W&B or a dataset; see `PMNet` for a six-line example.
"""

from pmnet.backbones import Backbone, ResNetBackbone
from pmnet.backbones.cache import FeatureCache
from pmnet.methods.pmnet.network import PMNet, PMNetHead, Support
from pmnet.version import VERSION

__all__ = ["Backbone", "FeatureCache", "PMNet", "PMNetHead", "ResNetBackbone", "Support"]
__version__ = VERSION
