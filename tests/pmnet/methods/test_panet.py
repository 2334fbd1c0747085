"""PANet beside its golden file and beside the formulas written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.backbones.vgg import OURS, PANET, VGGBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.panet import PANet, PANetHead
from tests.pmnet.methods.ruled import Golden, assert_near, gradient_norms

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "methods" / "panet_vgg16_1shot.npz")


def feats(golden):
    return {"layer4": [golden["features/query"]]}, {"layer4": [golden["features/support"]]}, golden["support_masks"]


# Golden file


def test_prototypes_and_logits(golden):
    query, support, masks = feats(golden)
    seen = PANetHead().see(support, masks)
    assert_near(seen.foreground, golden["prototype_fg"])
    assert_near(seen.background, golden["prototype_bg"])
    assert_near(PANetHead()(query, support, masks), golden["logits"])


@pytest.mark.slow
def test_network_from_the_authors_names(golden):
    images = golden["query"], golden["support"], golden["support_masks"]
    method = from_release("panet", {f"module.{name}": tensor for name, tensor in golden.weights().items()})
    assert not method.training
    with torch.no_grad():
        assert_near(method(*images), golden["logits_full"], 1e-4)
        assert torch.equal(method.predict(*images), golden["logits_full"].argmax(1).bool())


@pytest.mark.slow
def test_loss_and_gradients(golden):
    method = from_release("panet", golden.weights()).train()
    batch = SimpleNamespace(**{k: golden[k] for k in ("query", "query_mask", "support", "support_masks")})
    loss = method.loss(batch, LOSS)
    assert_near(loss, golden["train/query_loss"] + golden["train/align_loss"])
    norms, ours = gradient_norms(method.backbone.trunk, loss), dict(zip(PANET, OURS, strict=True))
    for name, norm in golden.under("train/grad_norm").items():
        module, _, leaf = name.removeprefix("encoder.backbone.").rpartition(".")
        assert_near(norms[f"{ours[module]}.{leaf}"], norm, 1e-4)


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_tensors_of_something_else_are_refused(change):
    trunk = VGGBackbone("none").trunk.state_dict()
    theirs = dict(zip(OURS, PANET, strict=True))
    state = {f"encoder.backbone.{theirs[n.rpartition('.')[0]]}.{n.split('.')[-1]}": t for n, t in trunk.items()}
    from_release("panet", state)
    name = "encoder.backbone.features.2.0.weight"
    if change == "missing":
        del state[name]
    elif change == "shape":
        state[name] = state[name][:1]
    else:
        state["encoder.backbone.features.9.0.weight"] = torch.zeros(1)
    wanted = "features.9.0.weight" if change == "unknown" else "layer1.0.weight"
    with pytest.raises(CheckpointError, match=wanted):
        from_release("panet", state)


# Formulas


def example(B=3, K=2, C=5, side=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, C, side, side, generator=random, dtype=torch.float64)
    support = torch.randn(B, K, C, side, side, generator=random, dtype=torch.float64)
    masks = (torch.rand(B, K, 33, 33, generator=random) < 0.4).to(torch.uint8)
    query_mask = torch.randint(0, 3, (B, 33, 33), generator=random)
    return query, support, masks, query_mask.masked_fill(query_mask == 2, 255)


def enlarged(x, size=(33, 33)):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def pooled(feature, mask):
    return (feature * mask).sum((1, 2)) / (mask.sum() + 1e-5)


def cosines(feature, bg, fg):
    return 20 * torch.stack([F.cosine_similarity(feature, p[:, None, None], dim=0) for p in (bg, fg)])


def plain(query, support, masks):
    """Logits of one episode at the features' size."""
    larger = enlarged(support)
    fg = torch.stack([pooled(f, (m == 1).double()) for f, m in zip(larger, masks, strict=True)]).mean(0)
    bg = torch.stack([pooled(f, (m != 1).double()) for f, m in zip(larger, masks, strict=True)]).mean(0)
    return cosines(query, bg, fg)


def test_answer_is_the_plain_formula():
    query, support, masks, _ = example()
    masks[:, :, :2, :2] = 255  # background
    found = PANetHead()({"layer4": [query]}, {"layer4": [support]}, masks)
    expected = torch.stack([plain(*episode) for episode in zip(query, support, masks, strict=True)])
    torch.testing.assert_close(found, enlarged(expected))


