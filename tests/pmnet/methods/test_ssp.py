"""SSP beside its golden file and beside loops over positions."""

import math
from types import SimpleNamespace

import pytest
import torch

from pmnet.backbones import EfficientNetLiteBackbone, ResNetBackbone, SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.base import resize
from pmnet.methods.ssp import SSP, SSPHead, matched, self_support
from tests.pmnet.methods.ruled import Golden, assert_near, gradient_norms

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "methods" / "ssp_resnet50_1shot.npz")


def feats(golden):
    return {"layer3": [golden["features/query"]]}, {"layer3": [golden["features/support"]]}, golden["support_masks"]


# Golden file


def test_intermediate_values_and_logits(golden):
    query, support, masks = feats(golden)
    query_BChw = query["layer3"][0]
    seen = SSPHead().see(support, masks)
    assert_near(seen.foreground[..., 0, 0], golden["prototype_fg"])
    assert_near(seen.background[..., 0, 0], golden["prototype_bg"])
    out = matched(query_BChw, seen)
    assert_near(out, golden["out_0"])
    for i in (1, 2):
        made = self_support(query_BChw, out)
        assert_near(made.foreground[..., 0, 0], golden[f"ssfp_{i}"])
        background = 0.3 * golden[f"ssbp_{i}"][..., None, None] + 0.7 * golden[f"asbp_{i}"]
        assert_near(made.background, background)
        out = golden["out_1"]
    assert_near(SSPHead(refine=False)(query, support, masks), golden["logits"])
    assert_near(SSPHead()(query, support, masks), golden["logits_refined"])


def test_network_from_the_authors_names(golden):
    images = golden["query"], golden["support"], golden["support_masks"]
    state = {f"module.{name}": tensor for name, tensor in golden.weights().items()}
    method = from_release("ssp", state)
    assert not method.training
    with torch.no_grad():
        assert_near(method(*images), golden["logits_full_refined"], 1e-4)
        assert torch.equal(method.predict(*images), golden["logits_full_refined"].argmax(1).bool())


def test_loss_and_gradients(golden):
    method = from_release("ssp", golden.weights()).train()
    batch = SimpleNamespace(**{k: golden[k] for k in ("query", "query_mask", "support", "support_masks")})
    loss = method.loss(batch, LOSS)
    assert_near(loss, (golden["train/losses"] * torch.tensor([1, 1, 1, 0.2])).sum())
    norms = gradient_norms(method.backbone.trunk, loss)
    for name, norm in golden.under("train/grad_norm").items():
        assert_near(norms[name], norm, 1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_of_a_method_with_a_head_is_refused(golden, prefix):
    """PFENet's family and CyCTR have the same tensors up to layer3."""
    state = {f"{prefix}{name}": tensor for name, tensor in golden.weights().items()}
    for head in ("cls.0.weight", "layer5.0.weight", "merge_multi_lvl_reduce.0.weight"):
        with pytest.raises(CheckpointError, match=f"has no head.*{head}"):
            from_release("ssp", state | {f"{prefix}{head}": torch.zeros(1)})


@pytest.mark.parametrize("change, error", [("missing", "layer2.0.conv1.weight"), ("shape", "layer2.0.conv1.weight")])
def test_tensors_of_something_else_are_refused(golden, change, error):
    state = golden.weights()
    if change == "missing":
        del state[error]
    else:
        state[error] = state[error][:1]
    with pytest.raises(CheckpointError, match=error):
        from_release("ssp", state)


# Formula


def plain(query, support, masks):
    """One episode, position by position, in float64; the answer at the features' size, with refinement."""
    h, w = query.shape[1:]
    Q = [query[:, i, j] for i in range(h) for j in range(w)]

    def pool(feature, side):
        small = resize((side)[None, None].double(), (h, w))[0, 0]
        total = sum(small[i, j] * feature[:, i, j] for i in range(h) for j in range(w))
        return total / (small.sum() + 1e-5)

    def cosine(a, b):
        return float(a @ b) / max(float(a.norm()) * float(b.norm()), 1e-8)

    def similar(bg, fg):
        return [(10 * cosine(q, bg[i]), 10 * cosine(q, fg)) for i, q in enumerate(Q)]

    def support_of(out):
        p = [1 / (1 + math.exp(a - b)) for a, b in out]
        order = sorted(range(len(Q)), key=lambda i: -p[i])
        fg = [i for i in range(len(Q)) if p[i] > 0.7] or order[:12]
        bg = [i for i in range(len(Q)) if 1 - p[i] > 0.6] or order[::-1][:12]
        adaptive = []
        for q in Q:
            weights = [math.exp(2 * cosine(q, Q[i])) for i in bg]
            adaptive.append(sum(weight * Q[i] for weight, i in zip(weights, bg, strict=True)) / sum(weights))
        return sum(Q[i] for i in fg) / len(fg), sum(Q[i] for i in bg) / len(bg), adaptive

    FP = sum(pool(s, m == 1) for s, m in zip(support, masks, strict=True)) / len(support)
    BP = sum(pool(s, m == 0) for s, m in zip(support, masks, strict=True)) / len(support)
    ssfp, ssbp, asbp = support_of(similar([BP] * len(Q), FP))
    FP1, BP1 = 0.5 * FP + 0.5 * ssfp, [0.3 * ssbp + 0.7 * a for a in asbp]
    out1 = similar(BP1, FP1)
    ssfp, ssbp, asbp = support_of(out1)
    FP2 = 0.5 * FP + 0.2 * FP1 + 0.3 * (0.5 * FP + 0.5 * ssfp)
    BP2 = [0.5 * BP + 0.2 * b1 + 0.3 * (0.3 * ssbp + 0.7 * a) for b1, a in zip(BP1, asbp, strict=True)]
    out2 = similar(BP2, FP2)
    mixed = [[0.7 * x + 0.3 * y for x, y in zip(a, b, strict=True)] for a, b in zip(out2, out1, strict=True)]
    return torch.tensor(mixed, dtype=torch.float64).T.unflatten(1, (h, w))


def example(B=2, K=3, C=6, h=4, w=5, seed=0, offset=0.0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, C, h, w, generator=random, dtype=torch.float64) + offset
    support = torch.randn(B, K, C, h, w, generator=random, dtype=torch.float64) + offset
    masks = (torch.rand(B, K, 8 * h, 8 * w, generator=random) < 0.4).to(torch.uint8)
    masks[:, :, 0, 0] = 255
    return query, support, masks


@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["sure", "unsure"])
def test_answer_is_the_plain_formula(offset):
    query, support, masks = example(offset=offset)
    found = SSPHead()({"layer3": [query]}, {"layer3": [support]}, masks)
    expected = torch.stack([plain(*episode) for episode in zip(query, support, masks, strict=True)])
    torch.testing.assert_close(found, resize(expected, (32, 40)), rtol=1e-6, atol=1e-6)


