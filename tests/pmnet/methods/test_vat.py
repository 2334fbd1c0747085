"""VAT beside its golden file and beside a plain second network, which is small enough to compute window by window."""

import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import pmnet.methods.vat
from pmnet.backbones import SmallBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.vat import VAT, Encoder, VATHead, WindowBlock
from tests.conftest import ROOT
from tests.pmnet.methods.dense import DenseGolden, norm, part, random_feats
from tests.pmnet.methods.ruled import assert_near

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)
HALF = {"layer1": 64, "layer2": 32, "layer3": 16, "layer4": 8}  # half of the sides inside: a sixteenth of the time
CHANNELS = {"layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
BLOCKS = {"layer1": 1, "layer2": 2, "layer3": 3, "layer4": 1}
RESNET = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
RESNET50 = {"layer2": 4, "layer3": 6, "layer4": 3}
PUBLISHED = {"pascal": ("layer1", "layer2"), "coco": ("layer1",), "fss": ("layer1", "layer2", "layer3")}


@pytest.fixture
def golden(shared):
    return DenseGolden(shared / "golden" / "methods" / "vat_resnet50_1shot.npz")


def feats(B=1, K=1, seed=0):
    query, support, masks = random_feats(
        CHANNELS, {"layer1": 20, "layer2": 12, "layer3": 6, "layer4": 3}, BLOCKS, B, K, seed
    )
    support.pop("layer1")
    return query, support, masks


def tiny_head(appearance=PUBLISHED["pascal"], kind=VATHead, seed=0):
    """In eval mode, with every tensor away from its initial value."""
    torch.manual_seed(seed)
    head = kind(CHANNELS, BLOCKS, appearance).eval()
    head.sides = HALF
    for tensor in head.parameters():
        tensor.data.add_(0.3 * torch.randn_like(tensor) if tensor.ndim == 1 or tensor.shape[1] == 4 else 0)
    head.classify[2].bias.data.zero_()
    return head


# Golden file


@pytest.mark.slow
def test_logits_loss_and_gradients(golden):
    head = from_release("vat", golden.under("weights")).head
    assert not head.training
    query, support, masks = golden.features()
    with torch.no_grad():
        logits = head(query, support, masks)
        assert_near(logits, golden["logits"])
    loss = head.loss(query, support, masks, golden["query_mask"], LOSS)
    assert_near(loss, golden["loss"].float())
    loss.backward()
    own = dict(head.named_parameters())
    gradients = {name: own[pmnet.methods.vat.renamed(name.split(".ours.")[1])].grad for name in golden.under("weights")}
    for name, expected in golden.under("grad_norm").items():
        assert_near(norm(gradients[name]), expected, 1e-4)
    for name, expected in golden.under("grad").items():
        assert_near(gradients[name], expected, 1e-4)
    assert {name for name, g in gradients.items() if not g.any()} == {*golden.file["unused_parameters"]} | {
        f"hpn_learner.ours.proj_query_feat.0.0.{end}" for end in ("weight", "bias")
    }


# A second network: every correlation at once, channels first, window by window


def plain_resize(x, side):
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=True)


def plain_correlation(query, support, mask_BHW, side):
    stack = []
    for q, s in zip(query, support, strict=True):
        q, s = plain_resize(q, side), plain_resize(s, side)
        s = s * plain_resize(mask_BHW[:, None], side)
        q, s = (f / (f.norm(dim=1, keepdim=True) + 1e-5) for f in (q, s))
        stack.append(torch.einsum("bcij,bckl->bijkl", q, s).clamp(min=0))
    return torch.stack(stack, dim=1)


def plain_conv4d(x, step):
    """x: (B, C, hq, wq, hs, ws). One image at a time, at each position of the plane that is passed by."""
    of_query, of_support = step.strides
    pooled = x.unflatten(5, (-1, of_support)).unflatten(4, (-1, of_support)).amax(dim=(5, 7))
    over_query = [[step.query_conv(pooled[..., i, j]) for j in range(pooled.shape[5])] for i in range(pooled.shape[4])]
    pooled = x.unflatten(3, (-1, of_query)).unflatten(2, (-1, of_query)).amax(dim=(3, 5))
    over_support = [
        [step.support_conv(pooled[:, :, i, j]) for j in range(pooled.shape[3])] for i in range(pooled.shape[2])
    ]
    over_query = torch.stack([torch.stack(row, -1) for row in over_query], -2)
    return over_query + torch.stack([torch.stack(row, 2) for row in over_support], 2)


