class DatasetError(Exception):
    """A dataset is missing or damaged: what is wrong, where, and what to do. Shown without a traceback."""
