"""PMNet, the method: a network that segments from a few examples by matching pixels.

Importable and usable without Hydra, W&B or a dataset; see `PMNet` for a six-line example.
"""

from pmnet.backbone import Backbone, ResNetBackbone
from pmnet.cache import FeatureCache
from pmnet.network import PMNet, PMNetHead, Support
from pmnet.version import VERSION

__all__ = ["Backbone", "FeatureCache", "PMNet", "PMNetHead", "ResNetBackbone", "Support"]
__version__ = VERSION
