"""Errors that the user can mend, and how they are told."""


class UserError(Exception):
    """A setting that cannot be run: what is wrong and what to do. Shown without a traceback."""


def explain(error: Exception) -> str:
    """The message of an error; of one from a DataLoader worker, without the traceback that torch adds."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return message.strip()
