"""Prepares a benchmark from its published files. See `python -m datamodules.prepare --help`."""