def plain_encoder(x, encoder):
    for step in encoder.steps:
        x = plain_conv4d(x, step)
        x = F.group_norm(x, {32: 2, 64: 4, 128: 8}[x.shape[1]], step.norm.weight, step.norm.bias).clamp(min=0)
    return x


def plain_layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_block(x, block, window, shift):
    """x: (sides..., C), of one sample."""
    sides, axes = x.shape[:-1], x.ndim - 1
    places = list(product(range(window), repeat=axes))
    rows = [[0] * len(places) for _ in places]
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            for a, b in zip(p, q, strict=True):
                rows[i][j] = rows[i][j] * (2 * window - 1) + a - b + window - 1
    bias = block.bias[torch.tensor(rows)]  # (P, P, heads)
    rolled, out = x.roll([-shift] * axes, list(range(axes))), torch.zeros_like(x)
    for corner in product(*(range(0, n, window) for n in sides)):
        at = [tuple(c + d for c, d in zip(corner, p, strict=True)) for p in places]
        regions = [
            tuple(0 if i < n - window else 1 if i < n - shift else 2 for i, n in zip(a, sides, strict=True)) for a in at
        ]
        apart = torch.tensor([[-100.0 if shift and r != s else 0.0 for s in regions] for r in regions]).to(x)
        tokens = torch.stack([rolled[a] for a in at])
        q, k, v = F.linear(plain_layer_norm(tokens, block.norm1), block.qkv.weight, block.qkv.bias).chunk(3, dim=1)
        heads = []
        for h, (qh, kh, vh) in enumerate(zip(*(y.chunk(4, dim=1) for y in (q, k, v)), strict=True)):
            scores = qh @ kh.T / qh.shape[1] ** 0.5 + bias[:, :, h] + apart
            heads.append(scores.softmax(dim=1) @ vh)
        tokens = tokens + F.linear(torch.cat(heads, 1), block.project.weight, block.project.bias)
        hidden = F.gelu(F.linear(plain_layer_norm(tokens, block.norm2), block.mlp[0].weight, block.mlp[0].bias))
        tokens = tokens + F.linear(hidden, block.mlp[2].weight, block.mlp[2].bias)
        for a, token in zip(at, tokens, strict=True):
            out[a] = token
    return out.roll([shift] * axes, list(range(axes)))


