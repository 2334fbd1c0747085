"""The error that every dataset raises."""


class DatasetError(Exception):
    """A dataset is missing, damaged or misconfigured.

    The message says what is wrong, where, and what to do. Commands print it without a traceback.
    """
