"""Makes a head to ship of a run: `python -m experiments.ship RUN pmnet/weights/pmnet_lite.safetensors`.

The tensors are float16. The file's metadata says how the method is built, on which backbone, and how it was trained.
"""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch

from experiments.files import read_json
from experiments.run.checkpoints import Checkpoint, read
from pmnet.segment.recipe import PREFIX

TRAINING = ("dataset", "base_classes", "image_size", "batch_size", "novel_pixels", "train_shot", "seed", "started_from")


def metadata(checkpoint: Checkpoint, side: int, licence: str) -> dict[str, object]:
    """What `pmnet/segment/recipe.py` reads, and the facts of the training.

    Args:
        checkpoint: of a training that has ended.
        side: of the images to segment, in pixels.
        licence: of the head.
    """
    content, config = checkpoint.content, read_json(checkpoint.run / "results.json").get("config", {})
    facts = {name: checkpoint.record[name] for name in TRAINING if name in checkpoint.record}
    facts |= {"steps": content["global_step"], "epochs": content["epoch"] + 1}
    facts |= {name: config.get(name) for name in ("loss", "optimizer", "scheduler", "augment")}
    facts |= {"commit": read_json(checkpoint.run / "training.json").get("commit")}
    recipe = content["recipe"] | {"image_size": [side, side], "needs": content["backbone"]}
    return recipe | {"training": facts, "licence": licence}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("file", type=Path, help="the .safetensors file to write")
    parser.add_argument("--side", type=int, default=384, help="side of the images to segment")
    parser.add_argument("--licence", default="MIT", help="of the head")
    options = parser.parse_args()
    checkpoint = read(options.run / "checkpoints" / "last.ckpt")
    state = {
        name.removeprefix(PREFIX): value.to(torch.float16).contiguous()
        for name, value in checkpoint.content["state_dict"].items()
        if name.startswith(PREFIX)
    }
    about = json.dumps(metadata(checkpoint, options.side, options.licence))
    safetensors.torch.save_file(state, options.file, {"format": "pt", "pmnet": about})
    print(f"{options.file}: {len(state)} tensors, {options.file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