def test_loss_is_the_plain_formula_and_leaves_out_episodes_without_predicted_foreground():
    query, support, masks, query_mask = example()
    support[1] = support[1].abs()
    masks[1], query[1] = 0, support[1, 0]  # like the background; the foreground's prototype is zero
    logits = torch.stack([plain(*episode) for episode in zip(query, support, masks, strict=True)])
    alignment = 0.0
    for b, out in enumerate(logits):
        pred = out.argmax(0)
        if not pred.any():
            continue
        fg, bg = (pooled(query[b], (pred == side).double()) for side in (1, 0))
        for feature, mask in zip(support[b], masks[b], strict=True):
            alignment += LOSS(enlarged(cosines(feature, bg, fg)[None]), mask[None].long()) / 2
    assert not logits[1].argmax(0).any()
    expected = LOSS(enlarged(logits), query_mask) + alignment / 3
    found = PANetHead().loss({"layer4": [query]}, {"layer4": [support]}, masks, query_mask, LOSS)
    torch.testing.assert_close(found, expected, check_dtype=False)


def test_batch_without_predicted_foreground_has_no_alignment():
    _, support, masks, query_mask = example(B=1)
    feats = {"layer4": [support[:, 0].abs()]}, {"layer4": [support.abs()]}
    found = PANetHead().loss(*feats, torch.zeros_like(masks), query_mask, LOSS)
    assert found.isfinite()
    logits = PANetHead()(*feats, torch.zeros_like(masks))
    torch.testing.assert_close(found, LOSS(logits.float(), query_mask))


def test_order_of_the_shots_and_the_rest_of_the_batch_change_nothing():
    query, support, masks, _ = example()
    whole = PANetHead()({"layer4": [query]}, {"layer4": [support]}, masks)
    torch.testing.assert_close(whole, PANetHead()({"layer4": [query]}, {"layer4": [support.flip(1)]}, masks.flip(1)))
    torch.testing.assert_close(whole[1:], PANetHead()({"layer4": [query[1:]]}, {"layer4": [support[1:]]}, masks[1:]))


# Method


def test_learned_parameters():
    method = PANet(VGGBackbone("none"))
    assert sum(p.numel() for p in method.learned()) == 14_714_688
    assert sum(p.numel() for p in method.head.parameters()) == 0
    assert method.saved() == set(method.state_dict())


@pytest.mark.parametrize("K", [1, 3])
def test_whole_way_of_images(K):
    torch.manual_seed(0)
    method = PANet(SmallBackbone("none")).eval()
    query, support = torch.rand(2, 3, 64, 96), torch.rand(2, K, 3, 64, 96)
    masks = (torch.rand(2, K, 64, 96) < 0.5).to(torch.uint8)
    with torch.no_grad():
        logits = method(query, support, masks)
        seen = method.see(support, masks)
        torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(method.predict(query, support, masks), logits[:, 1] > logits[:, 0])
    assert logits.shape == (2, 2, 64, 96)


@pytest.mark.parametrize("build", [lambda: VGGBackbone("none"), lambda: ResNetBackbone("resnet18", "none")])
@pytest.mark.parametrize("layer", ["layer3", "layer4"])
def test_training_step_moves_the_whole_backbone_up_to_the_layer(build, layer):
    torch.manual_seed(0)
    method = PANet(build(), layer).train()
    batch = SimpleNamespace(
        query=torch.rand(2, 3, 64, 64),
        query_mask=torch.randint(0, 2, (2, 64, 64)),
        support=torch.rand(2, 2, 3, 64, 64),
        support_masks=torch.randint(0, 2, (2, 2, 64, 64)),
    )
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.loss(batch, LOSS).backward()
    torch.optim.SGD(method.learned(), lr=0.1).step()
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    used = {name for name, _ in method.named_parameters() if layer == "layer4" or ".layer4." not in name}
    assert moved == used  # and no statistics
    assert {name for name, parameter in method.named_parameters() if parameter.requires_grad} == used


def test_stage_that_the_backbone_lacks_is_refused():
    with pytest.raises(SettingError, match="layer7"):
        PANet(SmallBackbone("none"), layer="layer7")
