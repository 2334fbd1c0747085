"""RePRI beside the authors' program, and beside its formulas written position by position."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmnet.methods
from pmnet.backbones import SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods.repri import RePRI, RePRIHead, Seen, from_release, mean, terms, tokens, tuned
from tests.pmnet.methods.ruled import Golden, assert_near


@pytest.fixture(scope="module")
def golden(request):
    path = request.config.rootpath.parent / "shared/golden/methods/repri_resnet50_1shot.npz"
    if not path.is_file():
        pytest.skip("the reference data (../shared) is not here")
    return Golden(path)


@pytest.fixture(scope="module")
def weights(golden):
    return golden.weights()


def bottleneck(golden):
    return ({"bottleneck": golden.features(whose)["bottleneck"]} for whose in ("query", "support"))


# The authors' program


def test_features_are_the_authors(golden, weights):
    head = pmnet.methods.from_release("repri", {f"module.{name}": tensor for name, tensor in weights.items()})
    assert not head.training
    with torch.no_grad():
        assert_near(
            head.feature({"layer4": golden.features("query")["layer4"]}), golden["bottleneck/query_from_layer4"]
        )


@pytest.mark.parametrize("part", ["", "with_ignore/"])
def test_every_step_of_the_tuning_is_the_authors(golden, weights, part):
    head, (query, support) = from_release(weights), bottleneck(golden)
    valid = torch.ones(2, 169)
    if part:  # positions whose query label is 255 are left out
        valid = F.interpolate((golden["query_mask"] != 255).float()[:, None], (13, 13), mode="nearest").flatten(1)
    with torch.inference_mode():
        seen, query_BQC = head.see(support, golden["support_masks"]), tokens(query["bottleneck"][0])
        path = tuned(query_BQC, seen, 49, 9, 0.025, valid)
    for step, name in ((0, "{}_0"), (9, "{}_before_pi_update"), (49, "{}")):
        assert_near(path[step].weight, golden[part + name.format("prototype")])
        assert_near(path[step].bias, golden[part + name.format("bias")])
    answers = [classifier.probabilities(query_BQC) for classifier in path]
    first, second = mean(answers[0], valid), mean(answers[9], valid)
    assert_near(first, golden[f"{part}pi_0"])
    assert_near(second, golden[f"{part}pi_1"])
    losses = [
        terms(
            answers[step],
            valid,
            second if step >= 9 else first,
            path[step].probabilities(seen.feature.flatten(1, 2)),
            seen.foreground.flatten(1),
        )
        for step in range(49)
    ]
    for i, value in enumerate(zip(*losses, strict=True)):
        assert_near(torch.stack(value), golden[f"{part}losses"][:, i])
    assert_near(
        (path[-1].logits(query_BQC) + path[-1].bias[:, None]).view(2, 1, 13, 13), golden[f"{part}cosine_logits"]
    )


@pytest.mark.slow
def test_answer_is_the_authors_whatever_the_mode(golden, weights):
    head, (query, support) = from_release(weights), bottleneck(golden)
    masks, expected = golden["support_masks"], golden["probability"]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            logits = head(query, support, masks)
            assert not logits.requires_grad
            assert_near(logits.softmax(dim=1), expected)
            assert torch.equal(head.predict(query, support, masks), expected[:, 1] > 0.5)
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.slow
def test_training_is_the_authors(golden, weights, tmp_path):
    """The backbone reads its part of the authors' file."""
    torch.save(weights, tmp_path / "theirs.pth")
    method = RePRI(DilatedResNetBackbone("resnet50s", str(tmp_path / "theirs.pth")), base_classes=15)
    method.head = from_release(weights)
    images = torch.cat([golden["query"], golden["support"].flatten(0, 1)])
    loss = method.eval().base_loss(images, golden["train/targets"])
    assert_near(loss.detach(), golden["train/loss"])
    loss.backward()
    theirs = {
        "layer0.0.weight": "backbone.trunk.conv1.0.weight",
        "layer4.2.conv2.weight": "backbone.trunk.layer4.2.conv2.weight",
        "ppm.features.0.1.weight": "head.pyramid.0.1.weight",
        "bottleneck.0.weight": "head.bottleneck.0.weight",
        "classifier.weight": "head.classifier.weight",
    }
    norms = golden.under("train/grad_norm")
    assert norms.keys() == theirs.keys()
    for name, norm in norms.items():
        assert_near(method.get_parameter(theirs[name]).grad.norm(), norm, 1e-4)
    method.train()
    without_dropout(method)
    with torch.no_grad():
        loss = method.base_loss(images, golden["train/targets"])
    assert_near(loss, golden["train/loss_batch_statistics"], 1e-4)


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0


