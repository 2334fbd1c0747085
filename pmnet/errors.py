"""The errors that a user can mend. Each message says what is wrong, where, and what to do."""


class PMNetError(Exception):
    """Base of the errors below: shown as one message, without a traceback."""


class SettingError(PMNetError, ValueError):
    """An option has a value that it cannot have."""


class WeightsError(PMNetError):
    """Backbone weights are missing, damaged, or belong to another backbone."""


class CheckpointError(PMNetError):
    """A checkpoint cannot be read, written, or does not fit the network."""


class ImageError(PMNetError):
    """An image file is missing or cannot be read."""


class NonFiniteLossError(PMNetError):
    """The loss became NaN or infinite; names the episodes that did it."""
