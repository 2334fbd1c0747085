"""A synthetic dataset of materials: what counts is a texture or a colour, not an object. Deterministic, no files.

Photos of things teach a network to look for things. Microscopy, surfaces, skin or the ground show materials instead: in
grains, blots, layers or veins, with soft edges, often grey, on a ground that is a material itself. A class is such a
material together with the form of its regions. Each image varies its scale, angle, light, sharpness and noise, and may
show a region of something else. About half of the classes always lie on the same ground, as images of one domain do.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from datamodules.own.synthetic import Array, SyntheticDataset

FORMS = ("grains", "blots", "layers", "veins")  # of a class's regions: many small ones, some, halves, thin lines
CLASSES = tuple(f"{form} {number}" for number in range(12) for form in FORMS)


class MaterialsDataset(SyntheticDataset):
    """Synthetic images of 48 classes in 4 folds of 12; each shows one class.

    Args:
        size: side of the square images in pixels, or [height, width], of which the longer side is used.
        images_per_class: number of training images per class; there are as many test images.
        seed: seed of the classes and of the images.

    Example:
        >>> dataset = MaterialsDataset(size=64, images_per_class=2, seed=0)
        >>> dataset.images_of(0, "test")
        ['grains 0 1000000', 'grains 0 1000001']
        >>> image, index = dataset.read_image("veins 0 1000000"), dataset.read_index("veins 0 1000000")
        >>> image.shape, index.unique().tolist()
        (torch.Size([3, 64, 64]), [0, 4])
    """

    name = "materials"
    classes = CLASSES
    folds = tuple(tuple(range(12 * fold, 12 * fold + 12)) for fold in range(4))

    def drawn(self, name: str) -> tuple[Array, Array]:
        return draw(name, self.size, self.seed)


class Material(NamedTuple):
    """A pattern of two colours that blend into one another.

    Attributes:
        colours: (2, 3), around 0..255; what lies outside is clipped in the image.
        period: of the pattern, as a share of the image's side.
        spread: of the frequencies; a small one makes a regular pattern.
        angle: in radians, across the parts of a pattern that has a direction.
        stretch: the length of a pattern's parts over their width; 1 = no direction.
        hardness: of the edges between the colours.
    """

    colours: Array
    period: float
    spread: float
    angle: float
    stretch: float
    hardness: float


def material(random: np.random.Generator, near: Array | None = None) -> Material:
    """A random material; its colours may be near another one's, so that only the texture tells them apart."""
    first = random.uniform(15, 240, 3) if near is None else near + random.normal(0, 25, 3)
    second = first + random.normal(0, 1, 3) * random.choice([6, 25, 70])
    colours = np.stack([first, second])
    if random.random() < 0.4:
        colours = colours.mean(1, keepdims=True).repeat(3, 1)
    stretch = 1.0 if random.random() < 0.6 else random.uniform(2, 6)
    period = np.exp(random.uniform(np.log(0.015), np.log(0.2)))
    return Material(
        colours, period, random.uniform(0.1, 0.8), random.uniform(0, np.pi), stretch, random.uniform(0.5, 4)
    )


@lru_cache(maxsize=8)
def draw(name: str, size: int, seed: int) -> tuple[Array, Array]:
    """Draws an image and its index mask. The result depends only on the arguments.

    Args:
        name: class name and number, such as "grains 0 0000007".
        size: side of the image in pixels.
        seed: seed of the dataset.

    Returns:
        The (size, size, 3) uint8 image and the (size, size) uint8 index mask.
    """
    class_name, number = name.rsplit(" ", 1)
    class_id, form = CLASSES.index(class_name), class_name.split()[0]
    of_class = np.random.default_rng([seed, class_id])
    shown = material(of_class)
    ground = material(of_class, shown.colours[0] if of_class.random() < 0.3 else None)
    always, grain = of_class.random() < 0.5, of_class.uniform(0.05, 0.12)

    random = np.random.default_rng([seed, class_id, int(number)])
    scale, turn = np.exp(random.uniform(-0.4, 0.4)), random.normal(0, 0.3)
    image = painted(ground if always else material(random), random, size, scale, turn)
    other = region(str(random.choice(FORMS)), random, size, 0.1 * scale)  # drawn in any case, as for the shipped head
    if random.random() < 0.5:
        image = blended(image, painted(material(random), random, size, scale, turn), other, random)
    inside = region(form, random, size, grain * scale)
    image = blended(image, painted(shown, random, size, scale, turn), inside, random)
    light = 1 + 0.25 * noise(random, size, 1.0, 0.5) * random.random()
    image = (image - 128) * random.uniform(0.7, 1.15) + 128 + random.normal(0, 12) + random.normal(0, 5, 3)
    image = blurred(image * light[..., None], random.uniform(0, 1.2) * size / 256)
    image = image + random.normal(0, random.uniform(1, 10), (size, size, 1))
    return np.clip(image, 0, 255).astype(np.uint8), np.where(inside, class_id + 1, 0).astype(np.uint8)


def noise(
    random: np.random.Generator, size: int, period: float, spread: float, angle: float = 0, stretch: float = 1
) -> Array:
    """Band-limited noise, (size, size), with a mean of 0 and a standard deviation of 1. Arguments as of `Material`."""
    y, x = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    u, v = np.cos(angle) * x + np.sin(angle) * y, (np.cos(angle) * y - np.sin(angle) * x) * stretch
    octaves = np.log(np.maximum(np.hypot(u, v), 1e-6) * period)
    spectrum = np.fft.rfft2(random.normal(size=(size, size))) * np.exp(-((octaves / spread) ** 2) / 2)
    field = np.fft.irfft2(spectrum, (size, size))
    return (field - field.mean()) / max(field.std(), 1e-9)


def painted(of: Material, random: np.random.Generator, size: int, scale: float, turn: float) -> Array:
    """An image full of a material, (size, size, 3)."""
    field = noise(random, size, of.period * scale, of.spread, of.angle + turn, of.stretch)
    share = 0.5 + 0.5 * np.tanh(of.hardness * field)
    return share[..., None] * of.colours[0] + (1 - share[..., None]) * of.colours[1]


def region(form: str, random: np.random.Generator, size: int, grain: float) -> Array:
    """Where something lies, (size, size) bool; `grain` is the size of grains, as a share of the image's side."""
    if form == "veins":
        winding = np.abs(noise(random, size, 3 * grain, 0.4))
        return winding < np.quantile(winding, random.uniform(0.08, 0.2))
    period, spread, share = {
        "grains": (1.5 * grain, 0.25, (0.06, 0.3)),
        "blots": (0.5, 0.5, (0.08, 0.35)),
        "layers": (1.2, 0.7, (0.3, 0.7)),
    }[form]
    field = noise(random, size, period, spread) + 0.05 * noise(random, size, 0.05, 0.5)
    return field > np.quantile(field, 1 - random.uniform(*share))


def blended(image: Array, over: Array, inside: Array, random: np.random.Generator) -> Array:
    """An image painted over inside a region, whose edge is sharp or soft."""
    share = blurred(inside[..., None].astype(float), random.choice([0.5, 1.5, 3]) * len(image) / 256)
    return share * over + (1 - share) * image


def blurred(image: Array, sigma: float) -> Array:
    """A Gaussian blur of (size, size, C), mirrored at the edges."""
    reach = int(3 * sigma + 1)
    return gaussian_filter(image, (sigma, sigma, 0), radius=(reach, reach, 0))
