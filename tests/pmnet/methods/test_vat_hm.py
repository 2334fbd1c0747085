"""VAT with hybrid masking beside its golden file, and beside VAT where both masks are the same."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.errors import SettingError
from pmnet.methods import all_methods, from_release
from pmnet.methods.vat import VATHead
from pmnet.methods.vat_hm import VATHM, VATHMHead
from tests.pmnet.methods.dense import DenseGolden
from tests.pmnet.methods.ruled import assert_near
from tests.pmnet.methods.test_vat import LOSS, feats, images, tiny_head, tiny_method


@pytest.mark.slow
@torch.no_grad()
def test_logits(shared):
    golden = DenseGolden(shared / "golden" / "methods" / "vat_hm_resnet50_1shot.npz")
    head = from_release("vat_hm", golden.under("weights")).head
    assert isinstance(head, VATHMHead)
    assert not head.training
    assert sum(p.numel() for p in head.parameters()) == 3_680_410
    assert_near(head(*golden.features()), golden["logits"])


@torch.no_grad()
def test_masking_is_before_resizing():
    head = tiny_head(kind=VATHMHead)
    _, support, masks = feats(K=2)
    second = {f"{m}_masked": [torch.randn_like(f) for f in fs] for m, fs in support.items()}
    seen = head.see({**support, **second}, masks)
    for m, units in seen.items():
        for i, unit in enumerate(units):
            for k in range(2):
                f, other = support[m][i][:, k], second[f"{m}_masked"][i][:, k]
                mask = F.interpolate(masks[:, k : k + 1].float(), f.shape[2:], mode="bilinear", align_corners=True)
                chosen = torch.where(f * mask > 0, f * mask, other)
                side = {"layer2": 32, "layer3": 16, "layer4": 8}[m]
                resized = F.interpolate(chosen, (side, side), mode="bilinear", align_corners=True)
                expected = resized / (resized.norm(dim=1, keepdim=True) + 1e-5)
                torch.testing.assert_close(unit[:, k], expected)


def test_features_of_the_masked_images_are_needed():
    _, support, masks = feats()
    with pytest.raises(SettingError, match="layer3_masked"):
        tiny_head(kind=VATHMHead).see(support, masks)


def test_method_and_its_parameters():
    assert all_methods()["vat_hm"] is VATHM
    channels = {"layer1": 256, "layer2": 512, "layer3": 1024}
    sizes = channels, {"layer2": 4, "layer3": 6, "layer4": 3}
    own, vat = (sum(p.numel() for p in kind(*sizes).parameters()) for kind in (VATHMHead, VATHead))
    assert own == vat == 3_180_954


@pytest.mark.slow
@torch.no_grad()
def test_supports_are_seen_once_and_as_images_without_background():
    method = tiny_method(VATHM)
    query, support, masks = images(B=1, K=2)
    seen = method.see(support, masks)
    assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))
    features = method.features(query, support, masks)[1]
    alone = method.backbone((support * masks[:, :, None])[:, 1], method.support_reads)
    torch.testing.assert_close(features["layer3_masked"][0][:, 1], alone["layer3"][0])
    pixels = (support * 255).to(torch.uint8)
    mean, std = method.backbone.mean, method.backbone.std
    from_pixels = method.features(query, pixels, masks)[1]["layer4_masked"][-1]
    torch.testing.assert_close(
        from_pixels, method.features(query, (pixels / 255 - mean) / std, masks)[1]["layer4_masked"][-1]
    )


@pytest.mark.slow
def test_one_step_of_training():
    method = tiny_method(VATHM)
    query, support, masks = images(B=1, K=1)
    episode = SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=masks[:, 0])
    loss = method.loss(episode, LOSS)
    loss.backward()
    torch.optim.AdamW(method.learned(), lr=5e-4, weight_decay=0).step()
    assert method.loss(episode, LOSS) < loss