def plain_blocks(x_BC, blocks, window):
    x = x_BC.movedim(1, -1)
    samples = []
    for sample in x:
        for i, block in enumerate(blocks):
            sample = plain_block(sample, block, window, shift=window // 2 * (i % 2))
        samples.append(sample)
    return torch.stack(samples).movedim(-1, 1)


def plain_upsampled(x, side):
    planes = [plain_resize(x[..., i, j], side) for i in range(x.shape[4]) for j in range(x.shape[5])]
    return torch.stack(planes, -1).unflatten(-1, x.shape[4:])


def plain_network(head, query, support, mask_BHW, appearance):
    """Logits by one support; features (B, C, h, w)."""
    x = None
    for i, m in enumerate(("layer4", "layer3", "layer2")):
        e = plain_encoder(plain_correlation(query[m], support[m], mask_BHW, HALF[m]), head.encoders[i])
        x = e if x is None else e + plain_upsampled(x, e.shape[2])
        x = x + plain_blocks(x, head.transformers[i].blocks, 4)
    x = x.mean(dim=(4, 5))
    for i, m in enumerate(("layer3", "layer2", "layer1")):
        if m in appearance:
            x = torch.cat([x, F.relu(head.project[i](plain_resize(query[m][-1], HALF[m])))], dim=1)
        refined = plain_blocks(x, head.decoder[i].blocks, 8)
        x = x + plain_layer_norm(refined.movedim(1, -1), head.decoder[i].norm).movedim(-1, 1)
        if m != "layer1":
            x = plain_resize(head.decoder[i].reduce(x), HALF["layer2" if m == "layer3" else "layer1"])
    return F.interpolate(head.classify(x), mask_BHW.shape[1:], mode="bilinear", align_corners=True)


def double(tree):
    return {m: [f.double() for f in fs] for m, fs in tree.items()}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("benchmark", ["coco", "fss"])
def test_one_support_is_the_plain_formula(benchmark):
    head = tiny_head(PUBLISHED[benchmark]).double()
    query, support, masks = feats()
    query, support = double(query), double(support)
    expected = plain_network(head, query, part(support, slice(None), 0), masks[:, 0].double(), PUBLISHED[benchmark])
    torch.testing.assert_close(head(query, support, masks), expected)


@pytest.mark.slow
@torch.no_grad()
def test_several_shots_vote_as_published():
    head = tiny_head().double()
    query, support, masks = feats(K=3)
    query, support = double(query), double(support)

    def alone(k):
        return head(query, part(support, slice(None), slice(k, k + 1)), masks[:, k : k + 1])

    head.classify[2].bias[0] += alone(0).diff(dim=1).quantile(0.5)  # so that both classes occur
    answers = [alone(k).argmax(1) for k in range(3)]
    votes = sum(answers)
    assert set(votes.unique().tolist()) == {0, 1, 2, 3}
    expected = votes / max(1, int(votes.max())) >= 0.5
    assert torch.equal(head.predict(query, support, masks), expected)


def whole(function, at_once, *tensors):
    """In place of `in_parts`: all at once, and nothing is computed a second time on the way back."""
    return function(*tensors)


@pytest.mark.parametrize("kind", ["encoder", "window", "shifted"])
def test_parts_of_a_batch_give_the_same_gradients(monkeypatch, kind):
    torch.manual_seed(0)
    if kind == "encoder":
        module = Encoder(2, (32, 64), ((2, 2), (1, 2))).double()
        inputs = [[torch.randn(3, 5, 8, 8, dtype=torch.float64) for _ in range(2)] for _ in ("query", "support")]
    else:
        module = WindowBlock(16, axes=2, window=4, shift=2 if kind == "shifted" else 0).double()
        inputs = [torch.randn(2, 8, 12, 16, dtype=torch.float64, requires_grad=True)]
    monkeypatch.setattr(pmnet.methods.vat, "TOKENS_ON_CPU", 5 * 16)  # five windows at a time
    wanted = [*module.parameters(), *(x for x in inputs if kind != "encoder")]
    found = []
    for in_parts in (pmnet.methods.vat.in_parts, whole):
        monkeypatch.setattr(pmnet.methods.vat, "in_parts", in_parts)
        out = module(*inputs)
        found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_dropout_takes_channels_of_projections_but_those_of_layer1():
    query = feats()[0]
    head = tiny_head(PUBLISHED["fss"])
    whole, dropped = head.see_query(query).appearance, head.train().see_query(query).appearance
    assert torch.equal(whole["layer1"], dropped["layer1"])
    for m in ("layer2", "layer3"):
        kept = dropped[m].flatten(2).any(dim=2)
        assert 0 < kept.float().mean() < 1
        torch.testing.assert_close(dropped[m], 2 * whole[m] * kept[..., None, None])


# Parameters and checkpoints


@pytest.mark.parametrize(
    "benchmark, layer3, parameters",
    [
        ("pascal", 6, 3_180_954), ("coco", 6, 3_006_490), ("fss", 6, 3_680_410),
        ("pascal", 23, 3_200_538), ("coco", 23, 3_026_074), ("fss", 23, 3_699_994),
    ],
)  # fmt: skip
def test_parameters_as_measured(benchmark, layer3, parameters):
    head = VATHead(RESNET, RESNET50 | {"layer3": layer3}, PUBLISHED[benchmark])
    assert sum(p.numel() for p in head.parameters()) == parameters

    def counts(modules):
        return [sum(p.numel() for p in module.parameters()) for module in modules]

    if (benchmark, layer3) == ("pascal", 6):
        assert counts(head.encoders) == [151_680, 155_136, 187_520]
        assert counts(head.transformers) == [831_760, 416_008, 416_008]
        assert counts(head.decoder) == [410_984, 404_792, 101_896]
        assert counts([head.classify, head.project]) == [19_042, 86_128]


def test_sizes_and_appearance_come_from_the_tensors(golden, shared):
    pascal = golden.under("weights")
    fss = DenseGolden(shared / "golden" / "methods" / "vat_hm_resnet50_1shot.npz").under("weights")
    second = {k: v for k, v in pascal.items() if ".swin_decoder.1." in k}
    narrow = {k: torch.zeros([n if n < 128 else 3 * n // 4 for n in v.shape]) for k, v in second.items()}
    narrow = {k: v if "bias_table" not in k else second[k] for k, v in narrow.items()}
    constants = {
        "hpn_learner.ours.transformer.0.transformer.layer.blocks.1.attn_mask": torch.zeros(1),
        "hpn_learner.ours.transformer.0.transformer.layer.blocks.0.attn.relative_position_index": torch.zeros(1),
        "backbone.layer1.0.conv1.weight": torch.zeros(1),
    }
    for benchmark, state in (("pascal", pascal), ("coco", pascal | narrow), ("fss", fss)):
        head = from_release("vat", {f"module.{name}": value for name, value in (state | constants).items()})
        assert set(head.appearance) == set(PUBLISHED[benchmark])
        assert not head.training
        assert len(state) == len(head.state_dict())
        own = sorted((tuple(v.shape), float(v.sum())) for v in head.state_dict().values())
        assert own == sorted((tuple(v.shape), float(v.sum())) for v in state.values())


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("hpn_learner.ours.decoder.2.bias"), "missing .*classify.2.bias"),
        (lambda s: s.update({"hpn_learner.ours.encoders.3.conv4d.0.0.query_conv.bias": torch.zeros(1)}), "encoders.3"),
        (lambda s: s.update({"hpn_learner.ours.decoder.0.bias": torch.zeros(3)}), "another shape .*classify.0.bias"),
        (lambda s: s.pop("hpn_learner.ours.proj_query_feat.0.0.weight"), "project.0.weight"),
        (lambda s: s.update({"classifier.weight": torch.zeros(3)}), "unknown .*classifier.weight"),
    ],
)
def test_tensors_of_something_else_are_refused(golden, change, names):
    state = golden.under("weights")
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("vat", state)


def test_appearance_without_layer1_is_refused():
    for appearance in ((), ("layer2",), ("layer1", "layer4")):
        with pytest.raises(SettingError, match="takes layer1, and optionally layer2 and layer3"):
            VATHead(CHANNELS, BLOCKS, appearance)


# Method


def tiny_method(kind=VAT):
    torch.manual_seed(0)
    method = kind(SmallBackbone("none")).eval()
    method.head.sides = HALF
    return method


def images(B=2, K=3, H=72, W=88):
    random = torch.Generator().manual_seed(0)
    query, support = (torch.rand(*n, 3, H, W, generator=random) for n in ((B,), (B, K)))
    masks = torch.zeros(B, K, H, W, dtype=torch.uint8)
    masks[..., H // 4 : H // 2, W // 3 :] = 1
    return query, support, masks


@pytest.mark.slow
@torch.no_grad()
def test_method_on_images_of_any_side():
    method = tiny_method()
    query, support, masks = images(K=1, H=76, W=85)
    logits = method(query, support, masks)
    first = method.see(support[:1], masks[:1])
    torch.testing.assert_close(method.segment(query, first)[:1], logits[:1], rtol=1e-4, atol=1e-6)
    alone = method(query[1:], support[1:], masks[1:])
    torch.testing.assert_close(alone, logits[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_supports_are_seen_once():
    method = tiny_method()
    query, support, masks = images(B=1, K=3)
    seen = method.see(support, masks)
    assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))


@pytest.mark.slow
def test_one_step_of_training():
    method = tiny_method()
    query, support, masks = images(B=1, K=1)
    answer = masks[:, 0].clone()
    answer[:, :8] = 255
    episode = SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=answer)
    with torch.no_grad():
        logits = method(query, support, masks)
    loss = method.loss(episode, LOSS)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks[:, 0].long()), rtol=1e-5, atol=1e-6)
    assert len(method.learned()) == len(list(method.head.parameters()))
    optimizer = torch.optim.AdamW(method.learned(), lr=5e-4, weight_decay=0)
    loss.backward()
    assert all(p.grad is not None for p in method.learned())
    optimizer.step()
    assert method.loss(episode, LOSS) < loss


STEP = """
import resource, torch
from types import SimpleNamespace
from pmnet.backbones import ResNetBackbone
from pmnet.methods.vat import VAT
torch.set_num_threads(1)
method = VAT(ResNetBackbone("resnet50", "none")).train()
query, support = torch.zeros(4, 3, 473, 473, dtype=torch.uint8), torch.zeros(4, 1, 3, 473, 473, dtype=torch.uint8)
masks = torch.ones(4, 1, 473, 473, dtype=torch.uint8)
episode = SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=masks[:, 0])
method.loss(episode, torch.nn.CrossEntropyLoss()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_four_episodes_of_training_take_less_than_12_gb():
    done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 12
