"""Pictures of test episodes: supports with masks, query, prediction, ground truth, IoU."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from datamodules import Episode, FewShotDataModule
from datamodules.show import over
from pmnet.replacing import replacing
from pmnet.training.module import FewShotModule, TestResult

matplotlib.use("Agg")


def draw(folder: Path, data: FewShotDataModule, module: FewShotModule, result: TestResult, each: int) -> None:
    """Writes `best-*.png`, `worst-*.png` and `random-*.png`, `each` of them, and all of them in `overview.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    by_iou = sorted(result.episode_iou, key=lambda i: (result.episode_iou[i], i))
    random = np.random.default_rng(0).permutation(by_iou)[:each].tolist()
    chosen = {"best": by_iou[::-1][:each], "random": random, "worst": by_iou[:each]}
    episodes = data.test_dataset()
    rows = []
    for kind, indices in chosen.items():
        for rank, index in enumerate(indices):
            episode = episodes[index]
            pred = predict(module, episode)
            name = data.target.classes[int(episode.class_id)]
            row = (f"{kind}: {name}, IoU {result.episode_iou[index]:.0f}", episode, pred)
            write(folder / f"{kind}-{rank}-episode{index}.png", [row], dpi=80)
            rows.append(row)
    if rows:
        write(folder / "overview.png", rows, dpi=60)


def write(path: Path, rows: list[tuple[str, Episode, Tensor]], dpi: int) -> None:
    with replacing(path) as part:
        figure(rows).savefig(part, format="png", dpi=dpi, bbox_inches="tight")


@torch.no_grad()
def predict(module: FewShotModule, episode: Episode) -> Tensor:
    """The predicted mask, (H, W) bool on the CPU."""
    batch = Episode.collate([episode])
    device = next(module.parameters()).device
    module.eval()
    return module(batch.to(device))[0].cpu()


def figure(rows: list[tuple[str, Episode, Tensor]]) -> Figure:
    """One row for each (label, episode, predicted mask); shows at most five supports."""
    shown = min(rows[0][1].support.shape[0], 5)
    columns = [f"support {k + 1}" for k in range(shown)] + ["query", "prediction", "ground truth"]
    height, width = rows[0][1].query.shape[-2:]
    fig = Figure(figsize=(2.2 * len(columns), (2.1 * height / width + 0.5) * len(rows)))
    axes = fig.subplots(len(rows), len(columns), squeeze=False)
    for (label, episode, pred), line in zip(rows, axes, strict=True):
        pictures = [over(episode.support[k], episode.support_masks[k] == 1) for k in range(shown)]
        pictures += [over(episode.query, None), over(episode.query, pred), over(episode.query, episode.query_mask == 1)]
        for axis, picture, column in zip(line, pictures, columns, strict=True):
            axis.imshow(picture)
            axis.set_title(column, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_xlabel(label, fontsize=9, loc="left")
    fig.tight_layout()
    return fig
