"""A synthetic dataset of textured shapes: deterministic, generated on the fly, no files. For first runs and tests.

A class is a texture on a shape ("ringed gear"). Each object has a random colour, size, position and angle, so only the
texture and the outline distinguish the classes. An image shows its class once or twice among objects of other classes
of the same fold, on a coloured background, so marking everything or only the biggest object scores low. Images of one
fold never show a class of another fold, so training never shows a novel class, not even as background.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from datamodules.episodes.dataset import FewShotDataset, Split

Array = np.ndarray
TAU = 2 * np.pi


def triangle_wave(x: Array) -> Array:
    """Period 2 pi, values in [-1, 1]."""
    return np.abs((x / np.pi) % 2 - 1) * 2 - 1


def honeycomb(x: Array, y: Array) -> Array:
    return np.cos(x) + np.cos(0.5 * x + 0.866 * y) + np.cos(0.5 * x - 0.866 * y)


# (x, y) in radians of the texture's period, from the centre of the object -> brightness; above 0 is the first colour
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "striped": lambda x, y: np.sin(x),
    "dotted": lambda x, y: np.cos(x) + np.cos(y) - 0.6,
    "ringed": lambda x, y: np.sin(np.hypot(x, y)),
    "plain": lambda x, y: np.ones_like(x),
    "checked": lambda x, y: np.sin(x) * np.sin(y),
    "zigzag": lambda x, y: np.sin(x + 2 * triangle_wave(y)),
    "spoked": lambda x, y: np.sin(6 * np.arctan2(y, x)),
    "gridded": lambda x, y: 0.75 - np.maximum(np.cos(x), np.cos(y)),
    "pinstriped": lambda x, y: np.sin(2 * x) - 0.7,
    "honeycombed": lambda x, y: honeycomb(x, y) + 0.9,
    "wavy": lambda x, y: np.sin(x + 2.5 * np.sin(0.5 * y)),
    "spiral": lambda x, y: np.sin(np.hypot(x, y) + 2 * np.arctan2(y, x)),
    "bricked": lambda x, y: 0.8 - np.maximum(np.cos(y), np.cos(0.5 * x + np.pi * np.floor(y / TAU))),
    "halved": lambda x, y: x,
    "crossed": lambda x, y: np.maximum(np.cos(x) + 0.3 * np.cos(3 * y), np.cos(y) + 0.3 * np.cos(3 * x)) - 0.8,
    "scaled": lambda x, y: np.sin(np.hypot((x % TAU) - np.pi, y % TAU)),
    "diamonds": lambda x, y: triangle_wave(x) + triangle_wave(y),
    "pied": lambda x, y: np.sin(0.7 * x + 1.3 * np.sin(0.9 * y)) + np.sin(0.8 * y + 1.7 * np.sin(0.6 * x)),
    "barred": lambda x, y: np.maximum(np.sin(0.5 * x), np.sin(2 * x) - 0.2),
    "quartered": lambda x, y: x * y,
}

# angle in radians -> radius of the outline, relative to the object's radius
SHAPES: dict[str, Callable[[Array], Array]] = {
    "disc": lambda a: np.full_like(a, 0.85),
    "square": lambda a: 0.72 / np.cos((a + np.pi / 4) % (np.pi / 2) - np.pi / 4),
    "star": lambda a: 0.68 + 0.32 * triangle_wave(5 * a),
    "triangle": lambda a: 0.5 / np.cos((a + np.pi / 3) % (TAU / 3) - np.pi / 3),
    "flower": lambda a: 0.78 + 0.22 * np.cos(4 * a),
    "gear": lambda a: 0.86 + 0.12 * np.sign(np.sin(8 * a)),
    "ellipse": lambda a: 0.55 / np.sqrt(1 - 0.69 * np.cos(a) ** 2),
}

CLASSES = tuple(f"{texture} {shape}" for texture, shape in zip(TEXTURES, list(SHAPES) * 3, strict=False))
TEST_NUMBERS = 1_000_000  # training images are numbered from 0, test images from here


class SyntheticDataset(FewShotDataset):
    """Synthetic images of 20 classes in 4 folds of 5.

    Args:
        size: side of the square images in pixels, or [height, width], of which the longer side is used.
        images_per_class: number of training images per class; there are as many test images.
        seed: seed of the images.

    Example:
        >>> dataset = SyntheticDataset(size=64, images_per_class=2, seed=0)
        >>> dataset.images_of(0, "test")
        ['striped disc 1000000', 'striped disc 1000001']
        >>> image, index = dataset.read_image("striped disc 1000000"), dataset.read_index("striped disc 1000000")
        >>> image.shape, index.unique().tolist()
        (torch.Size([3, 64, 64]), [0, 1, 3, 4, 5])
    """

    name = "synthetic"
    domain = "synthetic"
    classes = CLASSES
    folds = tuple(tuple(range(5 * fold, 5 * fold + 5)) for fold in range(4))

    def __init__(self, size: int | Sequence[int], images_per_class: int, seed: int) -> None:
        self.size = size if isinstance(size, int) else max(size)
        self.images_per_class, self.seed = images_per_class, seed
        self.splits = f"synthetic, seed {seed}; training and test images are disjoint"

    def images_of(self, class_id: int, split: Split) -> Sequence[str]:
        first = TEST_NUMBERS if split == "test" else 0
        return [f"{self.classes[class_id]} {first + i:07d}" for i in range(self.images_per_class)]

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}; {self.size} pixels"

    def read_image(self, name: str) -> Tensor:
        return torch.from_numpy(self.drawn(name)[0].transpose(2, 0, 1).copy())

    def read_index(self, name: str) -> Tensor:
        return torch.from_numpy(self.drawn(name)[1].copy())

    def drawn(self, name: str) -> tuple[Array, Array]:
        """An image (size, size, 3) and its index mask (size, size), uint8, which are shared with later calls."""
        return draw(name, self.size, self.seed)


@lru_cache(maxsize=8)
def draw(name: str, size: int, seed: int) -> tuple[Array, Array]:
    """Draws an image and its index mask. The result depends only on the arguments.

    Args:
        name: class name and number, such as "striped disc 0000007".
        size: side of the image in pixels.
        seed: seed of the dataset.

    Returns:
        The (size, size, 3) uint8 image and the (size, size) uint8 index mask.
    """
    class_name, number = name.rsplit(" ", 1)
    class_id = CLASSES.index(class_name)
    random = np.random.default_rng([seed, class_id, int(number)])
    image = ground(random, size)
    index = np.zeros((size, size), np.uint8)
    fold = [5 * (class_id // 5) + i for i in range(5)]
    others = random.permutation([c for c in fold if c != class_id])[: random.integers(3, 5)]
    wanted = [c for c in [class_id, *others] for _ in range(random.integers(1, 3))]
    placed: list[tuple[float, float, float]] = []
    for which in random.permutation(wanted):
        for _ in range(50):
            radius = size * random.uniform(0.13, 0.25)
            x, y = random.uniform(0.6 * radius, size - 0.6 * radius, 2)
            if all(np.hypot(x - a, y - b) > 0.8 * (radius + r) for a, b, r in placed):
                break
        else:
            if which != class_id or (index == class_id + 1).any():
                continue
        placed.append((x, y, radius))
        draw_object(image, index, random, int(which), x, y, radius)
    noise = random.normal(0, 6, (size, size, 1)).astype(np.float32)
    return np.clip(image + noise, 0, 255).astype(np.uint8), index


def ground(random: np.random.Generator, size: int) -> Array:
    """A background that blends smoothly between two random colours, (size, size, 3) float32."""
    coarse = random.uniform(0, 1, (5, 5)).astype(np.float32)
    at = np.linspace(0, 3.999, size, dtype=np.float32)
    low, part = at.astype(int), (at % 1)
    rows = coarse[low] * (1 - part[:, None]) + coarse[low + 1] * part[:, None]
    mixture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    a, b = random.uniform(20, 235, (2, 3)).astype(np.float32)
    return mixture[..., None] * a + (1 - mixture[..., None]) * b


def draw_object(
    image: Array, index: Array, random: np.random.Generator, class_id: int, x: float, y: float, radius: float
) -> None:
    """Paints one object with random colours, angles and texture period into the image and the index mask."""
    size = len(index)
    texture, shape = CLASSES[class_id].split()
    top, left = max(int(y - radius), 0), max(int(x - radius), 0)
    box = np.s_[top : min(int(y + radius) + 2, size), left : min(int(x + radius) + 2, size)]
    rows, columns = np.ogrid[box]
    dx, dy = (columns - x).astype(np.float32), (rows - y).astype(np.float32)
    turn, slant = random.uniform(0, TAU, 2)
    inside = np.hypot(dx, dy) < radius * SHAPES[shape](np.arctan2(dy, dx) + turn)
    frequency = TAU / (size * random.uniform(0.055, 0.075))
    u = (np.cos(slant) * dx + np.sin(slant) * dy) * frequency
    v = (np.cos(slant) * dy - np.sin(slant) * dx) * frequency
    bright = TEXTURES[texture](u, v) > 0
    first = random.uniform(0, 255, 3).astype(np.float32)
    second = (first + random.uniform(80, 175, 3).astype(np.float32)) % 255  # clearly different from the first
    image[box] = np.where(inside[..., None], np.where(bright[..., None], first, second), image[box])
    index[box] = np.where(inside, class_id + 1, index[box])
