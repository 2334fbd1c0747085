"""DCAMA beside its golden file and beside a plain second network."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import dcama, from_release
from pmnet.methods.dcama import DCAMA, Attended, DCAMAHead, conv3_of_enlarged, kept
from tests.pmnet.methods.dense import DenseGolden, norm, part, random_feats
from tests.pmnet.methods.ruled import assert_near

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)
CHANNELS, BLOCKS = (
    {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    {"layer2": 4, "layer3": 6, "layer4": 3},
)
TINY_CHANNELS = {"layer1": 8, "layer2": 24, "layer3": 16, "layer4": 32}
TINY = {"layer1": 1, "layer2": 2, "layer3": 3, "layer4": 1}


@pytest.fixture
def golden(shared):
    return DenseGolden(shared / "golden" / "methods" / "dcama_resnet50_1shot.npz")


def feats(B=2, K=3, seed=0):
    return random_feats(TINY_CHANNELS, {"layer1": 12, "layer2": 6, "layer3": 3, "layer4": 2}, TINY, B, K, seed)


def tiny_head(seed=0):
    torch.manual_seed(seed)
    head = DCAMAHead(TINY_CHANNELS, TINY).eval()
    for attention in head.DCAMA_blocks:  # no longer the same, and no longer nearly uniform
        for linear in attention.linears:
            torch.nn.init.normal_(linear.weight, std=0.5)
    return head


# Golden file


def test_logits_loss_and_gradients(golden):
    head = from_release("dcama", golden.under("weights")).head
    assert not head.training
    query, support, masks = golden.features()
    with torch.no_grad():
        assert_near(head(query, support, masks), golden["logits"])
        assert torch.equal(head.predict(query, support, masks), golden["pred"].bool())
    loss = head.loss(query, support, masks, golden["query_mask"], LOSS)
    assert_near(loss, golden["loss"].float())
    loss.backward()
    gradients = {f"model.{name}": p.grad for name, p in head.named_parameters()}
    for name, expected in golden.under("grad_norm").items():
        assert_near(norm(gradients[name]), expected, 1e-4)
    for name, expected in golden.under("grad").items():
        assert_near(gradients[name], expected, 1e-4)


# A second network, of one episode: all scores at once, shots joined in a loop, nothing split


def plain_network(head, query, support, masks_KHW):
    """Logits; features (C, h, w) of the query, (K, C, h, w) of the supports."""

    def tokens(feature, linear):
        C, N = feature.shape[0], feature[0].numel()
        x = feature.flatten(1).T.clone()
        for t in range(N):
            for c in range(0, C, 2):
                angle = t * math.exp(-c * math.log(10000) / C)
                x[t, c] += math.sin(angle)
                x[t, c + 1] += math.cos(angle)
        return linear(x).unflatten(1, (8, C // 8))

    K = len(masks_KHW)
    coarse = {}
    for m, attention in zip(("layer2", "layer3", "layer4"), head.DCAMA_blocks, strict=True):
        out = []
        for q, s in zip(query[m], support[m], strict=True):
            size = q.shape[1:]
            values = [F.interpolate(mask[None, None], size, mode="bilinear", align_corners=True) for mask in masks_KHW]
            keys = torch.cat([tokens(s[k], attention.linears[1]) for k in range(K)])
            scores = torch.einsum("qad,sad->aqs", tokens(q, attention.linears[0]), keys) / math.sqrt(keys.shape[2])
            values = torch.cat([v.flatten() for v in values])
            out.append((scores.softmax(dim=2) @ values).mean(dim=0).reshape(size))
        coarse[m] = torch.stack(out)[None]

    def up(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    def twice(x):
        return up(x, (2 * x.shape[2], 2 * x.shape[3]))

    m4, m3, m2 = head.conv1(coarse["layer4"]), head.conv2(coarse["layer3"]), head.conv3(coarse["layer2"])
    x = head.conv4(up(m4, m3.shape[2:]) + m3)
    x = head.conv5(up(x, m2.shape[2:]) + m2)
    skip = {m: (query[m][-1][None], support[m][-1].amax(0)[None]) for m in ("layer1", "layer2")}
    x = torch.cat([twice(torch.cat([x, *skip["layer2"]], dim=1)), *skip["layer1"]], dim=1)
    return head.mixer3(twice(head.mixer2(twice(head.mixer1(x)))))


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("scores", [2**20, 100, 1])
def test_network_is_the_plain_one(K, scores, monkeypatch):
    monkeypatch.setattr(dcama, "SCORES_ON_CPU", scores)  # in one portion, in several, in as many as there are rows
    head = tiny_head().double()
    query, support, masks = feats(K=K)
    query, support = ({m: [f.double() for f in fs] for m, fs in feats.items()} for feats in (query, support))
    logits = head(query, support, masks)
    expected = torch.cat(
        [
            plain_network(
                head, *({m: [f[b] for f in fs] for m, fs in x.items()} for x in (query, support)), masks[b].double()
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(logits, expected)
    parameters = list(head.parameters())
    found, wanted = (torch.autograd.grad(x.square().sum(), parameters) for x in (logits, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # position codes are of single precision
    mask = head.predict(query, support, masks)
    assert torch.equal(mask, expected.argmax(1).bool())


@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.9])
def test_attention_in_portions_with_the_same_dropout_in_its_gradient(dropout, monkeypatch):
    monkeypatch.setattr(dcama, "SCORES_ON_CPU", 20)
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, *n, generator=random, dtype=torch.float64) for n in ((7, 3), (5, 3), (5,)))
    share = (query @ key.mT).softmax(dim=2)
    if dropout:  # portions of four rows
        parts = [(n, q) for n in range(2) for q in (slice(0, 4), slice(4, 7))]
        for i, (n, q) in enumerate(parts):
            share[n, q] *= kept(share[n : n + 1, q], dropout, 3 + i)[0]
    torch.testing.assert_close(Attended.apply(query, key, value, dropout, 3), (share @ value[..., None])[..., 0])
    inputs = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: Attended.apply(q, k, value, dropout, 3), inputs)


def test_dropout_keeps_as_much_as_it_should():
    ones = torch.ones(300, 301)
    for dropout in (0.1, 0.5, 0.75):
        values = kept(ones, dropout, 0)
        assert values.unique().tolist() == pytest.approx([0, 1 / (1 - dropout)])
        assert float(values.mean()) == pytest.approx(1, abs=0.03)
        assert torch.equal(kept(ones, dropout, 0), values)
        assert not torch.equal(kept(ones, dropout, 1), values)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (7, 11), (4, 6)])
def test_convolution_of_an_enlarged_map(size):
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*n, generator=random, dtype=torch.float64) for n in ((2, 3, 4, 6), (5, 3, 3, 3)))
    enlarged = F.interpolate(x, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(conv3_of_enlarged(x, weight, size), F.conv2d(enlarged, weight, padding=1))


@torch.no_grad()
def test_order_of_shots_and_other_episodes_change_nothing():
    head = tiny_head()
    query, support, masks = feats()
    logits = head(query, support, masks)
    turned = {m: [f.flip(1) for f in fs] for m, fs in support.items()}
    torch.testing.assert_close(head(query, turned, masks.flip(1)), logits, rtol=1e-4, atol=1e-5)
    thrice = {m: [f[:, :1].expand(-1, 3, -1, -1, -1) for f in fs] for m, fs in support.items()}
    once = head(query, part(support, slice(None), slice(0, 1)), masks[:, :1])
    torch.testing.assert_close(head(query, thrice, masks[:, :1].expand(-1, 3, -1, -1)), once, rtol=1e-4, atol=1e-5)
    alone = [part(feats, slice(1, 2)) for feats in (query, support)]
    torch.testing.assert_close(head(*alone, masks[1:]), logits[1:], rtol=1e-4, atol=1e-5)


# Parameters and checkpoints


@pytest.mark.parametrize(
    "channels, blocks, parameters",
    [
        (CHANNELS, BLOCKS, 14_215_394),
        (CHANNELS, BLOCKS | {"layer3": 23}, 14_222_194),
        ({m: C // 2 for m, C in CHANNELS.items()}, {"layer2": 2, "layer3": 18, "layer4": 2}, 5_073_394),  # Swin-B
    ],
)
def test_parameters_as_measured(channels, blocks, parameters):
    with torch.device("meta"):
        head = DCAMAHead(channels, blocks)
    assert sum(p.numel() for p in head.parameters()) == parameters
    if blocks == BLOCKS:
        parts = {name: sum(p.numel() for p in module.parameters()) for name, module in head.named_children()}
        assert parts == {
            "DCAMA_blocks": 11_017_216, "conv1": 84_000, "conv2": 85_968, "conv3": 101_552, "conv4": 443_520,
            "conv5": 443_520, "mixer1": 1_990_848, "mixer2": 46_160, "mixer3": 2_610,
        }  # fmt: skip


def test_linears_of_query_and_support_are_the_same_at_first_but_not_shared():
    head = DCAMAHead(TINY_CHANNELS, TINY)
    for attention in head.DCAMA_blocks:
        query, support = attention.linears
        assert torch.equal(query.weight, support.weight)
        assert torch.equal(query.bias, support.bias)
        assert query.weight.data_ptr() != support.weight.data_ptr()


def test_prefixes_backbone_and_position_codes_are_passed_over():
    state = tiny_head().state_dict()
    theirs = {f"module.model.{name}": tensor for name, tensor in state.items()}
    theirs |= {"module.feature_extractor.fc.bias": torch.zeros(1), "module.model.DCAMA_blocks.0.pe.pe": torch.zeros(1)}
    head = from_release("dcama", theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("mixer3.2.bias"), "missing .*mixer3.2.bias"),
        (lambda s: s.update({"conv6.0.weight": torch.zeros(1)}), "unknown .*conv6.0.weight"),
        (lambda s: s.update({"conv4.1.weight": torch.zeros(3)}), "another shape .*conv4.1.weight"),
        (lambda s: s.pop("conv2.0.weight"), "conv2.0.weight"),
        (lambda s: s.update({"DCAMA_blocks.1.linears.0.weight": torch.zeros(7, 7)}), "8 channels"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    state = dict(tiny_head().state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("dcama", state)


# Method


def images(B=2, K=3, H=72, W=88):
    random = torch.Generator().manual_seed(0)
    query, support = (torch.rand(*n, 3, H, W, generator=random) for n in ((B,), (B, K)))
    masks = torch.zeros(B, K, H, W, dtype=torch.uint8)
    masks[..., H // 4 : H // 2, W // 3 :] = 1
    return query, support, masks


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_on_images(K):
    torch.manual_seed(0)
    method = DCAMA(SmallBackbone("none")).eval()
    query, support, masks = images(K=K)
    seen = method.see(support, masks)
    logits = method(query, support, masks)
    assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))
    torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-6)
    first = method.see(support[:1], masks[:1])
    torch.testing.assert_close(method.segment(query, first)[:1], logits[:1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_sides_and_sizes_that_are_not_taken():
    method = DCAMA(SmallBackbone("none")).eval()
    with pytest.raises(SettingError, match="DCAMA takes image sides that are multiples of 8"):
        method(*images(H=76))
    seen = method.see(*images(B=1, K=1)[1:])
    with pytest.raises(SettingError, match="of one size"):
        method.segment(torch.rand(1, 3, 96, 88), seen)
    with pytest.raises(SettingError, match="multiple of 8 channels, not 24, 20, 32"):
        DCAMAHead(TINY_CHANNELS | {"layer3": 20}, TINY)


def test_one_step_of_training():
    torch.manual_seed(0)
    method = DCAMA(ResNetBackbone("resnet18", "none")).train()
    query, support, masks = images(K=1)
    answer = masks[:, 0].clone()
    answer[:, :8] = 255
    episode = SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=answer)
    logits = {}
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        logits[seed] = method(query, support, masks)
    torch.manual_seed(0)
    loss = method.loss(episode, LOSS)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0], masks[:, 0].long()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[0], logits[1])  # dropout
    optimizer = torch.optim.SGD(method.learned(), lr=0.01, momentum=0.9)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.learned())
    optimizer.step()
    with torch.no_grad():
        assert method.eval().loss(episode, LOSS) < loss
