"""DiceCrossEntropy against loops over pixels, and the choice of the loss by the dataset."""

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from pmnet.training.losses import DiceCrossEntropy
from tests.conftest import ROOT


def test_equals_loops_over_pixels() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 5, 7, generator=source, dtype=torch.float64)
    masks = torch.randint(3, (3, 5, 7), generator=source).masked_fill_(torch.rand(3, 5, 7, generator=source) < 0.2, 255)
    masks[masks == 2] = 0
    dice, entropy, count = 0.0, 0.0, 0
    for b in range(3):
        common = areas = 0.0
        for y in range(5):
            for x in range(7):
                if masks[b, y, x] == 255:
                    continue
                shares = logits[b, :, y, x].softmax(0)
                entropy, count = entropy - float(shares[masks[b, y, x]].log()), count + 1
                common += float(shares[1]) * int(masks[b, y, x])
                areas += float(shares[1]) + int(masks[b, y, x])
        dice += (1 - (2 * common + 1) / (areas + 1)) / 3
    found = DiceCrossEntropy(dice=0.7)(logits, masks)
    assert float(found) == pytest.approx(entropy / count + 0.7 * dice, abs=1e-12)
    assert float(DiceCrossEntropy(dice=0)(logits, masks)) == float(F.cross_entropy(logits, masks, ignore_index=255))


def test_marking_nothing_costs_where_the_object_is_small() -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.long)
    masks[0, :4, :4] = 1
    nothing = torch.stack([torch.full((1, 64, 64), 4.0), torch.full((1, 64, 64), -4.0)], dim=1)
    assert F.cross_entropy(nothing, masks) < 0.05
    assert DiceCrossEntropy()(nothing, masks) > 0.8


@pytest.mark.parametrize(
    "overrides, dice",
    [
        ([], True), (["experiment=quickstart"], True), (["dataset=pascal"], False), (["loss=cross_entropy"], False),
        (["dataset=pascal", "loss=dice_cross_entropy"], True), (["experiment=table1_pascal_resnet50"], False),
    ],
)  # fmt: skip
def test_one_s_own_images_take_the_dice_loss(overrides: list[str], dice: bool) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loss = instantiate(compose("config", overrides).loss)
    assert isinstance(loss, DiceCrossEntropy) == dice
