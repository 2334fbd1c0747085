"""Which process of a job this one is, before the Trainer has made them a group."""

from lightning.pytorch.utilities import rank_zero_only


def is_first() -> bool:
    """Whether this is the process that writes files; the rank that the launcher gave it says so."""
    return getattr(rank_zero_only, "rank", 0) == 0
