"""FECANet beside its golden files and beside a plain second network, with and without feature enhancement (FEM)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import all_methods, from_release
from pmnet.methods.fecanet import FECANet, FECANetHead
from tests.pmnet.methods.dense import DenseGolden, norm, part, random_feats
from tests.pmnet.methods.ruled import assert_near
from tests.pmnet.methods.test_hsnet import LOSS, RESNET50, TINY, images, plain_resize, plain_steps

CHANNELS = {"layer2": 16, "layer3": 32, "layer4": 48}
RESNET = {"layer2": 512, "layer3": 1024, "layer4": 2048}
FEMS = {"layer2": "fem_1", "layer3": "fem_2", "layer4": "fem_3"}
both = pytest.mark.parametrize("fem", [False, True])


@pytest.fixture
def golden(shared, fem):
    name = "fecanet" if fem else "fecanet_nofem"
    return DenseGolden(shared / "golden" / "methods" / f"{name}_resnet50_1shot.npz")


def feats(B=2, K=3, seed=0):
    return random_feats(CHANNELS, {"layer2": 18, "layer3": 9, "layer4": 5}, TINY, B, K, seed)


def double(tree):
    return {m: [f.double() for f in fs] for m, fs in tree.items()}


def tiny_head(fem, seed=0):
    """In eval mode, with FEM's norms away from their initial zeros."""
    torch.manual_seed(seed)
    head = FECANetHead(CHANNELS, TINY, fem).eval()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return head


# Golden files


@pytest.mark.slow
@both
def test_logits_loss_and_gradients(golden, fem):
    head = from_release("fecanet", golden.under("weights") | golden.under("buffers")).head
    assert (head.fem, head.training) == (fem, False)
    query, support, masks = golden.features()
    query["history_mask"] = [golden["history_mask"]]
    with torch.no_grad():
        assert_near(head(query, support, masks), golden["logits"], 5e-5 if fem else 1e-5)
        assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(1).bool())
    head, query, support = head.double().train(), double(query), double(support)  # for the ReLUs that are almost at 0
    native = golden["train_logits_native"]
    assert_near(head.segment(query, head.see(support, masks), native.shape[2:]).float(), native, 5e-5)
    loss = head.loss(query, support, masks, golden["query_mask"], lambda x, y: LOSS(x.double(), y))
    assert_near(loss.float(), golden["loss"].float())
    loss.backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    for name, expected in golden.under("grad_norm").items():
        share = 2e-3 if fem and name == "ss.conv.weight" else 1e-4  # such ReLUs in the authors' single precision
        assert_near(norm(gradients[name.removeprefix("hpn_learner.")]), expected, share)
    for name, expected in golden.under("grad").items():
        assert_near(gradients[name.removeprefix("hpn_learner.")].float(), expected, 1e-4)


# A second network: one formula after the other


def plain_context(x, ss):
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    B, _, h, w = x.shape
    neighbours = F.unfold(x, kernel_size=3, padding=1).view(B, -1, 3, 3, h, w)  # rows, columns
    cosines = torch.einsum("bcij,bcyxij->bxyij", x, neighbours).flatten(1, 2)
    wide = F.conv2d(cosines, ss.conv.weight, ss.conv.bias, padding=1).clamp(min=0)
    return torch.cat([cosines, wide, F.conv2d(wide, ss.conv1.weight, ss.conv1.bias, padding=1).clamp(min=0)], dim=1)


