"""Writes a method as ONNX or torch.export graphs, or its head as safetensors."""

import argparse
import sys
from pathlib import Path

HELP = "write a method as ONNX, torch.export or safetensors"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run's folder, a checkpoint, a .safetensors file or a name")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--format", choices=("onnx", "torch", "safetensors"), default="onnx", help="default: onnx")
    parser.add_argument("--fixed-sides", action="store_true", help="fix the image sides to those of the training")
    parser.add_argument("--license", help="licence to name in a safetensors file, such as mit")


def run(arguments: argparse.Namespace) -> int:
    from pmnet.segment import export, hub

    built = hub.built_with_facts(arguments.source, arguments.license)
    if arguments.format == "safetensors":
        hub.write(built, arguments.out)
        print(f"Wrote {arguments.out / hub.WEIGHTS} and {arguments.out / hub.CARD}.")
        return 0
    print("Tracing the graphs takes a minute or two.", file=sys.stderr, flush=True)
    graphs = export.graphs(built, dynamic=not arguments.fixed_sides)
    write = export.write_onnx if arguments.format == "onnx" else export.write_torch
    paths = write(graphs, arguments.out)
    if arguments.format == "onnx":
        difference = export.compare(built, graphs, arguments.out)
        print(f"Opset {export.OPSET}. onnxruntime differs from PyTorch by {difference:.1e} of the largest logit.")
    print(f"{graphs.takes} Wrote {' and '.join(map(str, paths))}.")
    return 0