def test_parameters_are_as_many_as_the_authors():
    method = RePRI(DilatedResNetBackbone("resnet50s", "none"), base_classes=15)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.head.named_children()}
    assert counts["pyramid"] + counts["bottleneck"] == 23_073_792
    assert counts["classifier"] == 8_208
    assert sum(p.numel() for p in method.learned()) == 46_713_808


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("ppm.features.0.1.weight"), "no convolution"),
        (lambda state: state.pop("bottleneck.1.bias"), r"missing \['bottleneck.1.bias'\]"),
        (lambda state: state.update({"decoder.weight": torch.zeros(1)}), r"unknown \['decoder.weight'\]"),
        (lambda state: state.update({"classifier.bias": torch.zeros(3)}), r"another shape \['classifier.bias'\]"),
    ],
)
def test_other_checkpoints_are_refused(change, message):
    state = RePRIHead({"layer4": 8}, base_classes=3).state_dict()
    state = {name.replace("pyramid", "ppm.features"): tensor for name, tensor in state.items()}
    assert isinstance(from_release(state), RePRIHead)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        from_release(state)


# The formulas


def plain_tuned(query, support, foreground, steps, estimate_after, lr):
    """One episode, position by position: query [C], support [[C]] a shot, foreground [[bool]]."""
    K = len(support)
    flat = [f for shot in support for f in shot]
    truth = [bool(t) for shot in foreground for t in shot]
    objects = [f for f, t in zip(flat, truth, strict=True) if t]
    w = sum(objects) / (len(objects) + 1e-10)
    cosine = lambda f, w: 20 * (f @ w) / (w.norm() * f.norm() + 1e-10)  # noqa: E731
    b = sum(cosine(f, w) for f in query) / len(query)
    for step in range(1, steps + 1):
        w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
        p = [torch.sigmoid(cosine(f, w) - b) for f in query]
        m = [sum(1 - x for x in p) / len(p), sum(p) / len(p)]
        if step in (1, estimate_after + 1):
            pi = [x.detach() for x in m]
        right = []
        for f, t in zip(flat, truth, strict=True):
            x = torch.sigmoid(cosine(f, w) - b)
            right.append(x if t else 1 - x)
        ce = -sum(torch.log(x + 1e-10) for x in right) / len(right)
        entropy = -sum(x * torch.log(x + 1e-10) + (1 - x) * torch.log(1 - x + 1e-10) for x in p) / len(p)
        kl = sum(a * torch.log(a / (c + 1e-10)) for a, c in zip(m, pi, strict=True))
        l2 = 1 / K + (1 if step > estimate_after else 0)
        (ce + l2 * kl + entropy / K).backward()
        w, b = w - lr * w.grad, b - lr * b.grad
    return w.detach(), b.detach()


def example(B=2, K=3, C=4, h=3, w=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, C, h, w, generator=random, dtype=torch.float64)
    support = torch.randn(B, K, C, h, w, generator=random, dtype=torch.float64)
    masks = torch.rand(B, K, h, w, generator=random) < 0.4
    return query, support, masks


def plain_unit(f):
    return f / f.norm()


def test_tuning_is_the_plain_formula():
    query, support, masks = example()
    head = RePRIHead({"layer4": 4}, base_classes=1, steps=13, estimate_after=5, lr=0.3).eval()
    seen = head.see({"bottleneck": [support]}, masks)
    found = tuned(tokens(query), seen, 13, 5, 0.3)[-1]
    for e in range(2):
        positions = [plain_unit(query[e, :, i, j]) for i in range(3) for j in range(3)]
        shots = [[plain_unit(support[e, k, :, i, j]) for i in range(3) for j in range(3)] for k in range(3)]
        w, b = plain_tuned(positions, shots, masks[e].flatten(1).tolist(), 13, 5, 0.3)
        torch.testing.assert_close(found.weight[e], w, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.bias[e], b, rtol=1e-9, atol=1e-9)


def test_estimate_is_never_renewed_where_there_are_fewer_steps():
    query, support, masks = example()
    seen = RePRIHead({"layer4": 4}, base_classes=1).eval().see({"bottleneck": [support]}, masks)
    few, fewer = (tuned(tokens(query), seen, 9, after, 0.025)[-1] for after in (15, 9))
    assert torch.equal(few.weight, fewer.weight)


