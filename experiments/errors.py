"""Errors that the user can fix, and their messages."""


class UserError(Exception):
    """A setting that cannot be run. The message says what is wrong and what to do; it is shown without a traceback."""


def explain(error: BaseException) -> str:
    """The error's message, without the traceback that PyTorch adds to errors from DataLoader workers."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return message.strip()
