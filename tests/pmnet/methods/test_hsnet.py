"""HSNet beside its golden file and beside a plain second network."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.hsnet import HSNet, HSNetHead
from tests.pmnet.methods.dense import DenseGolden, norm, part, random_feats
from tests.pmnet.methods.ruled import assert_near

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)
RESNET50 = {"layer2": 4, "layer3": 6, "layer4": 3}
TINY = {"layer2": 2, "layer3": 3, "layer4": 1}


@pytest.fixture
def golden(shared):
    return DenseGolden(shared / "golden" / "methods" / "hsnet_resnet50_1shot.npz")


def feats(B=2, K=3, seed=0):
    sides = {"layer2": 12, "layer3": 6, "layer4": 3}
    return random_feats({"layer2": 5, "layer3": 6, "layer4": 7}, sides, TINY, B, K, seed)


def tiny_head(seed=0):
    torch.manual_seed(seed)
    return HSNetHead(TINY).eval()


# Golden file


def test_logits_loss_and_gradients(golden):
    head = from_release("hsnet", golden.under("weights")).head
    assert not head.training
    query, support, masks = golden.features()
    with torch.no_grad():
        assert_near(head(query, support, masks), golden["logits"])
        assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(1).bool())
    loss = head.train().loss(query, support, masks, golden["query_mask"], LOSS)
    assert_near(loss, golden["loss"].float())
    loss.backward()
    gradients = {f"hpn_learner.{name}": p.grad for name, p in head.named_parameters()}
    for name, expected in golden.under("grad_norm").items():
        assert_near(norm(gradients[name]), expected, 1e-4)
    for name, expected in golden.under("grad").items():  # a ReLU at zero: in double precision it is off by 1.4e-4
        assert_near(gradients[name], expected, 3e-4)


# A second network: without a word of how it is laid out in memory, or what is left out where supports are empty


def plain_conv4d(x, conv):
    s, p = conv.stride, conv.reach
    B, _, hq, wq = x.shape[:4]
    kept = x[..., ::s, ::s].permute(0, 4, 5, 1, 2, 3)
    over_query = F.conv2d(kept.flatten(0, 2), conv.conv1.weight, conv.conv1.bias, padding=p)
    over_support = F.conv2d(
        x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2), conv.conv2.weight, conv.conv2.bias, stride=s, padding=p
    )
    over_query = over_query.unflatten(0, kept.shape[:3]).permute(0, 3, 4, 5, 1, 2)
    return over_query + over_support.unflatten(0, (B, hq, wq)).permute(0, 3, 1, 2, 4, 5)


def plain_steps(x, steps):
    for conv, group_norm in ((steps[i], steps[i + 1]) for i in (0, 3, 6)):
        x = F.group_norm(plain_conv4d(x, conv), 4, group_norm.weight, group_norm.bias).clamp(min=0)
    return x


def plain_resize(x, size):
    flat = x.permute(0, 4, 5, 1, 2, 3)
    resized = F.interpolate(flat.flatten(0, 2), size, mode="bilinear", align_corners=True)
    return resized.unflatten(0, flat.shape[:3]).permute(0, 3, 4, 5, 1, 2)


def plain_network(head, query, support, mask_BHW):
    """Logits by one support; features (B, C, h, w)."""
    correlations = {}
    for m, blocks in query.items():
        stack = []
        for q, s in zip(blocks, support[m], strict=True):
            s = s * F.interpolate(mask_BHW[:, None], s.shape[-2:], mode="bilinear", align_corners=True)
            q, s = (f / (f.norm(dim=1, keepdim=True) + 1e-5) for f in (q, s))
            stack.append(torch.einsum("bcij,bckl->bijkl", q, s).clamp(min=0))
        correlations[m] = torch.stack(stack, dim=1)
    s4, s3, s2 = (plain_steps(correlations[m], getattr(head, f"encoder_{m}")) for m in ("layer4", "layer3", "layer2"))
    x = plain_steps(plain_resize(s4, s3.shape[2:4]) + s3, head.encoder_layer4to3)
    x = plain_steps(plain_resize(x, s2.shape[2:4]) + s2, head.encoder_layer3to2)
    x = head.decoder1(x.mean(dim=(4, 5)))
    x = F.interpolate(x, (2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=True)
    return F.interpolate(head.decoder2(x), mask_BHW.shape[1:], mode="bilinear", align_corners=True)


@pytest.mark.slow
@torch.no_grad()
def test_several_shots_vote_as_published():
    head = tiny_head().double()
    query, support, masks = feats(B=3, K=5)
    query, support = ({m: [f.double() for f in fs] for m, fs in feats.items()} for feats in (query, support))
    answers = []
    for k in range(5):
        shot = part(support, slice(None), k)
        logits = plain_network(head, query, shot, masks[:, k].double())
        alone = part(support, slice(None), slice(k, k + 1))
        torch.testing.assert_close(head(query, alone, masks[:, k : k + 1]), logits)
        answers.append(logits.argmax(1))
    middle = float(torch.stack(answers).double().mean())
    assert 0.02 < middle < 0.98, "both classes should occur"
    for K in (1, 2, 3, 5):
        found = head.predict(query, part(support, slice(None), slice(0, K)), masks[:, :K])
        votes = sum(answers[:K])
        for b in range(3):
            expected = votes[b] if K == 1 else votes[b] / max(1, int(votes[b].max())) >= 0.5
            assert torch.equal(found[b], expected.bool())


@torch.no_grad()
def test_order_of_shots_and_other_episodes_change_nothing():
    head = tiny_head()
    query, support, masks = feats()
    mask = head.predict(query, support, masks)
    turned = {m: [f.flip(1) for f in fs] for m, fs in support.items()}
    assert torch.equal(head.predict(query, turned, masks.flip(1)), mask)
    alone = [part(feats, slice(1, 2)) for feats in (query, support)]
    assert torch.equal(head.predict(*alone, masks[1:]), mask[1:])
    logits = head(query, part(support, slice(None), slice(0, 1)), masks[:, :1])
    one = head(alone[0], part(alone[1], slice(None), slice(0, 1)), masks[1:, :1])
    torch.testing.assert_close(one, logits[1:], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_queries_and_supports_of_other_sizes_and_empty_masks():
    head = tiny_head()
    query, support, masks = feats(B=1, K=1)
    larger = {m: [F.interpolate(f, scale_factor=2) for f in fs] for m, fs in query.items()}
    logits = head.segment(larger, head.see(support, masks), (60, 70))
    assert logits.shape == (1, 2, 60, 70)
    empty = torch.zeros_like(masks)
    expected = plain_network(head, query, part(support, slice(None), 0), empty[:, 0].float())
    torch.testing.assert_close(head(query, support, empty), expected, rtol=1e-4, atol=1e-6)


# Parameters and checkpoints


@pytest.mark.parametrize(
    "blocks, parameters",
    [
        (RESNET50, 2_573_794),
        ({"layer2": 4, "layer3": 23, "layer4": 3}, 2_587_394),
        ({"layer2": 3, "layer3": 3, "layer4": 1}, 2_570_018),  # VGG-16 of the authors' program
    ],
)
def test_parameters_as_measured(blocks, parameters):
    head = HSNetHead(blocks)
    assert sum(p.numel() for p in head.parameters()) == parameters
    if blocks == RESNET50:
        parts = {name: sum(p.numel() for p in module.parameters()) for name, module in head.named_children()}
        assert parts == {
            "encoder_layer4": 167_584, "encoder_layer3": 171_520, "encoder_layer2": 202_688,
            "encoder_layer4to3": 886_272, "encoder_layer3to2": 886_272, "decoder1": 221_376, "decoder2": 38_082,
        }  # fmt: skip


def test_prefixes_and_backbone_are_passed_over():
    state = tiny_head().state_dict()
    theirs = {f"module.hpn_learner.{name}": tensor for name, tensor in state.items()}
    theirs["module.backbone.layer1.0.conv1.weight"] = torch.zeros(1)
    head = from_release("hsnet", theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("decoder2.2.bias"), "missing .*decoder2.2.bias"),
        (lambda s: s.update({"encoder_layer1.0.conv1.weight": torch.zeros(1)}), "unknown .*encoder_layer1"),
        (lambda s: s.update({"encoder_layer4to3.1.weight": torch.zeros(3)}), "another shape .*encoder_layer4to3.1"),
        (lambda s: s.pop("encoder_layer3.0.conv1.weight"), "encoder_layer3.0.conv1.weight"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    state = dict(tiny_head().state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("hsnet", state)


# Method


def images(B=2, K=3, H=72, W=88):
    random = torch.Generator().manual_seed(0)
    query, support = (torch.rand(*n, 3, H, W, generator=random) for n in ((B,), (B, K)))
    masks = torch.zeros(B, K, H, W, dtype=torch.uint8)
    masks[..., H // 4 : H // 2, W // 3 :] = 1
    return query, support, masks


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_on_images_of_any_side(K):
    torch.manual_seed(0)
    method = HSNet(SmallBackbone("none")).eval()
    query, support, masks = images(K=K, H=76, W=85)
    seen = method.see(support, masks)
    assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))
    torch.testing.assert_close(method.segment(query, seen), method(query, support, masks), rtol=1e-4, atol=1e-6)
    first = method.see(support[:1], masks[:1])
    torch.testing.assert_close(
        method.segment(query, first)[:1], method(query, support, masks)[:1], rtol=1e-4, atol=1e-6
    )


def test_one_step_of_training():
    torch.manual_seed(0)
    method = HSNet(ResNetBackbone("resnet18", "none")).train()
    query, support, masks = images(K=1)
    answer = masks[:, 0].clone()
    answer[:, :8] = 255
    episode = SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=answer)
    with torch.no_grad():
        logits = method(query, support, masks)
    loss = method.loss(episode, LOSS)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks[:, 0].long()), rtol=1e-5, atol=1e-6)
    assert len(method.learned()) == len(list(method.head.parameters()))
    optimizer = torch.optim.Adam(method.learned(), lr=1e-3)
    loss.backward()
    optimizer.step()
    assert method.loss(episode, LOSS) < loss


@torch.no_grad()
def test_stages_of_other_strides_are_refused():
    dilated = random_feats({"layer2": 5, "layer3": 6, "layer4": 7}, {"layer2": 18, "layer3": 18, "layer4": 18}, TINY)
    with pytest.raises(SettingError, match=r"HSNet needs .*strides of 8, 16 and 32"):
        tiny_head()(*dilated)