def test_an_episode_does_not_depend_on_its_batch_nor_on_the_order_of_shots():
    query, support, masks = example(B=3)
    head = RePRIHead({"layer4": 4}, base_classes=1).eval()
    together = head({"bottleneck": [query]}, {"bottleneck": [support]}, masks)
    for e in range(3):
        alone = head(*({"bottleneck": [x[e : e + 1]]} for x in (query, support)), masks[e : e + 1])
        torch.testing.assert_close(alone[0], together[e], rtol=1e-9, atol=1e-9)
    other = head({"bottleneck": [query]}, {"bottleneck": [support.flip(1)]}, masks.flip(1))
    torch.testing.assert_close(other, together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0, 1])
def test_supports_of_one_side_alone_give_finite_logits(value):
    query, support, masks = example()
    head = RePRIHead({"layer4": 4}, base_classes=1).eval()
    masks = torch.full_like(masks, value)
    assert head({"bottleneck": [query]}, {"bottleneck": [support]}, masks).isfinite().all()


def test_low_precision_outside_does_not_reach_the_tuning():
    query, support, masks = (x.float() if x.is_floating_point() else x for x in example())
    head = RePRIHead({"layer4": 4}, base_classes=1).eval()
    expected = head({"bottleneck": [query]}, {"bottleneck": [support]}, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head({"bottleneck": [query]}, {"bottleneck": [support]}, masks), expected)


def test_smoothed_loss_is_the_plain_formula():
    """0.9 for the true class, 0.1 divided among the others, no pixel marked 255."""
    torch.manual_seed(0)
    method = RePRI(SmallBackbone("none"), base_classes=4).eval()
    images, labels = torch.rand(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    labels[:, 40:] = 255
    with torch.no_grad():
        logits = method.head.classify(method.backbone(images, {"layer4": "last"}), (64, 64))
        log_p = logits.log_softmax(dim=1).movedim(1, 3)[labels != 255]
        target = torch.full_like(log_p, 0.1 / 4)
        target[torch.arange(len(target)), labels[labels != 255].long()] = 0.9
        torch.testing.assert_close(method.base_loss(images, labels), -(target * log_p).sum(dim=1).mean())
        assert method.base_loss(images, torch.full_like(labels, 255)) == 0


# The whole method


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return RePRI(SmallBackbone("quickstart"), base_classes=2).eval()


def images_of(K, B=2, side=72):
    random = torch.Generator().manual_seed(K)
    images = torch.randint(0, 256, (B, K + 1, 3, side, side), generator=random, dtype=torch.uint8)
    masks = torch.zeros(B, K, side, side, dtype=torch.uint8)
    masks[..., 10:40, 20:60] = 1
    return images[:, 0], images[:, 1:], masks


@pytest.mark.parametrize("K", [1, 3])
def test_method_segments_by_supports_seen_before(method, K):
    query, support, masks = images_of(K)
    with torch.inference_mode():
        logits = method(query, support, masks)
        assert logits.shape == (2, 2, 72, 72)
        found = method.predict(query, support, masks)
        assert torch.equal(found, logits[:, 1] > 0)
        seen = method.see(support, masks)
        torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-3)
        one = method.see(support[:1], masks[:1])  # for both queries, each tuned for itself
        both = method.segment(query, one)
    torch.testing.assert_close(both[:1], logits[:1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both[1:], method.segment(query[1:], one), rtol=1e-4, atol=1e-3)
    assert isinstance(seen, Seen)


def test_training_on_base_classes_lowers_the_loss_and_moves_the_backbone():
    torch.manual_seed(0)
    method = RePRI(SmallBackbone("quickstart"), base_classes=2).train()
    query, _, masks = images_of(1, B=4)
    labels = masks[:, 0] * 2
    labels[:, :8] = 255
    before = {name: tensor.clone() for name, tensor in method.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(method.learned(), lr=0.01, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(method.base_loss(query, labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = method.backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before), "all of the backbone is trained, its statistics too"
    assert method.saved() == set(method.state_dict())


def test_episodes_are_refused_in_training_and_tuning_is_declared(method):
    with pytest.raises(SettingError, match="does not train on episodes"):
        method.loss(None, F.cross_entropy)
    assert "query without" in method.tuned_on
