"""Published files -> a ready folder. `python -m datamodules.prepare --help`."""
