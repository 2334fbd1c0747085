"""PATNet beside its golden files, beside matrices that transform features, and beside a plain loop of its tuning."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.backbones.vgg import VGGBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import all_methods, from_release
from pmnet.methods.correlation import correlation
from pmnet.methods.hsnet import HSNetHead
from pmnet.methods.patnet import ANCHORS, PATNet, PATNetHead, divergence
from pmnet.methods.votes import each
from tests.pmnet.methods.dense import DenseGolden, norm, part, random_feats
from tests.pmnet.methods.ruled import assert_near
from tests.pmnet.methods.test_hsnet import LOSS, RESNET50, TINY, images, plain_network

CHANNELS = {"layer2": 5, "layer3": 6, "layer4": 7}
RESNET = {"layer2": 512, "layer3": 1024, "layer4": 2048}


@pytest.fixture
def golden(shared):
    return DenseGolden(shared / "golden" / "methods" / "patnet_resnet50_1shot.npz")


@pytest.fixture
def tfi(shared):
    return DenseGolden(shared / "golden" / "methods" / "patnet_resnet50_tfi.npz")


def feats(B=2, K=3, seed=0):
    return random_feats(CHANNELS, {"layer2": 12, "layer3": 6, "layer4": 3}, TINY, B, K, seed)


def double(tree):
    return {m: [f.double() for f in fs] for m, fs in tree.items()}


def tiny_head(**options):
    torch.manual_seed(0)
    return PATNetHead(CHANNELS, TINY, **options).eval()


# Golden files


def test_logits_loss_and_gradients(golden):
    head = from_release("patnet", golden.under("weights")).head
    assert not head.training
    query, support, masks = golden.features()
    with torch.no_grad():
        shot = each(head.see(support, masks), lambda x: x[:, 0])
        of_query, of_support = head.units(query, shot)
        assert_near(correlation(of_query["layer4"], of_support["layer4"]), golden["correlation_layer4"])
        assert_near(head(query, support, masks), golden["logits"])
        assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(1).bool())
    loss = head.train().loss(query, support, masks, golden["query_mask"], LOSS)
    assert_near(loss, golden["loss"].float())
    loss.backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    for name, expected in golden.under("grad_norm").items():
        assert_near(norm(gradients[name.removeprefix("hpn_learner.")]), expected, 1e-4)
    for name, expected in golden.under("grad").items():
        assert_near(gradients[name], expected, 1e-4)
    assert not any(gradients[name].any() for name in golden.file["unused_parameters"])


def test_loss_of_the_tuning(golden):
    query, support, masks = golden.features()
    seen = from_release("patnet", golden.under("weights")).see(support, masks)
    found = divergence(query["layer2"], seen.foreground, golden["query_mask"].float())
    assert_near(found, golden["finetune_kl"].float())


def test_tuning(tfi):
    state = {name: value.clone() for name, value in tfi.under("weights").items()}
    head = from_release("patnet", state, tuning_steps=3)
    query, support, masks = tfi.features()
    with torch.inference_mode():
        assert_near(head(query, support, masks), tfi["logits_tuned"])
        assert torch.equal(head.predict(query, support, masks), tfi["logits_tuned"].argmax(1).bool())
    size, seen = masks.shape[2:], each(head.see(support, masks), torch.Tensor.detach)
    path = head.tuning(query, seen, size)
    for kl, anchors in zip(tfi["kl"], [head.anchors, *path], strict=False):
        assert_near(head.divergence(anchors, query, seen, size), kl.float())
    first = head.divergence(head.anchors, query, seen, size)
    for (stage, anchor), g in zip(
        head.anchors.items(), torch.autograd.grad(first, [*head.anchors.values()]), strict=True
    ):
        assert_near(g, tfi[f"grad/{ANCHORS[stage]}.weight"], 1e-4)
        assert_near(path[-1][stage], tfi[f"tuned/{ANCHORS[stage]}.weight"], 1e-4)
        assert anchor.grad is None
    for name, value in head.state_dict().items():
        assert torch.equal(value, state.get(name, state.get(f"hpn_learner.{name}")))


# As the authors' program computes it: a matrix for each block and sample


def plain_transformed(head, anchors, query, support, mask_BHW):
    """The features of one support (B, C, h, w) and its query, transformed."""
    sides = {"query": {}, "support": {}}
    for m in query:
        rows = []
        R = anchors[m] / (anchors[m].norm(dim=1, keepdim=True) + 1e-6)
        for q, s in zip(query[m], support[m], strict=True):
            soft = F.interpolate(mask_BHW[:, None], s.shape[2:], mode="bilinear", align_corners=True)
            p_f = (s * soft).sum((2, 3)) / (soft.sum((2, 3)) + 1e-6)
            p_b = (s * (1 - soft)).sum((2, 3)) / ((1 - soft).sum((2, 3)) + 1e-6)
            C = torch.stack([p_b, p_f], dim=1)
            C = C / (C.norm(dim=2, keepdim=True) + 1e-6)
            P = torch.linalg.pinv(C) @ R
            rows.append([torch.einsum("bcd,bchw->bdhw", P, x) for x in (q, s * soft)])
        sides["query"][m], sides["support"][m] = (list(x) for x in zip(*rows, strict=True))
    return sides["query"], sides["support"]


def plain(head, anchors, query, support, mask_BHW):
    """Logits by one support."""
    return plain_network(head, *plain_transformed(head, anchors, query, support, mask_BHW), torch.ones_like(mask_BHW))


@torch.no_grad()
def test_several_shots_vote_as_published():
    head = tiny_head().double()
    query, support, masks = feats(B=2, K=4)
    query, support = double(query), double(support)

    def alone(k):
        return plain(head, head.anchors, query, part(support, slice(None), k), masks[:, k].double())

    head.decoder2[2].bias[0] += alone(0).diff(dim=1).quantile(0.5)  # so that both classes occur
    logits = [alone(k) for k in range(4)]
    torch.testing.assert_close(head(query, part(support, slice(None), slice(0, 1)), masks[:, :1]), logits[0])
    for K in (1, 2, 3, 4):
        found = head.predict(query, part(support, slice(None), slice(0, K)), masks[:, :K])
        votes = sum(x.argmax(1) for x in logits[:K])
        for b in range(2):
            expected = votes[b] if K == 1 else votes[b] / max(1, int(votes[b].max())) >= 0.5
            assert torch.equal(found[b], expected.bool())


@torch.no_grad()
@pytest.mark.parametrize("value", [0, 1])
def test_masks_of_one_side_alone(value):
    """Of a zero prototype there is no inverse; that of the other one is left."""
    head = tiny_head().double()
    query, support, masks = feats(K=1)
    query, support, masks = double(query), double(support), torch.full_like(masks, value)
    expected = plain(head, head.anchors, query, part(support, slice(None), 0), masks[:, 0].double())
    torch.testing.assert_close(head(query, support, masks), expected)


def test_prototypes_that_are_nearly_alike_keep_their_digits():
    head = tiny_head()
    query, support, masks = feats(K=1)
    support = {m: [0.02 * f + torch.ones_like(f) for f in fs] for m, fs in support.items()}  # cosines above 0.999
    expected = head.double()(double(query), double(support), masks)
    torch.testing.assert_close(head.float()(query, support, masks).double(), expected, rtol=2e-3, atol=1e-4)


# Tuning


def plain_tuning(head, query, support, masks, steps, lr):
    """Of one episode: Adam by its formulas."""
    anchors = {m: a.detach().clone() for m, a in head.anchors.items()}
    moments = {m: [torch.zeros_like(a), torch.zeros_like(a)] for m, a in anchors.items()}
    K = masks.shape[1]
    for t in range(1, steps + 1):
        anchors = {m: a.detach().requires_grad_() for m, a in anchors.items()}
        shots = [(part(support, slice(None), k), masks[:, k].double()) for k in range(K)]
        soft = sum(plain(head, anchors, query, *shot).softmax(1)[:, 1] for shot in shots) / K
        kl = 0
        for shot, mask in shots:
            for q, s in zip(query["layer2"], shot["layer2"], strict=True):
                of_query, of_support = (
                    F.interpolate(m[:, None], q.shape[2:], mode="bilinear", align_corners=True) for m in (soft, mask)
                )
                p_q = ((q * of_query).sum((2, 3)) / (of_query.sum((2, 3)) + 1e-6)).softmax(1)
                p_s = ((s * of_support).sum((2, 3)) / (of_support.sum((2, 3)) + 1e-6)).softmax(1)
                kl = kl + (p_s * (p_s.log() - p_q.log())).sum() / K
        gradients = torch.autograd.grad(kl, list(anchors.values()))
        for (m, a), g in zip(list(anchors.items()), gradients, strict=True):
            first, second = moments[m]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            anchors[m] = a.detach() - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return anchors


@pytest.mark.slow
def test_each_episode_is_tuned_alone_and_nothing_is_left_of_it():
    head = tiny_head(tuning_steps=3, tuning_lr=0.05).double()
    state = {name: value.clone() for name, value in head.state_dict().items()}
    query, support, masks = feats(B=2, K=2)
    query, support = double(query), double(support)
    with torch.inference_mode():
        seen = head.see(support, masks)
        tuned = head.tuned(query, seen, (48, 48))
        answers = head.answers(query, seen, (48, 48))
    for b in range(2):
        one = slice(b, b + 1)
        anchors = plain_tuning(head, part(query, one), part(support, one), masks[one], 3, 0.05)
        for m, anchor in anchors.items():
            R = anchor / (anchor.norm(dim=1, keepdim=True) + 1e-6)
            torch.testing.assert_close(tuned.products[m][b], (R @ R.T).expand(2, 2, 2))
        for k in range(2):
            with torch.no_grad():
                logits = plain(head, anchors, part(query, one), part(support, one, k), masks[one, k].double())
            torch.testing.assert_close(answers[b, k], logits[0])
    assert all(p.grad is None for p in head.parameters())
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
def test_answers_do_not_depend_on_the_batch_and_differ_from_those_without_tuning():
    head = tiny_head(tuning_steps=2, tuning_lr=0.05)
    query, support, masks = feats(B=3, K=2)
    together = head.answers(query, head.see(support, masks), (48, 48))
    for b in range(3):
        one = slice(b, b + 1)
        alone = head.answers(part(query, one), head.see(part(support, one), masks[one]), (48, 48))
        torch.testing.assert_close(alone[0], together[b], rtol=1e-4, atol=1e-5)
    untuned = HSNetHead.answers(head.train(), query, head.see(support, masks), (48, 48))
    assert (untuned - together).abs().max() > 1e-3
    assert torch.equal(head.answers(query, head.see(support, masks), (48, 48)), untuned), "no tuning while training"


# Parameters and checkpoints


def test_parameters_as_measured_and_initial_anchors():
    torch.manual_seed(0)
    head = PATNetHead(RESNET, RESNET50)
    assert sum(p.numel() for p in head.parameters()) == 2_580_968
    for m, anchors in head.anchors.items():
        assert abs(float(anchors.detach().std()) * RESNET[m] ** 0.5 - 1) < 0.1


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("reference_layer2.weight"), "no anchors, 'reference_layer2.weight'"),
        (lambda s: s.pop("reference_layer1.bias"), "missing .*reference_layer1.bias"),
        (lambda s: s.update({"hpn_learner.decoder3.bias": torch.zeros(1)}), "unknown .*decoder3.bias"),
        (lambda s: s.update({"hpn_learner.decoder2.2.bias": torch.zeros(3)}), "another shape .*decoder2.2.bias"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    own = tiny_head().state_dict()
    state = {f"module.{'' if name.startswith('ref') else 'hpn_learner.'}{name}": v for name, v in own.items()}
    state["module.backbone.layer1.0.conv1.weight"] = torch.zeros(1)
    assert all(torch.equal(v, own[name]) for name, v in from_release("patnet", state).state_dict().items())
    state = {name.removeprefix("module."): value for name, value in state.items()}
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("patnet", state)


# Method


@pytest.mark.slow
@pytest.mark.parametrize("K, steps", [(1, 0), (3, 0), (2, 2)])
def test_method_on_images_of_any_side(K, steps):
    torch.manual_seed(0)
    method = PATNet(SmallBackbone("none"), tuning_steps=steps).eval()
    assert all_methods()["patnet"] is PATNet
    assert bool(method.tuned_on) == bool(steps)
    query, support, masks = images(K=K, H=76, W=85)
    with torch.inference_mode():
        seen = method.see(support, masks)
        assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))
        logits = method(query, support, masks)
        torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-5)
        first = method.see(support[:1], masks[:1])
        torch.testing.assert_close(method.segment(query, first)[:1], logits[:1], rtol=1e-4, atol=1e-5)


def test_one_step_of_training():
    torch.manual_seed(0)
    method = PATNet(ResNetBackbone("resnet18", "none"), tuning_steps=2).train()
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
    assert all(p.grad is not None for p in method.learned())
    optimizer.step()
    assert method.loss(episode, LOSS) < loss


def test_backbone_of_other_strides_is_refused_by_the_name_of_this_method():
    message = r"PATNet needs a backbone with strides of 8, 16, 32 in layer2, layer3, layer4; vgg16 has 4, 8, 8"
    with pytest.raises(SettingError, match=message):
        PATNet(VGGBackbone("none"))
