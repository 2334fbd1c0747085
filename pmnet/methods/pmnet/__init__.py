"""The paper's own method, in its sections: affinity (3.2), HSFM (3.3), decoder (3.4), network."""

from pmnet.methods.pmnet.network import PMNet, PMNetHead
from pmnet.methods.pmnet.release import from_release

__all__ = ["PMNet", "PMNetHead", "from_release"]