def test_where_no_position_is_sure_the_surest_are_taken():
    query, support, masks = example(offset=3.0)
    out = matched(query, SSPHead().see({"layer3": [support]}, masks))
    p = out.softmax(1)
    assert not (p[:, 1] > 0.7).any()  # the case above is the case meant
    assert not (p[:, 0] > 0.6).any()


def test_order_of_the_shots_and_the_rest_of_the_batch_change_nothing():
    query, support, masks = example()
    whole = SSPHead()({"layer3": [query]}, {"layer3": [support]}, masks)
    turned = SSPHead()({"layer3": [query]}, {"layer3": [support.flip(1)]}, masks.flip(1))
    torch.testing.assert_close(whole, turned)
    alone = SSPHead()({"layer3": [query[1:]]}, {"layer3": [support[1:]]}, masks[1:])
    torch.testing.assert_close(whole[1:], alone)


# Method


@pytest.mark.parametrize("name, trained", [("resnet50s", 8_290_304), ("resnet101s", 27_230_208)])
def test_learned_parameters(name, trained):
    method = SSP(DilatedResNetBackbone(name, "none", dilation="torchvision"))
    assert sum(p.numel() for p in method.learned()) == trained
    assert sum(p.numel() for p in method.head.parameters()) == 0
    learned = {name for name, p in method.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in learned} == {"layer2", "layer3"}
    assert learned <= method.saved()


@pytest.mark.parametrize("K", [1, 3])
def test_whole_way_of_images(K):
    torch.manual_seed(0)
    method = SSP(ResNetBackbone("resnet18", "none")).eval()
    query, support = torch.rand(2, 3, 64, 96), torch.rand(2, K, 3, 64, 96)
    masks = (torch.rand(2, K, 64, 96) < 0.5).to(torch.uint8)
    with torch.no_grad():
        logits = method(query, support, masks)
        seen = method.see(support, masks)
        torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(method.predict(query, support, masks), logits[:, 1] > logits[:, 0])
    assert logits.shape == (2, 2, 64, 96)


def test_training_step_moves_layers_2_and_3_and_no_statistics():
    torch.manual_seed(0)
    method = SSP(ResNetBackbone("resnet18", "none")).train()
    optimizer = torch.optim.SGD(method.learned(), lr=0.1)
    batch = SimpleNamespace(
        query=torch.rand(2, 3, 64, 64),
        query_mask=torch.randint(0, 2, (2, 64, 64)),
        support=torch.rand(2, 2, 3, 64, 64),
        support_masks=torch.randint(0, 2, (2, 2, 64, 64)),
    )
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.loss(batch, LOSS).backward()
    optimizer.step()
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in method.named_parameters() if p.requires_grad}


def test_backbone_without_layers_of_that_name_is_refused():
    backbone = SmallBackbone("none")
    backbone.trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(SettingError, match="layer2"):
        SSP(backbone)


def test_parts_of_another_backbone_are_trained_by_their_names():
    backbone = EfficientNetLiteBackbone("none")
    method = SSP(backbone, trained=["blocks.2", "blocks.3", "blocks.4"]).train()
    learned = {name for name, p in method.named_parameters() if p.requires_grad}
    assert learned
    assert learned <= method.saved()
    method(torch.rand(1, 3, 32, 32), torch.rand(1, 1, 3, 32, 32), torch.ones(1, 1, 32, 32)).sum().backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None} == learned
