"""What the server of `conftest.run` imports, with logging set up first, as it is when `run.py` imports it."""

import logging

logging.getLogger().addHandler(logging.NullHandler())  # without a handler, Lightning adds one of its own

import experiments.run.job  # noqa: E402, F401
