"""Errors the user can fix. Each message says what is wrong, where, and what to do.

Example:
    >>> from pmnet import SmallBackbone
    >>> try:
    ...     SmallBackbone("imagenet")
    ... except PMNetError as error:
    ...     print(error)
    Backbone small has no weights named 'imagenet'. Choose backbone.weights=quickstart|none or the path of a file.
"""


class PMNetError(Exception):
    """Base class of the errors below; the commands print the message alone, without a traceback."""


class SettingError(PMNetError, ValueError):
    """An option has an invalid value."""


class WeightsError(PMNetError):
    """Weights are missing, damaged, or belong to another network."""


class CheckpointError(PMNetError):
    """A checkpoint cannot be read or written, or does not fit the network."""


class ImageError(PMNetError):
    """An image file is missing or cannot be read."""


class NonFiniteLossError(PMNetError):
    """The loss or the weights became NaN or infinite during training."""
