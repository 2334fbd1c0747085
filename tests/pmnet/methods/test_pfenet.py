"""PFENet beside its golden file, and its prior mask beside a loop over positions."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import SmallBackbone, SwinBackbone, ViTBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone, names_of_timm
from pmnet.backbones.vgg import VGGBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.asgnet import ASGNet
from pmnet.methods.base import resize
from pmnet.methods.ntrenet import NTRENet
from pmnet.methods.pfenet import PFENet, PFENetHead, prior_mask
from pmnet.methods.scl import SCL
from tests.pmnet.methods.ruled import Golden, assert_near, gradient_norms, without_dropout

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "methods" / "pfenet_resnet50_1shot.npz")


def feats(golden):
    return golden.features("query"), golden.features("support"), golden["support_masks"]


# Golden file


@pytest.mark.slow
@torch.no_grad()
def test_intermediate_values_and_logits(golden):
    head = from_release("pfenet", golden.weights())
    assert not head.training
    query, support, masks = feats(golden)
    seen = head.see(support, masks)
    assert_near(seen.prototype, golden["prototype"])
    assert_near(prior_mask(query["layer4"][0], seen.deep), golden["prior"])
    for i, inner in enumerate(head.outputs(query, seen).inner):
        assert_near(inner, golden[f"inner_{i}"])
    assert_near(head.head(query, support, masks), golden["logits"])
    assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(1).bool())


@pytest.mark.slow
@torch.no_grad()
def test_network_from_images(golden):
    state = golden.weights()
    method = PFENet(DilatedResNetBackbone("resnet50s", "none")).eval()
    method.backbone.trunk.load_state_dict(names_of_timm(state), strict=False)
    method.head = from_release("pfenet", state)
    assert_near(method(golden["query"], golden["support"], golden["support_masks"]), golden["logits_full"], 1e-4)


@pytest.mark.slow
def test_loss_and_gradients(golden):
    head = without_dropout(from_release("pfenet", golden.weights()))
    loss = head.loss(*feats(golden), golden["query_mask"], LOSS)
    assert_near(loss, golden["train/main_loss"] + golden["train/aux_loss"])
    norms = gradient_norms(head, loss)
    for name, norm in golden.under("train/grad_norm").items():
        assert_near(norms[name], norm, 1e-4)


# Checkpoints of the authors


def blank(head=None):
    return (head or PFENetHead(16)).state_dict()


def test_backbone_and_prefix_are_passed_over():
    state = blank()
    theirs = {f"module.{name}": tensor for name, tensor in state.items()}
    theirs |= {"module.layer0.0.weight": torch.zeros(1), "module.layer4.2.bn3.bias": torch.zeros(1)}
    head = from_release("pfenet", theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("res1.0.weight"), "missing .*res1.0.weight"),
        (lambda s: s.update({"corr_conv.0.0.weight": torch.zeros(1)}), "unknown .*corr_conv.0.0.weight"),
        (lambda s: s.update({"cls.3.bias": torch.zeros(3)}), "another shape .*cls.3.bias"),
        (lambda s: s.pop("down_query.0.weight"), "down_query.0.weight"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    state = dict(blank())
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("pfenet", state)


# Formula


def test_prior_mask_is_the_plain_formula():
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 3, 4, generator=random, dtype=torch.float64)
    deep = torch.randn(2, 3, 5, 4, 3, generator=random, dtype=torch.float64).relu()
    deep = deep * (torch.rand(2, 3, 1, 4, 3, generator=random) < 0.5)
    found = prior_mask(query, deep)
    for b in range(2):
        for k in range(3):
            Q, S = query[b].relu().flatten(1).T, deep[b, k].flatten(1).T
            best = [max(float(s @ q) / (float(s.norm() * q.norm()) + 1e-7) for s in S) for q in Q]
            low, high = min(best), max(best)
            expected = torch.tensor([(x - low) / (high - low + 1e-7) for x in best], dtype=torch.float64)
            torch.testing.assert_close(found[b, k].flatten(), expected, rtol=1e-5, atol=1e-6)


def test_empty_support_gives_no_prior():
    assert torch.equal(prior_mask(torch.rand(1, 5, 3, 4), torch.zeros(1, 1, 5, 3, 4)), torch.zeros(1, 1, 3, 4))


def test_bins_of_1_or_less_are_shares_of_the_height():
    assert PFENetHead(16, (1.0, 0.5, 0.25, 0.125)).sides(torch.zeros(1, 1, 81, 70)) == [81, 40, 20, 10]
    assert PFENetHead(16, (60, 30, 15, 8)).sides(torch.zeros(1, 1, 13, 13)) == [60, 30, 15, 8]


def random_feats(B=2, K=3, side=5, seed=0):
    random = torch.Generator().manual_seed(seed)

    def maps(*shape):
        return [torch.randn(*shape, side, side, generator=random)]

    query = {"layer2": maps(B, 6), "layer3": maps(B, 10), "layer4": maps(B, 8)}
    support = {"layer2": maps(B, K, 6), "layer3": maps(B, K, 10), "layer4_masked": maps(B, K, 8)}
    return query, support, (torch.rand(B, K, 33, 33, generator=random) < 0.5).to(torch.uint8)


@torch.no_grad()
def test_shots_are_averaged_in_any_order_and_episodes_do_not_mix():
    torch.manual_seed(0)
    head = PFENetHead(16, (6, 3)).eval()
    query, support, masks = random_feats()
    logits = head(query, support, masks)
    turned = {layer: [f.flip(1) for f in fs] for layer, fs in support.items()}
    torch.testing.assert_close(head(query, turned, masks.flip(1)), logits, rtol=1e-4, atol=1e-5)
    second = [{layer: [f[1:] for f in fs] for layer, fs in feats.items()} for feats in (query, support)]
    torch.testing.assert_close(head(*second, masks[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    thrice = {layer: [f[:, :1].expand(-1, 3, *f.shape[2:]) for f in fs] for layer, fs in support.items()}
    once = {layer: [f[:, :1] for f in fs] for layer, fs in support.items()}
    expected = head(query, once, masks[:, :1])
    torch.testing.assert_close(head(query, thrice, masks[:, :1].expand(-1, 3, -1, -1)), expected, rtol=1e-4, atol=1e-5)


# Method


def test_learned_parameters():
    method = PFENet(DilatedResNetBackbone("resnet50s", "none"))
    assert sum(p.numel() for p in method.learned()) == 10_817_034
    assert sum(p.numel() for p in method.parameters()) == 34_448_842
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in method.head.named_children()}
    assert counts == {
        "down_query": 393_216,
        "down_supp": 393_216,
        "init_merge": 4 * 131_328,
        "alpha_conv": 3 * 131_072,
        "beta_conv": 4 * 1_179_648,
        "inner_cls": 4 * 590_338,
        "res1": 262_144,
        "res2": 1_179_648,
        "cls": 590_338,
    }


def small(**options):
    torch.manual_seed(0)
    return PFENet(SmallBackbone("none"), bins=(6, 3), **options)


def batch(B=2, K=1, side=65, seed=0):
    random = torch.Generator().manual_seed(seed)
    query_mask = torch.randint(0, 3, (B, side, side), generator=random).to(torch.uint8)
    return SimpleNamespace(
        query=torch.rand(B, 3, side, side, generator=random),
        query_mask=query_mask.masked_fill(query_mask == 2, 255),
        support=torch.rand(B, K, 3, side, side, generator=random),
        support_masks=(torch.rand(B, K, side, side, generator=random) < 0.5).to(torch.uint8),
    )


@pytest.mark.parametrize("K", [1, 3])
@torch.no_grad()
def test_whole_way_of_images(K):
    method, b = small().eval(), batch(K=K)
    logits = method(b.query, b.support, b.support_masks)
    assert logits.shape == (2, 2, 65, 65)
    seen = method.see(b.support, b.support_masks)
    torch.testing.assert_close(method.segment(b.query, seen), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(method.predict(b.query, b.support, b.support_masks), logits[:, 1] > logits[:, 0])


@pytest.mark.parametrize("build", [lambda: SmallBackbone("none"), lambda: VGGBackbone("none")], ids=["resnet", "vgg"])
@torch.no_grad()
def test_layer4_of_a_support_sees_masked_layer3(build):
    method, b = PFENet(build(), bins=(6, 3)).eval(), batch(K=2)
    _, support = method.features(b.query, b.support, b.support_masks)
    layer3 = method.backbone(b.support.flatten(0, 1))["layer3"][-1].relu()
    mask = resize(b.support_masks.float(), layer3.shape[-2:]).flatten(0, 1)[:, None]
    blocks, _ = method.backbone.stage("layer4", layer3 * mask)
    torch.testing.assert_close(support["layer4_masked"][0].flatten(0, 1), blocks[-1])
    whole, _ = method.backbone.stage("layer4", layer3)
    assert not torch.allclose(whole[-1], blocks[-1])


@pytest.mark.parametrize("reads", [None, {"layer1": "last", "layer2": "all", "layer3": "all", "layer4": "all"}])
@torch.no_grad()
def test_features_are_the_same_where_other_methods_read_supports_too(reads):
    method, b = small().eval(), batch()
    own = method.features(b.query, b.support, b.support_masks)
    passed = method.passes(b.query, b.support, reads or method.reads)
    assert "layer4" in passed[1]
    shared = method.chosen(*passed, b.support, b.support_masks)
    for mine, theirs in zip(own, shared, strict=True):
        assert mine.keys() == theirs.keys()
        for layer in mine:
            torch.testing.assert_close(mine[layer], theirs[layer], rtol=1e-4, atol=1e-5)


def test_training_step_moves_the_head_alone():
    method = small(batchnorm="eval").train()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.loss(batch(), LOSS).backward()
    torch.optim.SGD(method.learned(), lr=0.1).step()
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"head.{name}" for name, _ in method.head.named_parameters()} == method.saved()


def test_backbones_statistics_move_and_are_saved_where_batchnorm_is_in_training_mode():
    method = small().train()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.loss(batch(), LOSS)
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-1] for name in moved} == {"running_mean", "running_var", "num_batches_tracked"}
    assert moved <= method.saved()
    assert not any(p.requires_grad for p in method.backbone.parameters())
    method.eval()
    settled = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.loss(batch(), LOSS)
    assert all(torch.equal(tensor, settled[name]) for name, tensor in method.state_dict().items())


def test_queries_are_normalised_apart_from_supports():
    method, b = small().train(), batch(B=4)
    query, _ = method.features(b.query, b.support, b.support_masks)
    method = small().train()
    alone = method.backbone(b.query)["layer3"][-1]
    torch.testing.assert_close(query["layer3"][-1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [64, 384, 472])
def test_other_sides_are_refused(side):
    method = small()
    with pytest.raises(SettingError, match=rf"PFENet takes image sides of 8n \+ 1.*not {side}x65.*image_size"):
        method.check_sides((side, 65))
    images = torch.rand(1, 3, 65, 65)
    with pytest.raises(SettingError, match="8n"):
        method(F.pad(images, (0, 1)), images[None], torch.ones(1, 1, 65, 65))
    method.check_sides((473, 385))


@pytest.mark.parametrize("kind", [PFENet, ASGNet, SCL, NTRENet])
@pytest.mark.parametrize("backbone", [SwinBackbone, partial(ViTBackbone, "dinov2_small")])
def test_transformers_are_refused_with_the_backbones_that_fit(kind, backbone):
    made = backbone("none")
    with pytest.raises(SettingError, match=r"convolutional backbone.*resnet50s"):
        kind(made)
