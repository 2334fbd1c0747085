"""CyCTR beside the authors' program, and its parts beside plain formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmnet.methods
import pmnet.methods.cyctr
from datamodules import Episode
from datamodules.episodes.episode import EpisodeSpec
from pmnet.backbones import SmallBackbone, SwinBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.backbones.vit import ViTBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods.cyctr import (
    CyCTR,
    CyCTRHead,
    DeformableAttention,
    Seen,
    SGDAndAdamW,
    WeightedDice,
    consistent,
    from_release,
    object_flags,
    poly,
    sample,
    sine_code,
)
from pmnet.methods.pfenet import prior_mask
from tests.pmnet.methods.ruled import Golden, assert_near, ruled


@pytest.fixture(scope="module")
def golden(request):
    path = request.config.rootpath.parent / "shared/golden/methods/cyctr_resnet50_1shot.npz"
    if not path.is_file():
        pytest.skip("the reference data (../shared) is not here")
    return Golden(path)


@pytest.fixture(scope="module")
def weights(golden):
    """By the rule, some of them scaled."""
    state = {}
    for name, (shape, total, first) in golden.checksums.items():
        scale = 1 / 16 if name.startswith("adjust_feature") else 0.25 if "sampling_offsets" in name else 1
        state[name] = torch.from_numpy((ruled(name, tuple(shape)) * np.float32(scale)).astype(np.float32))
        np.testing.assert_allclose(state[name].double().sum(), total, rtol=1e-6, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(float(state[name].flatten()[0]), first, rtol=1e-6, err_msg=name)
    return state


def features(golden):
    query = golden.features("query") | {"query_padding": [golden["query_padding"]]}
    support = golden.features("support") | {"support_padding": [golden["support_padding"]]}
    return query, support, golden["support_masks"]


def without_randomness(head, monkeypatch):
    monkeypatch.setattr(pmnet.methods.cyctr, "DROPOUT", 0.0)
    for part in head.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0
    return head


# The authors' program


@torch.no_grad()
def test_every_step_is_the_authors(golden, weights):
    head = pmnet.methods.from_release("cyctr", {f"module.{name}": tensor for name, tensor in weights.items()})
    found = {}
    for name in ("self_attention", "cross_attention"):
        for i, attention in enumerate(getattr(head.transformer, name)):
            attention.register_forward_hook(lambda _, inputs, out, key=f"{name}_{i}": found.update({key: out}))
    head.transformer.register_forward_hook(
        lambda _, inputs, out: found.update(transformer_query=inputs[0], transformer_output=out)
    )
    query, support, masks = features(golden)
    assert_near(head(query, support, masks), golden["logits"])
    for key, value in found.items():
        assert_near(value, golden[key])
    assert len(found) == 6
    prior = prior_mask(query["layer4"][-1], head.see(support, masks).deep)
    assert_near(prior, golden["prior"], 3e-5)
    assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(dim=1).bool())


@torch.no_grad()
def test_whole_network_is_the_authors(golden, weights, tmp_path):
    """From the images; the backbone reads its part of the authors' file."""
    torch.save(weights, tmp_path / "theirs.pth")
    backbone = DilatedResNetBackbone("resnet50s", str(tmp_path / "theirs.pth"), dilation="torchvision")
    method = CyCTR(backbone).eval()
    method.head = from_release(weights)
    feats = method.features(golden["query"], golden["support"], golden["support_masks"])
    paddings = ({"padding": [golden[f"{whose}_padding"]]} for whose in ("query", "support"))
    query, support = (f | padding for f, padding in zip(feats, paddings, strict=True))
    assert_near(method.head(query, support, golden["support_masks"]), golden["logits_full"], 1e-4)


