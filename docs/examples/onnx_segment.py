"""Segments an image by an example with onnxruntime alone: python onnx_segment.py FOLDER EXAMPLE MASK IMAGE OUT"""

import sys

import numpy as np
import onnxruntime
from PIL import Image

folder, example, mask, image, out = sys.argv[1:]
SIDES = (384, 384)  # width, height
see, segment = (onnxruntime.InferenceSession(f"{folder}/{name}.onnx") for name in ("see", "segment"))


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB").resize(SIDES)).transpose(2, 0, 1)


shown = np.asarray(Image.open(mask).convert("L").resize(SIDES, Image.Resampling.NEAREST)) > 0
seen = see.run(None, {"support": pixels(example)[None, None], "masks": shown[None, None].astype(np.uint8)})
names = [value.name for value in see.get_outputs()]
logits = segment.run(None, {"query": pixels(image)[None], **dict(zip(names, seen, strict=True))})[0][0]
found = Image.fromarray((logits[1] > logits[0]).astype(np.uint8) * 255)
found.resize(Image.open(image).size, Image.Resampling.NEAREST).save(out)
