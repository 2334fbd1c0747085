"""mode=predict: segments one's own images by a few examples, as `pmnet segment` does."""

from pathlib import Path

from omegaconf import DictConfig

from experiments.errors import UserError
from experiments.files import write_json
from experiments.run import results
from pmnet.segment.commands.segment import fit, negatives_of, tile_of
from pmnet.segment.folder import segment_folder
from pmnet.segment.recipe import DEFAULT
from pmnet.segment.segmenter import Segmenter


def predict(cfg: DictConfig, folder: Path) -> float:
    """Writes masks, overlays and results.csv to `folder`; returns NaN, as there is no score.

    Raises:
        UserError: an option is missing, or an image failed; the others are done.
    """
    p = cfg.predict
    for name in ("support", "images", "negatives"):
        if not p[name] and name != "negatives":
            raise UserError(f"mode=predict needs predict.{name}: the path of a folder.")
        if p[name] and not Path(p[name]).exists():
            raise UserError(f"predict.{name}: there is no {Path(p[name]).absolute()}.")
    tile = tile_of(str(p.tile))
    segmenter = Segmenter.load(cfg.ckpt or DEFAULT, "auto" if cfg.trainer.accelerator == "auto" else "cpu")
    fit(segmenter, Path(p.support), negatives_of(Path(p.negatives) if p.negatives else None))
    failed = segment_folder(segmenter, Path(p.images), folder, tile, p.gate)
    write_json(folder / "results.json", {"mode": "predict", **segmenter.described(), **results.origin(cfg)})
    if failed:
        raise UserError(f"{failed} images failed; the others are done: {folder / 'results.csv'}")
    return float("nan")