def test_training_step_is_the_authors(golden, weights, monkeypatch):
    head = without_randomness(from_release(weights).train(), monkeypatch)
    loss = head.loss(*features(golden), golden["query_mask"], WeightedDice())
    assert_near(loss.detach(), golden["train/main_loss"] + golden["train/aux_loss"])
    loss.backward()
    names = {
        "adjust_feature_qry.0.weight": "of_query.0.weight",
        "adjust_feature_supp.0.weight": "of_support.0.weight",
        "transformer.cross_layers.0.q_fc.weight": "transformer.cross_attention.0.q_fc.weight",
        "transformer.qry_self_layers.0.sampling_offsets.weight": "transformer.self_attention.0.sampling_offsets.weight",
        "supp_init_merge.0.weight": "back.merge.0.weight",
        "cls.3.weight": "answer.3.weight",
    }
    for name, norm in golden.under("train/grad_norm").items():
        assert_near(head.get_parameter(names[name]).grad.norm(), norm, 1e-4)


@pytest.mark.parametrize("width, learnable", [(256, 7_456_692), (384, 16_183_180)])
def test_parameters_are_as_many_as_the_authors(width, learnable):
    """But for the two layers `addtional_proj`, which their program never uses."""
    head = CyCTRHead({"layer2": 512, "layer3": 1024}, width)
    assert sum(p.numel() for p in head.parameters()) == learnable - 2 * width**2
    if width == 256:
        in_training = sum(p.numel() for p in head.back.parameters())
        assert sum(p.numel() for p in head.parameters()) - in_training == 5_359_026


def test_other_checkpoints_are_refused(weights):
    head = {name: t for name, t in weights.items() if not name.startswith("backbone")}
    with pytest.raises(CheckpointError, match=r"CyCTR.* missing \['transformer.level'\]"):
        from_release({name: t for name, t in head.items() if "level_embed" not in name})
    with pytest.raises(CheckpointError, match=r"unknown \['transformer.other'\]"):
        from_release(head | {"transformer.other": torch.zeros(1)})


# Sampling


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("objects, others", [(3, 20), (20, 3), (20, 20), (3, 4)])
def test_sampling_is_the_plain_rule(objects, others, corrected, monkeypatch):
    """With a known order; 5 of each side are wanted."""
    foreground = torch.zeros(objects + others, dtype=torch.bool)
    foreground[torch.randperm(objects + others)[:objects]] = True
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n - 1, -1, -1))
    places, looked_up = sample(foreground, 5, None, corrected)
    sides = [i for i, fg in enumerate(foreground) if fg], [i for i, fg in enumerate(foreground) if not fg]
    if objects < 5:
        ranks = [*range(objects)], [*range(others - 1, -1, -1)][: 10 - objects]
    elif others < 5:
        ranks = [*range(objects - 1, -1, -1)][: 10 - others], [*range(others)]
    else:
        ranks = [*range(objects - 1, -1, -1)][:5], [*range(others - 1, -1, -1)][:5]
    chosen = [[side[r] for r in rank] for side, rank in zip(sides, ranks, strict=True)]
    assert places.tolist() == chosen[0] + chosen[1]
    whole = (objects < 5, others < 5 <= objects)
    released = [c if all_of_it else r for c, r, all_of_it in zip(chosen, ranks, whole, strict=True)]
    assert looked_up.tolist() == (places.tolist() if corrected else released[0] + released[1])


def test_order_of_sampling_is_of_no_account_where_all_positions_are_taken(golden, weights):
    """So the file, made with an order of its own, tests any; and one that is not the corrected program's."""
    query, support, masks = features(golden)
    with torch.no_grad():
        assert_near(from_release(weights, seed=5)(query, support, masks), golden["logits"])
        corrected = from_release(weights, corrected=True)(query, support, masks)
    assert (corrected - golden["logits"]).abs().max() > 1e-2 * golden["logits"].abs().max()


@pytest.fixture(scope="module")
def sampling():
    """Maps of more positions than are sampled."""
    torch.manual_seed(0)
    head = CyCTRHead({"layer2": 4, "layer3": 8}, width=8).eval()

    def maps(*axes):
        return {f"layer{i}": [torch.randn(*axes, 2**i, 26, 26)] for i in (2, 3, 4)}

    masks = torch.zeros(3, 1, 201, 201, dtype=torch.uint8)
    masks[0, :, :60, :60], masks[1, :, :, :150], masks[2, :, :, 100:] = 1, 1, 1  # few, many, and about half are object
    return head, maps(3), maps(3, 1), masks


