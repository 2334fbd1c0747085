"""Shows a dataset: saves a contact sheet of test episodes with mask overlays and prints the images per class.

python -m datamodules.show dataset=pascal fold=0 shot=1 --out pascal.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.ndimage import binary_erosion
from torch import Tensor

from datamodules.command import config, load_test_episodes, one_message
from datamodules.episodes.dataset import Episodes, FewShotDataset
from datamodules.episodes.episode import IGNORE, Episode

OUTLINE, IGNORED = (255, 255, 60), (255, 60, 200)
MAX_SUPPORTS = 5  # shown per episode


def over(image: Tensor, mask: Tensor | None, ignore: Tensor | None = None) -> np.ndarray:
    """Overlays a mask on an image: outlines the mask, darkens everything outside it, tints ignored pixels.

    Args:
        image: (3, H, W) uint8 RGB.
        mask: (H, W) bool; None leaves the image as it is.
        ignore: (H, W) bool; None if no pixel is ignored.

    Returns:
        (H, W, 3) uint8 RGB.

    Example:
        >>> import torch
        >>> image, mask = torch.full((3, 64, 96), 100, dtype=torch.uint8), torch.zeros(64, 96, dtype=torch.bool)
        >>> mask[16:48, 16:48] = True
        >>> overlay = over(image, mask)
        >>> overlay.shape, overlay[0, 0].tolist(), overlay[16, 16].tolist(), overlay[32, 32].tolist()
        ((64, 96, 3), [40, 40, 40], [255, 255, 60], [100, 100, 100])
    """
    picture = image.permute(1, 2, 0).numpy().copy()
    if mask is not None:
        inside = mask.numpy()
        width = max(inside.shape[0] // 96, 1)
        picture[~inside] = picture[~inside] * 0.4
        picture[inside & ~binary_erosion(inside, iterations=width)] = OUTLINE
    if ignore is not None:
        picture[ignore.numpy()] = picture[ignore.numpy()] // 2 + np.array(IGNORED, np.uint8) // 2
    return picture


def contact_sheet(dataset: FewShotDataset, episodes: list[Episode]) -> Figure:
    """A figure with one row per episode: the query, then up to five supports, titled with class and file names.

    Args:
        dataset: the dataset of the episodes.
        episodes: single episodes, without the batch axis, all with the same number of shots.
    """
    shown = min(episodes[0].support.shape[0], MAX_SUPPORTS)
    fig = Figure(figsize=(2.6 * (shown + 1), 2.9 * len(episodes)))
    for line, episode in zip(fig.subplots(len(episodes), shown + 1, squeeze=False), episodes, strict=True):
        (spec,) = episode.spec
        pictures = [over(episode.query, episode.query_mask == 1, episode.query_mask == IGNORE)]
        pictures += [over(episode.support[k], episode.support_masks[k] == 1) for k in range(shown)]
        titles = [f"{dataset.classes[spec.class_id]}\nquery {Path(spec.query).name}"]
        titles += [f"\nsupport {Path(name).name}" for name in spec.supports[:shown]]
        for axis, picture, title in zip(line, pictures, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=8, loc="left")
            axis.set_axis_off()
    fig.tight_layout()
    return fig


def table_of(dataset: FewShotDataset, tested: set[int]) -> Table:
    """A table of the number of images per class; marks the tested classes.

    Args:
        dataset: the dataset to describe.
        tested: ids of the tested classes.
    """
    table = Table(title=f"{dataset.name}: {dataset.splits}")
    table.add_column("class")
    splits = ("test",) if dataset.test_only else ("train", "test")
    for split in splits:
        table.add_column(f"images to {split}", justify="right")
    table.add_column("tested")
    for c, name in enumerate(dataset.classes):
        counts = [f"{len(dataset.images_of(c, split)):,}" for split in splits]  # type: ignore[arg-type]
        table.add_row(escape(f"{c} {name}"), *counts, "yes" if c in tested else "")
    return table


def pick(episodes: Episodes, count: int) -> list[Episode]:
    """Reads `count` episodes of a test list, with as many different classes as possible, in list order."""
    specs = episodes.specs
    assert isinstance(specs, list)
    first = {spec.class_id: i for i, spec in reversed(list(enumerate(specs)))}  # class -> its first episode
    chosen = list(dict.fromkeys([*sorted(first.values()), *range(len(specs))]))[:count]
    return [episodes[i] for i in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser("python -m datamodules.show", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py: dataset=... fold=... shot=...")
    parser.add_argument("--out", type=Path, default=Path("episodes.png"), help="image file (default: episodes.png)")
    parser.add_argument("--count", type=int, default=8, help="number of episodes to show (default: 8)")
    args = parser.parse_intermixed_args()
    with one_message():
        dataset, episodes = load_test_episodes(config(args.overrides))
        tested = {spec.class_id for spec in episodes.specs}  # type: ignore[union-attr]
        Console(soft_wrap=True).print(table_of(dataset, tested))
        chosen = pick(episodes, args.count)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(dataset, chosen).savefig(args.out, dpi=80)
    print(f"Saved {len(chosen)} of {len(episodes)} test episodes to {args.out.absolute()}")


if __name__ == "__main__":
    main()
