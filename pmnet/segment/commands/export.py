"""Writes a method as ONNX or torch.export graphs, or as safetensors."""

import argparse

HELP = "write a method as ONNX, torch.export or safetensors"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run's folder, a checkpoint, a class file or a name")


def run(arguments: argparse.Namespace) -> int:
    raise NotImplementedError