@torch.no_grad()
def test_sampling_is_repeatable_and_belongs_to_the_episode(sampling):
    head, query, support, masks = sampling
    before = torch.get_rng_state()
    together = head(query, support, masks)
    assert torch.equal(head(query, support, masks), together)
    assert torch.equal(torch.get_rng_state(), before), "the program's own randomness is not touched"
    assert head.see(support, masks).tokens.shape == (3, 600, 8)
    for e in range(3):
        one = slice(e, e + 1)
        parts = ({m: [f[0][one]] for m, f in feats.items()} for feats in (query, support))
        torch.testing.assert_close(head(*parts, masks[one])[0], together[e], rtol=1e-4, atol=1e-5)
    other = CyCTRHead({"layer2": 4, "layer3": 8}, width=8, seed=1).eval()
    other.load_state_dict(head.state_dict())
    assert not torch.allclose(other(query, support, masks), together, atol=1e-5)


def test_tokens_sides_and_padding_are_gathered_by_their_places():
    head = CyCTRHead({"layer2": 4, "layer3": 8}, width=8, corrected=True).eval()
    place, foreground, padded = torch.arange(50.0).expand(2, 50), torch.rand(2, 50) < 0.3, torch.rand(2, 50) < 0.5
    full = Seen(place[:, :, None], foreground, padded, torch.zeros(2, 8), torch.zeros(2, 1, 8, 1, 1))
    seen = head.sampled(full, 20, seed=0)
    for e in range(2):
        places = seen.tokens[e, :, 0].long().tolist()
        assert len(set(places)) == 40
        assert torch.equal(seen.foreground[e], foreground[e, places])
        assert torch.equal(seen.padded[e], padded[e, places])


def test_training_samples_anew_in_each_layer(sampling, monkeypatch):
    head, query, support, masks = sampling
    sizes = []
    for attention in head.transformer.cross_attention:
        hook = attention.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[1].tokens.shape[1]))
    monkeypatch.setattr(pmnet.methods.cyctr, "SAMPLED", 30)
    torch.manual_seed(0)
    head.train()
    try:
        for _ in range(12):
            head(query, support, masks)
    finally:
        head.eval()
        hook.remove()
    assert len(set(sizes)) > 6
    assert min(sizes) >= 2 * int(30 * 0.6)
    assert max(sizes) <= 2 * int(30 * 4.0)


def test_object_flags_are_never_all_of_one_kind():
    masks = torch.zeros(1, 3, 5, 6, dtype=torch.bool)
    masks[0, 1] = True
    masks[0, 2, 0, 0] = True
    none, full, some = object_flags(masks)[0]
    assert none.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert (~full).nonzero().tolist() == [[0, 0], [0, 5], [4, 0], [4, 5]]
    assert some.nonzero().tolist() == [[0, 0]]


# Attention


def test_consistent_tokens_come_back_to_their_side():
    score, foreground = torch.randn(2, 3, 7, 9), torch.rand(2, 9) < 0.5
    found = consistent(score, foreground)
    for b in range(2):
        for head in range(3):
            s = score[b, head].tolist()
            for j in range(9):
                i = max(range(7), key=lambda i: s[i][j])
                back = max(range(9), key=lambda k: s[i][k])
                assert bool(found[b, head, j]) == bool(foreground[b, j] == foreground[b, back])


def plain_read(value, x, y):
    """Bilinear, pixel centres at half places, zero outside; value (C, h, w), x and y in pixels."""
    h, w = value.shape[1:]
    total = torch.zeros(value.shape[0], dtype=value.dtype)
    column, row = math.floor(x - 0.5), math.floor(y - 0.5)
    for i in (row, row + 1):
        for j in (column, column + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(y - 0.5 - i)) * (1 - abs(x - 0.5 - j)) * value[:, i, j]
    return total