def plain_enhancement(q, s, fem):
    def gate(x):
        hidden = F.linear(x.mean((2, 3)), fem.ChannelGate.mlp[1].weight, fem.ChannelGate.mlp[1].bias).clamp(min=0)
        return F.linear(hidden, fem.ChannelGate.mlp[3].weight, fem.ChannelGate.mlp[3].bias).sigmoid()[:, :, None, None]

    def normed(x, block):
        x, bn = block[0](x), block[1]
        of_channel = [t[None, :, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
        mean, var, weight, bias = of_channel
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    key, query = fem.key(s).flatten(2), fem.query(q).flatten(2)
    values_q, values_s = fem.common_v(q).flatten(2), fem.common_v(s).flatten(2)
    A = torch.einsum("bcs,bcq->bsq", key, query)
    new_s = torch.einsum("bsq,bcq->bcs", A.softmax(2), values_s).view(*values_s.shape[:2], *s.shape[2:])
    new_q = torch.einsum("bqs,bcs->bcq", A.transpose(1, 2).softmax(2), values_q).view(*values_q.shape[:2], *q.shape[2:])
    return normed(new_q, fem.Trans_q) * gate(q) + q, normed(new_s, fem.Trans_s) * gate(s) + s


def plain_network(head, query, support, mask_BHW, history=None):
    """Logits by one support; features (B, C, h, w)."""
    stacks = {}
    for m in ("layer4", "layer3", "layer2"):
        q, s = query[m][-1].clamp(min=0), support[m][-1].clamp(min=0)
        s = s * F.interpolate(mask_BHW[:, None], s.shape[-2:], mode="bilinear", align_corners=True)
        if head.fem:
            q, s = plain_enhancement(q, s, getattr(head, FEMS[m]))
        pairs = [*zip(query[m], support[m], strict=True), (plain_context(q, head.ss), plain_context(s, head.ss))]
        units = [[f / (f.norm(dim=1, keepdim=True) + 1e-5) for f in pair] for pair in pairs]
        stacks[m] = torch.stack([torch.einsum("bcij,bckl->bijkl", *pair).clamp(min=0) for pair in units], dim=1)
    s4, s3, s2 = (plain_steps(stack, getattr(head, f"encoder_{m}")) for m, stack in stacks.items())
    x = plain_steps(plain_resize(s4, s3.shape[2:4]) + s3, head.encoder_layer4to3)
    x = plain_steps(plain_resize(x, s2.shape[2:4]) + s2, head.encoder_layer3to2)
    e = x.mean(dim=(4, 5))
    if history is None:
        history = torch.zeros(len(e), 2, *e.shape[2:]).to(e)
    r = torch.cat([e, F.interpolate(history, e.shape[2:], mode="bilinear", align_corners=True)], dim=1)
    for block in (head.residule1, head.residule2, head.residule3):
        r = e + block[3](block[1](r.clamp(min=0)).clamp(min=0))
    x = head.decoder1(r)
    x = F.interpolate(x, (2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=True)
    return F.interpolate(head.decoder2(x), mask_BHW.shape[1:], mode="bilinear", align_corners=True)


@pytest.mark.slow
@both
@torch.no_grad()
def test_several_shots_vote_as_published(fem):
    head = tiny_head(fem).double()
    query, support, masks = feats(B=2, K=3)
    query, support = double(query), double(support)
    history = 10 * torch.rand(2, 2, 7, 7, dtype=torch.float64)
    remembered = {**query, "history_mask": [history]}

    def alone(k):
        return plain_network(head, query, part(support, slice(None), k), masks[:, k].double(), history)

    head.decoder2[2].bias[0] += alone(0).diff(dim=1).quantile(0.5)  # so that both classes occur
    logits = [alone(k) for k in range(3)]
    first = part(support, slice(None), slice(0, 1)), masks[:, :1]
    torch.testing.assert_close(head(remembered, *first), logits[0])
    torch.testing.assert_close(head({**query, "history_mask": history}, *first), logits[0])
    without = plain_network(head, query, part(support, slice(None), 0), masks[:, 0].double())
    torch.testing.assert_close(head(query, *first), without)
    assert (without - logits[0]).abs().max() > 1e-4
    found, votes = head.predict(remembered, support, masks), sum(x.argmax(1) for x in logits)
    for b in range(2):
        assert torch.equal(found[b], votes[b] / max(1, int(votes[b].max())) >= 0.5)
    assert torch.equal(head.predict(remembered, *first), logits[0].argmax(1).bool())


@torch.no_grad()
def test_enhancement_changes_nothing_at_first():
    torch.manual_seed(0)
    head = FECANetHead(CHANNELS, TINY, fem=True).eval()
    query, support, masks = feats(K=1)
    expected = head(query, support, masks)
    head.fem = False
    torch.testing.assert_close(head(query, support, masks), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_enhancement_of_supports_of_another_size_is_refused():
    query, support, masks = feats(K=1)
    larger = {m: [F.interpolate(f, scale_factor=2) for f in fs] for m, fs in query.items()}
    with pytest.raises(SettingError, match="takes supports of the query's size"):
        tiny_head(fem=True).segment(larger, tiny_head(fem=True).see(support, masks), (48, 48))
    head = tiny_head(fem=False)
    assert head.segment(larger, head.see(support, masks), (60, 70)).shape == (2, 2, 60, 70)


def test_batchnorm_of_the_enhancement_takes_the_whole_batch(monkeypatch):
    monkeypatch.setattr("pmnet.methods.votes.POSITIONS_ON_CPU", 1)
    head = tiny_head(fem=True).train()
    query, support, masks = feats(B=3, K=1)
    before = head.fem_1.Trans_q[1].num_batches_tracked.clone()
    head(query, support, masks)
    assert head.fem_1.Trans_q[1].num_batches_tracked == before + 1


# Parameters and checkpoints


def test_parameters_as_measured():
    head = FECANetHead(RESNET, RESNET50)
    assert sum(p.numel() for p in head.parameters()) == 3_547_778
    assert sum(p.numel() for p in head.ss.parameters()) == 84_288
    assert sum(p.numel() for p in FECANetHead(RESNET, RESNET50, fem=True).parameters()) == 18_029_154


def release(head):
    """The head's tensors under the names of the authors' program."""
    state = {f"{'' if n.startswith(('ss.', 'fem_')) else 'hpn_learner.'}{n}": v for n, v in head.state_dict().items()}
    return state | {"backbone.layer1.0.conv1.weight": torch.zeros(1)}


@both
def test_enhancement_is_as_the_checkpoint_says_unless_told_otherwise(fem):
    state = {f"module.{name}": value for name, value in release(tiny_head(fem)).items()}
    head = from_release("fecanet", state)
    assert head.fem == fem
    assert all(torch.equal(v, head.state_dict()[k]) for k, v in tiny_head(fem).state_dict().items())
    assert not from_release("fecanet", state, fem=False).fem
    if not fem:
        with pytest.raises(CheckpointError, match=r"fem_1\.key\.weight"):
            from_release("fecanet", state, fem=True)


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("ss.conv1.bias"), "missing .*ss.conv1.bias"),
        (lambda s: s.pop("fem_2.Trans_s.1.running_mean"), "missing .*fem_2.Trans_s.1.running_mean"),
        (lambda s: s.update({"hpn_learner.residule4.1.bias": torch.zeros(1)}), "unknown .*residule4.1.bias"),
        (lambda s: s.update({"hpn_learner.residule1.1.bias": torch.zeros(3)}), "another shape .*residule1.1.bias"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    state = release(tiny_head(fem=True))
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("fecanet", state)


# Method


@both
@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_on_images_of_any_side(K, fem):
    torch.manual_seed(0)
    method = FECANet(SmallBackbone("none"), fem=fem).eval()
    assert all_methods()["fecanet"] is FECANet
    query, support, masks = images(K=K, H=76, W=85)
    seen = method.see(support, masks)
    assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))
    logits = method(query, support, masks)
    torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-6)
    first = method.see(support[:1], masks[:1])
    torch.testing.assert_close(method.segment(query, first)[:1], logits[:1], rtol=1e-4, atol=1e-6)
    assert torch.equal(method.predict(query, support.flip(1), masks.flip(1)), method.predict(query, support, masks))


def episode(names=("a", "b"), K=1):
    query, support, masks = images(K=K)
    answer = masks[:, 0].clone()
    answer[:, :8] = 255
    spec = [SimpleNamespace(query=name, class_id=3) for name in names]
    return SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=answer, spec=spec)


