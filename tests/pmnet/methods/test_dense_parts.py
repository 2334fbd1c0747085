"""What the dense methods share beside plain loops: correlations, 4D convolutions, votes, hybrid masking."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import SmallBackbone
from pmnet.errors import SettingError
from pmnet.methods.base import Method
from pmnet.methods.conv4d import CenterPivotConv4d, building_steps
from pmnet.methods.correlation import correlation, masked, occupied, unit
from pmnet.methods.hybrid import hybrid, masked_pass
from pmnet.methods.votes import VotingHead, vote_share, voted


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Correlations


def test_correlation_is_the_plain_formula():
    query, support = [randn(2, 5, 3, 2, seed=i) for i in (0, 1)], [randn(2, 5, 2, 4, seed=i) for i in (2, 3)]
    support[1][1, :, 0, 2] = 0
    found = correlation([unit(f) for f in query], [unit(f) for f in support])
    assert found.shape == (2, 2, 3, 2, 2, 4)
    for b, block, i, j, k, m in product(*(range(n) for n in found.shape)):
        q, s = query[block][b, :, i, j], support[block][b, :, k, m]
        expected = max(0.0, float(q @ s) / (float(q.norm()) + 1e-5) / (float(s.norm()) + 1e-5))
        assert float(found[b, block, i, j, k, m]) == pytest.approx(expected, abs=1e-12)
    assert (found[1, 1, :, :, 0, 2] == 0).all()


def test_correlation_has_gradients_where_they_are_wanted():
    query, support = [randn(1, 4, 2, 3, seed=i) for i in (0, 1)], [randn(1, 4, 3, 2, seed=i) for i in (2, 3)]
    plain = correlation([unit(f) for f in query], [unit(f) for f in support])
    leaf = support[0].clone().requires_grad_()
    found = correlation([unit(f) for f in query], [unit(leaf), unit(support[1])])
    torch.testing.assert_close(found, plain)
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
    step = 1e-6 * randn(*leaf.shape, seed=4)
    ahead, behind = (
        correlation([unit(f) for f in query], [unit(leaf.detach() + d), unit(support[1])]).square().sum()
        for d in (step, -step)
    )
    torch.testing.assert_close((gradient * step).sum(), (ahead - behind) / 2, rtol=1e-5, atol=1e-14)
    zero = torch.zeros(1, 4, 2, 2, requires_grad=True)
    assert torch.autograd.grad(unit(zero).sum(), zero)[0].isfinite().all()


def test_masks_are_soft_at_the_features_size():
    masks = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    masks[..., 3:] = 1
    found = masked(torch.ones(1, 1, 2, 1, 5, dtype=torch.float64), masks)  # columns 0, 2, 4, 6, 8 of the mask
    assert found.shape == (1, 1, 2, 1, 5)
    assert found[0, 0, 1, 0].tolist() == [0, 0, 1, 1, 1]
    halves = masked(torch.ones(1, 1, 1, 1, 7, dtype=torch.float64), masks)[0, 0, 0, 0]
    torch.testing.assert_close(halves, torch.tensor([0, 0, 2 / 3, 1, 1, 1, 1], dtype=torch.float64))


def test_features_are_zero_outside_of_what_is_occupied():
    masks = torch.zeros(2, 1, 40, 40)
    masks[0, 0, 11:17, 20:30] = masks[1, 0, 13:24, 28:33] = 1
    rows, columns = occupied(masks[:, 0], (10, 13))
    filled = masked(torch.ones(2, 1, 1, 10, 13), masks).sum(dim=(0, 1, 2))
    assert filled[rows, columns].sum() == filled.sum()
    assert filled[rows.start].any()
    assert filled[rows.stop - 1].any()
    assert filled[:, columns.start].any()
    assert filled[:, columns.stop - 1].any()
    assert occupied(torch.zeros(1, 8, 8), (4, 4)) == (slice(0, 1), slice(0, 1))


# 4D convolution


def plain_conv4d(conv, x):
    """Sums over the elements of both kernels, position by position."""
    s, p = conv.stride, conv.reach
    B, _, hq, wq, hs, ws = x.shape
    x = F.pad(x, [p, p] * 4)
    out = x.new_zeros(B, len(conv.bias), hq, wq, -(-hs // s), -(-ws // s))
    for i, j, k, m in product(*(range(n) for n in out.shape[2:])):
        a, b, c, d = i + p, j + p, s * k + p, s * m + p  # the centre
        over_query = x[:, :, a - p : a + p + 1, b - p : b + p + 1, c, d]
        over_support = x[:, :, a, b, c - p : c + p + 1, d - p : d + p + 1]
        out[:, :, i, j, k, m] = (
            torch.einsum("bcij,ocij->bo", over_query, conv.conv1.weight)
            + torch.einsum("bcij,ocij->bo", over_support, conv.conv2.weight)
            + (conv.conv1.bias + conv.conv2.bias)
        )
    return out


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "kernel, stride, plane",
    [(3, 1, (4, 3)), (3, 1, (2, 2)), (3, 1, (1, 2)), (5, 1, (3, 2)), (3, 2, (5, 4)), (5, 4, (9, 6)), (3, 2, (1, 1))],
)
def test_conv4d_is_the_plain_sum(batch, kernel, stride, plane):
    torch.manual_seed(0)
    conv = CenterPivotConv4d(3, 2, kernel, stride).double()
    x = randn(batch, 3, 3, 2, *plane)
    torch.testing.assert_close(conv(x), plain_conv4d(conv, x))
    x = correlation([unit(x[:, :, :, :, 0, 0]) for _ in range(3)], [unit(x[:, :, 0, 0]) for _ in range(3)])
    torch.testing.assert_close(conv(x), plain_conv4d(conv, x))  # as laid out in memory


@pytest.mark.parametrize("stride, plane", [(1, (2, 2)), (2, (5, 4))])
def test_conv4d_has_the_gradients_of_the_plain_sum(stride, plane):
    torch.manual_seed(0)
    conv = CenterPivotConv4d(3, 2, 3, stride).double()
    x = randn(2, 3, 3, 2, *plane).requires_grad_()
    weight = randn(*conv(x).shape, seed=1)
    wanted = [x, *conv.parameters()]
    found = torch.autograd.grad((conv(x) * weight).sum(), wanted)
    expected = torch.autograd.grad((plain_conv4d(conv, x) * weight).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 4), (3, 1), (5, 2)])
def test_a_part_is_enough_where_the_rest_is_zero(kernel, stride):
    torch.manual_seed(0)
    conv, size = CenterPivotConv4d(2, 3, kernel, stride).double(), (14, 11)
    full = randn(2, 2, 3, 3, *size)
    for top, left in product((0, 3, 6, 13), (0, 1, 7, 10)):
        rows, columns = slice(top, min(14, top + 3)), slice(left, min(11, left + 4))
        x = torch.zeros_like(full)
        x[..., rows, columns] = full[..., rows, columns]
        box = conv.box((rows, columns), size)
        found = conv.whole(conv(x[..., box[0], box[1]]), box, size)
        torch.testing.assert_close(found, conv(x))


@torch.no_grad()
def test_building_steps_normalise_each_sample_over_all_four_axes():
    torch.manual_seed(0)
    steps = building_steps((2, 8, 4), kernels=(3, 5), strides=(2, 1)).double()
    assert [name for name, _ in steps.named_parameters()][:6] == [
        "0.conv1.weight", "0.conv1.bias", "0.conv2.weight", "0.conv2.bias", "1.weight", "1.bias",
    ]  # fmt: skip
    assert {name.split(".")[0] for name, _ in steps.named_parameters()} == {"0", "1", "3", "4"}
    x = randn(2, 2, 3, 3, 5, 5)
    expected = x
    for conv, norm in ((steps[0], steps[1]), (steps[3], steps[4])):
        norm.weight.copy_(randn(len(norm.weight)))
        norm.bias.copy_(randn(len(norm.bias), seed=1))
        y = plain_conv4d(conv, expected)
        groups = y.unflatten(1, (4, -1))
        axes = tuple(range(2, groups.ndim))
        var, mean = torch.var_mean(groups, dim=axes, correction=0, keepdim=True)
        normal = ((groups - mean) / (var + 1e-5).sqrt()).flatten(1, 2).movedim(1, -1)
        expected = (normal * norm.weight + norm.bias).movedim(-1, 1).clamp(min=0)
    torch.testing.assert_close(steps(x), expected)


# Votes


def test_votes_are_the_published_rule():
    votes = torch.rand(6, 5, 7, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    votes[0] = False
    votes[1, :, 0, 0] = True
    votes[2] = False
    votes[2, 3, 2, 2] = True
    for K in (1, 2, 3, 5):
        found, share = voted(votes[:, :K]), vote_share(votes[:, :K])
        for b in range(6):
            most = max(1, max(int(votes[b, :K, i, j].sum()) for i in range(7) for j in range(4)))
            for i, j in product(range(7), range(4)):
                v = int(votes[b, :K, i, j].sum())
                assert found[b, i, j].item() is (v == 1 if K == 1 else v / most >= 0.5)
                assert share[b, i, j].item() == pytest.approx(v / most)


class Products(VotingHead):
    """Foreground where the product of query and support is positive."""

    def __init__(self, at_once):
        super().__init__()
        self.at_once, self.runs, self.queries = at_once, [], 0

    def see(self, support_feats, support_masks):
        return {"feature": support_feats["layer3"], "masks": support_masks}

    def see_query(self, query_feats):
        self.queries += 1
        return query_feats["layer3"]

    def pairs(self, query, support, size):
        self.runs.append(len(support["masks"]))
        product = query[0] * support["feature"][0] * support["masks"][:, None]
        return torch.stack([torch.zeros(len(product), *size), product[:, 0].float()], dim=1)

    def positions(self, query):
        return 2**23 // self.at_once if self.at_once else 0


@pytest.mark.parametrize("at_once, runs", [(0, [6]), (1, [1] * 6), (2, [2, 1] * 2), (4, [3, 3]), (50, [6])])
def test_each_support_answers_alone_for_its_own_query(at_once, runs):
    head = Products(at_once)
    query, support = {"layer3": [randn(2, 1, 4, 5)]}, {"layer3": [randn(2, 3, 1, 4, 5, seed=1)]}
    masks = torch.ones(2, 3, 4, 5)
    votes = torch.stack([query["layer3"][0][:, 0] * support["layer3"][0][:, k, 0] > 0 for k in range(3)], dim=1)
    assert torch.equal(head.predict(query, support, masks), voted(votes))
    assert head.runs == runs
    assert head.queries == 1
    shares = head(query, support, masks)
    torch.testing.assert_close(shares, torch.stack([1 - vote_share(votes), vote_share(votes)], dim=1))
    once = {"layer3": [support["layer3"][0][:, :1]]}
    logits = head(query, once, masks[:, :1])
    assert logits.shape == (2, 2, 4, 5)
    assert logits.min() < 0
    assert torch.equal(head.predict(query, once, masks[:, :1]), votes[:, 0])


# Hybrid masking


def test_hybrid_takes_the_masked_image_where_the_masked_feature_is_not_positive():
    whole, inside = randn(1, 2, 3, 4, 5), randn(1, 2, 3, 4, 5, seed=1)
    masks = (randn(1, 2, 16, 20, seed=2) > 0).to(torch.uint8)
    found = hybrid({"layer3": [whole], "layer3_masked": [inside]}, masks)["layer3"][0]
    soft = F.interpolate(masks.double(), (4, 5), mode="bilinear", align_corners=True)
    for b, k, c, i, j in product(*(range(n) for n in found.shape)):
        kept = whole[b, k, c, i, j] * soft[b, k, i, j]
        torch.testing.assert_close(found[b, k, c, i, j], kept if kept > 0 else inside[b, k, c, i, j])
    assert torch.equal(hybrid({"layer3": [whole], "masked_layer3": [inside]}, masks)["layer3"][0], found)
    with pytest.raises(SettingError, match="layer3_masked"):
        hybrid({"layer3": [whole]}, masks)


class Reader(Method):
    query_reads = support_reads = {"layer2": "last", "layer3": "all"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_masked_pass_sees_the_mean_colour_outside_the_mask(dtype):
    backbone = SmallBackbone("none")
    method = Reader(backbone, Products(0))
    images = (torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    normalised = (images / 255 - backbone.mean) / backbone.std
    masks = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    masks[:, :, 8:20, 4:30] = 1
    found = masked_pass(method, images if dtype == torch.uint8 else normalised, masks)
    expected = backbone((normalised * masks[:, :, None]).flatten(0, 1), {"layer2": "last", "layer3": "all"})
    assert {m: len(fs) for m, fs in found.items()} == {"layer2_masked": 1, "layer3_masked": len(expected["layer3"])}
    for m, fs in expected.items():
        for one, other in zip(found[f"{m}_masked"], fs, strict=True):
            torch.testing.assert_close(one.flatten(0, 1), other)


def test_loss_of_a_voting_head_is_that_of_each_supports_own_answer():
    from pmnet.backbones import SmallBackbone
    from pmnet.methods.hsnet import HSNet

    head = HSNet(SmallBackbone("none")).head
    random = torch.Generator().manual_seed(0)
    shapes = {"layer2": (1, 8), "layer3": (2, 4), "layer4": (2, 2)}
    query = {m: [torch.randn(2, 6, s, s, generator=random) for _ in range(n)] for m, (n, s) in shapes.items()}
    support = {m: [torch.randn(2, 3, 6, s, s, generator=random) for _ in range(n)] for m, (n, s) in shapes.items()}
    masks = (torch.rand(2, 3, 64, 64, generator=random) < 0.5).float()
    criterion = torch.nn.CrossEntropyLoss(ignore_index=255)
    loss = head.loss(query, support, masks, masks[:, 0], criterion)
    alone = [
        criterion(head(query, {m: [f[:, k : k + 1] for f in fs] for m, fs in support.items()}, masks[:, k : k + 1]),
                  masks[:, 0].long())
        for k in range(3)
    ]  # fmt: skip
    assert loss.item() == pytest.approx(sum(alone).item() / 3, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in head.parameters())