@torch.no_grad()
def test_deformable_attention_is_the_plain_formula():
    torch.manual_seed(0)
    attention, (h, w) = DeformableAttention(8).double().eval(), (3, 4)
    for parameter in attention.parameters():
        parameter.normal_()
    q, value, padded = torch.randn(1, 12, 8).double(), torch.randn(1, 12, 8).double(), torch.zeros(1, 12).bool()
    padded[0, 5] = True
    found = attention(q, value, (h, w), padded)[0]
    values = attention.value_proj(value)[0]
    values[5] = 0
    maps = values.T.view(8, 1, h, w)  # eight heads of one channel
    offsets = attention.sampling_offsets(q).view(12, 8, 9, 2)
    scores = attention.attention_weights(q).view(12, 8, 9)
    for n in range(12):
        row, column = divmod(n, w)
        read = []
        for head in range(8):
            share = scores[n, head].exp() / scores[n, head].exp().sum()
            points = [
                plain_read(maps[head], column + 0.5 + float(dx), row + 0.5 + float(dy)) for dx, dy in offsets[n, head]
            ]
            read.append(sum(s * p for s, p in zip(share, points, strict=True)))
        torch.testing.assert_close(found[n], attention.output_proj(torch.cat(read)), rtol=1e-9, atol=1e-9)


def test_first_offsets_are_rings_of_nine_steps():
    offsets = DeformableAttention(256).sampling_offsets.bias.view(8, 9, 2)
    assert offsets[0].tolist() == [[s, 0.0] for s in range(1, 10)]  # to the right
    torch.testing.assert_close(offsets[1], torch.tensor([[s, s] for s in range(1, 10)]).float())
    torch.testing.assert_close(offsets.abs().amax(dim=2), torch.arange(1.0, 10.0).expand(8, 9))


