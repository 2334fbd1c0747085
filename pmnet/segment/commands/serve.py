"""Opens a page to segment photos in the browser."""

import argparse

HELP = "open a page to segment photos in the browser"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run's folder, a checkpoint, a class file or a name")


def run(arguments: argparse.Namespace) -> int:
    raise NotImplementedError