@both
def test_one_step_of_training(fem):
    torch.manual_seed(0)
    method = FECANet(ResNetBackbone("resnet18", "none"), fem=fem).train()
    batch = episode()
    with torch.no_grad():
        logits = method(batch.query, batch.support, batch.support_masks)
    loss = method.loss(batch, LOSS)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.support_masks[:, 0].long()), rtol=1e-5, atol=1e-6)
    assert len(method.learned()) == len(list(method.head.parameters()))
    optimizer = torch.optim.Adam(method.learned(), lr=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in method.learned())
    optimizer.step()
    assert method.loss(batch, LOSS) < loss
    assert not any("memory" in name for name in method.saved())


@both
def test_several_shots_in_training_answer_alone(fem):
    """As for the methods that also vote at test: votes have no gradient. The last answer is remembered."""
    torch.manual_seed(0)
    method = FECANet(SmallBackbone("none"), fem=fem).train()
    batch = episode(K=2)
    alone = []
    for k in range(2):
        shot = {"support": batch.support[:, k : k + 1], "support_masks": batch.support_masks[:, k : k + 1]}
        method.memory.clear()
        alone.append(method.loss(SimpleNamespace(**{**vars(batch), **shot}), LOSS))
    last = dict(method.memory)
    method.memory.clear()
    loss = method.loss(batch, LOSS)
    torch.testing.assert_close(loss, (alone[0] + alone[1]) / 2)
    assert not torch.equal(alone[0], alone[1])
    for key, share in last.items():
        torch.testing.assert_close(method.memory[key], share, rtol=0, atol=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in method.learned())


def test_last_answers_are_remembered_by_query_and_class_and_given_at_random():
    torch.manual_seed(0)
    method = FECANet(ResNetBackbone("resnet18", "none"), recall=1.0).train()
    batch = episode()
    assert not method.recalled(batch, (18, 22)).any()
    method.loss(batch, LOSS)
    with torch.no_grad():
        feats = method.features(batch.query, batch.support, batch.support_masks)
        native = method.head.segment(feats[0], method.head.see(feats[1], batch.support_masks), (18, 22))
    found = method.recalled(batch, (18, 22))
    torch.testing.assert_close(found, native.softmax(1), rtol=0, atol=1e-3)  # kept in half precision
    feats[0]["history_mask"] = [found]
    again = method.head.loss(*feats, batch.support_masks, batch.support_masks[:, 0], LOSS)
    torch.testing.assert_close(method.loss(batch, LOSS), again)

    other = episode(names=("b", "c"))
    found_other = method.recalled(other, (9, 11))
    assert found_other.shape == (2, 2, 9, 11)
    assert found_other[0].any()
    assert not found_other[1].any()
    other.spec[0].class_id = 4
    assert not method.recalled(other, (9, 11)).any()

    method.recall = 0.3
    given = [bool(method.recalled(batch, (2, 2))[b].any()) for _ in range(500) for b in range(2)]
    assert abs(sum(given) / 1000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1000)


@torch.no_grad()
def test_stages_of_other_strides_are_refused():
    dilated = random_feats(CHANNELS, {"layer2": 18, "layer3": 18, "layer4": 18}, TINY)
    with pytest.raises(SettingError, match="strides of 8, 16 and 32"):
        tiny_head(fem=False)(*dilated)