def test_sine_code_is_the_plain_formula():
    valid = torch.ones(1, 3, 4).bool()
    valid[0, 2], valid[0, :, 3] = False, False
    code = sine_code(valid, torch.zeros(1, 8, 3, 4).double())[0]
    for i in range(2):
        for j in range(3):
            for c in range(8):
                place = (i + 1) / (2 + 1e-6) if c < 4 else (j + 1) / (3 + 1e-6)
                angle = 2 * math.pi * place / 10000 ** (2 * (c % 4 // 2) / 4)
                expected = math.sin(angle) if c % 2 == 0 else math.cos(angle)
                assert float(code[c, i, j]) == pytest.approx(expected, abs=1e-6)


# Training


def test_dice_is_the_plain_formula():
    logits, masks = torch.randn(3, 2, 5, 5), torch.randint(0, 2, (3, 5, 5))
    masks[:, 0] = 255
    total = 0.0
    for b in range(3):
        for side in (0, 1):
            s, t = logits[b, side].sigmoid(), (masks[b] == side).float()
            total += float(1 - 2 * (s * t).sum() / max((s**2).sum() + (t**2).sum(), 1e-8))
    assert float(WeightedDice()(logits, masks)) == pytest.approx(total / 3, rel=1e-5)


def groups_of(head):
    inside = {id(p) for p in head.transformer.parameters()}
    biases = {id(p) for name, p in head.transformer.named_parameters() if name.endswith("bias")}
    others = [p for p in head.parameters() if id(p) not in inside]
    return others, [p for p in head.transformer.parameters() if id(p) not in biases], biases


def test_one_optimiser_steps_as_two_and_resumes():
    """Beside torch's own two; half-way its state goes through a checkpoint."""
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
    adamw = {"adamw_lr": 0.01, "adamw_weight_decay": 0.01}

    def build():
        torch.manual_seed(0)
        return CyCTR(SmallBackbone("none"), width=8)

    one, two = build(), build()
    others, weights, biases = groups_of(two.head)
    plain = [p for p in two.head.transformer.parameters() if id(p) in biases]
    sgd = torch.optim.SGD(others, **options)
    pair = torch.optim.AdamW([{"params": weights}, {"params": plain, "weight_decay": 0.0}], lr=0.01, weight_decay=0.01)
    together = SGDAndAdamW(one.learned(), **options, **adamw)
    schedule, falls = poly(together, epochs=8), torch.optim.lr_scheduler.PolynomialLR(sgd, 8, 0.9)
    for step in range(6):
        if step == 3:
            state = together.state_dict()
            together = SGDAndAdamW(one.learned(), **options, **adamw)
            schedule_state = schedule.state_dict()
            schedule = poly(together, epochs=8)
            together.load_state_dict(state)
            schedule.load_state_dict(schedule_state)
        for p, q in zip(one.head.parameters(), two.head.parameters(), strict=True):
            p.grad = torch.full_like(p, 0.1 * step) + p.detach()
            q.grad = torch.full_like(q, 0.1 * step) + q.detach()
        for optimizer in (together, sgd, pair, schedule, falls):
            optimizer.step()
        rates = {group["adamw"]: group["lr"] for group in together.param_groups}
        assert rates[True] == 0.01
        assert rates[False] == pytest.approx(sgd.param_groups[0]["lr"])
    for p, q in zip(one.head.parameters(), two.head.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# The whole method


def episode_of(K, B=2, side=73):
    random = torch.Generator().manual_seed(K)
    images = torch.randint(0, 256, (B, K + 1, 3, side, side), generator=random, dtype=torch.uint8)
    masks = torch.zeros(B, K + 1, side, side, dtype=torch.uint8)
    masks[..., 10:40, 20:60] = 1
    masks[:, 0, :4] = 255
    ids, spec = torch.arange(B), [EpisodeSpec("a", ("b",) * K, 0)] * B
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], ids, ids, spec)


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_segments_by_supports_seen_before(K):
    torch.manual_seed(0)
    method, episode = CyCTR(SmallBackbone("quickstart"), width=64).eval(), episode_of(K)
    images = episode.query, episode.support, episode.support_masks
    logits = method(*images)
    assert logits.shape == (2, 2, 73, 73)
    assert torch.equal(method.predict(*images), logits.argmax(dim=1).bool())
    assert_near(method.segment(episode.query, method.see(*images[1:])), logits, 1e-4)
    one = method.see(episode.support[:1], episode.support_masks[:1])
    assert_near(method.segment(episode.query, one)[:1], logits[:1], 1e-4)


@torch.no_grad()
def test_order_of_shots_is_of_no_account_for_the_corrected_program():
    """Where all positions are taken; the released one looks sides up at places that depend on the order."""
    torch.manual_seed(0)
    method, episode = CyCTR(SmallBackbone("quickstart"), width=64, corrected=True).eval(), episode_of(3)
    logits = method(episode.query, episode.support, episode.support_masks)
    flipped = method(episode.query, episode.support.flip(1), episode.support_masks.flip(1))
    assert_near(flipped, logits, 1e-4)


@pytest.mark.parametrize("K", [1, 2])
def test_training_lowers_the_loss_and_uses_every_parameter(K):
    torch.manual_seed(0)
    method, episode = CyCTR(SmallBackbone("quickstart"), width=64).train(), episode_of(K)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
    optimizer = SGDAndAdamW(method.learned(), **options, adamw_lr=1e-3, adamw_weight_decay=0.01)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(method.loss(episode, WeightedDice()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    still = {name for name, p in method.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith("backbone.")}


def test_other_sides_and_widths_are_refused():
    episode = episode_of(1, side=64)
    method = CyCTR(SmallBackbone("none"), width=8)
    with pytest.raises(SettingError, match=r"CyCTR takes image sides of 8n \+ 1, such as 473 or 385, not 64x64"):
        method.predict(episode.query, episode.support, episode.support_masks)
    with pytest.raises(SettingError, match=r"model.width=20 is no multiple of 8"):
        CyCTR(SmallBackbone("none"), width=20)


@pytest.mark.slow
def test_backbone_that_takes_none_of_its_sides_is_refused():
    """A Swin transformer takes multiples of its patch, 4; with a ViT, which takes any side, it works."""
    with pytest.raises(SettingError, match=r"CyCTR takes image sides of 8n \+ 1.*swin_b multiples of 4: no side suits"):
        CyCTR(SwinBackbone("none"), width=8)
    episode = episode_of(1, side=65)
    method = CyCTR(ViTBackbone("dinov2_small", "none"), width=8).eval()
    assert method.predict(episode.query, episode.support, episode.support_masks).shape == (2, 65, 65)


def test_ignored_pixels_are_on_neither_side_of_the_dice():
    logits, masks = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    masks[:, 2:] = 255
    swapped = F.pad(masks[:, :2], (0, 0, 0, 2), value=254)
    assert WeightedDice()(logits, masks) == WeightedDice()(logits, swapped)
