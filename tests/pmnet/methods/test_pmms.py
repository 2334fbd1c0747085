"""PMMs, and what RPMMs share with them, beside the authors' program and beside plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmnet.methods
from datamodules import Episode
from datamodules.episodes.episode import EpisodeSpec
from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods.mixture import MixtureBackbone, means, unit, upsampled
from pmnet.methods.pmms import PMMs, PMMsHead, from_release
from tests.pmnet.methods.ruled import Golden, assert_near

CE = nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture(scope="module")
def golden(request):
    path = request.config.rootpath.parent / "shared/golden/methods/pmms_resnet50_1shot.npz"
    if not path.is_file():
        pytest.skip("the reference data (../shared) is not here")
    return Golden(path)


@pytest.fixture(scope="module")
def weights(golden):
    return golden.weights() | {"mu/3": golden["mu/3"]}


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0
    return module


# The authors' program


@torch.no_grad()
def test_head_is_the_authors(golden, weights):
    head = pmnet.methods.from_release("pmms", {f"module.{name}": tensor for name, tensor in weights.items()})
    query, support, masks = golden.features("query"), golden.features("support"), golden["support_masks"]
    seen, embedded = head.see(support, masks), head.embedded(query)
    assert_near(seen.foreground, golden["prototypes_0"], 3e-5)  # in float64 it is 6e-6 from the file: rounding
    assert_near(head.probability_map(embedded, seen), golden["probability_map_0"])
    assert_near(head(query, support, masks), upsampled(golden["output"], (97, 97)))
    assert torch.equal(head.predict(query, support, masks), golden["prediction"].bool())


def test_training_step_is_the_authors(golden, weights):
    """The file's norms have a float32 error of their own: computed in float64 these are 2.5e-4 from them."""
    head = without_dropout(from_release(weights).train())
    feats = golden.features("query"), golden.features("support")
    loss = head.loss(*feats, golden["support_masks"], golden["query_mask"], CE)
    assert_near(loss.detach(), golden["train/loss"])
    loss.backward()
    names = {
        "layer5.0.weight": "embed.0.weight",
        "layer55.0.weight": "match.0.weight",
        "residule1.1.weight": "residual.0.1.weight",
        "layer9.weight": "classify.weight",
    }
    for name, norm in golden.under("train/grad_norm").items():
        assert_near(head.get_parameter(names[name]).grad.norm(), norm, 1e-3)


@torch.no_grad()
def test_whole_network_is_the_authors(golden, weights, tmp_path):
    """From the images; the backbone reads its part of the authors' file."""
    torch.save({name: t for name, t in weights.items() if not name.startswith("mu")}, tmp_path / "theirs.pth")
    method = PMMs(MixtureBackbone("resnet50", str(tmp_path / "theirs.pth"))).eval()
    method.head = from_release(weights)
    logits = method(golden["query"], golden["support"], golden["support_masks"])
    assert_near(logits, upsampled(golden["output_full"], (97, 97)), 1e-4)


def test_parameters_are_as_many_as_the_authors():
    method = PMMs(MixtureBackbone("resnet50", "none"))
    assert sum(p.numel() for p in method.head.parameters()) == 11_086_594
    assert sum(p.numel() for p in method.backbone.parameters()) == 8_543_296
    norms = [m for m in method.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    not_trained = sum(p.numel() for m in norms for p in m.parameters())
    assert sum(p.numel() for p in method.learned()) == 11_086_594 + 8_543_296 - not_trained


def test_start_of_the_mixture_belongs_to_a_seed_and_is_saved(golden, weights):
    del (plain := dict(weights))["mu/3"]
    first, again, other = from_release(plain), from_release(plain), from_release(plain, seed=1)
    assert torch.equal(first.start3, again.start3)
    assert not torch.equal(first.start3, other.start3)
    assert "start3" in first.state_dict()
    torch.testing.assert_close(first.start3.norm(dim=1), torch.ones(3))
    assert torch.equal(from_release(weights).start3, golden["mu/3"][0].T)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("layer5.0.weight"), "no convolution 'layer5.0.weight'"),
        (lambda state: state.pop("layer9.bias"), r"missing \['classify.bias'\]"),
        (lambda state: state.update({"layer99.weight": torch.zeros(1)}), r"unknown \['layer99.weight'\]"),
        (lambda state: state.update({"layer9.bias": torch.zeros(3)}), r"another shape \['classify.bias'\]"),
    ],
)
def test_other_checkpoints_are_refused(weights, change, message):
    state = dict(weights)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        from_release(state)


# The formulas


def plain_means(x, mu):
    """x [[C]] positions, mu [[C]] components; one loop a sum."""
    for _ in range(10):
        z = []
        for f in x:
            e = [math.exp(20 * sum(a * b for a, b in zip(f, m, strict=True))) for m in mu]
            z.append([value / sum(e) for value in e])
        totals = [1e-6 + sum(row[i] for row in z) for i in range(len(mu))]
        mu = [
            [sum(row[i] / totals[i] * f[c] for row, f in zip(z, x, strict=True)) for c in range(len(x[0]))]
            for i in range(len(mu))
        ]
        mu = [[c / (1e-6 + math.sqrt(sum(d * d for d in m))) for c in m] for m in mu]
    return mu


@pytest.mark.parametrize("k", [1, 3])
def test_means_are_the_plain_formula(k):
    random = torch.Generator().manual_seed(k)
    feature = torch.randn(2, 12, 4, generator=random, dtype=torch.float64).relu() / 2
    start = unit(torch.randn(k, 4, generator=random, dtype=torch.float64))
    found = means(feature, start)
    for b in range(2):
        expected = torch.tensor(plain_means(feature[b].tolist(), start.tolist()), dtype=torch.float64)
        torch.testing.assert_close(found[b], expected, rtol=1e-9, atol=1e-9)


def random_head(kind=PMMsHead, seed=0):
    """In float64, and away from its initial values."""
    torch.manual_seed(seed)
    head = kind({"layer2": 4, "layer3": 8}).double().eval()
    for name, tensor in head.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.2)
    return head


def random_inputs(B=2, K=1, side=5, seed=0):
    random = torch.Generator().manual_seed(seed)

    def features(*axes):
        return {f"layer{i}": [torch.randn(*axes, 2**i, side, side, generator=random).double()] for i in (2, 3)}

    return features(B), features(B, K), (torch.rand(B, K, 33, 33, generator=random) < 0.4).to(torch.uint8)


@pytest.mark.parametrize("training", [False, True])
def test_matching_is_the_convolution_of_query_and_prototype_side_by_side(training):
    head = random_head()
    head.match.train(training)
    query, mu = torch.randn(2, 256, 5, 7).double(), unit(torch.randn(2, 3, 256).double())
    with torch.no_grad():
        expected = sum(
            head.match(torch.cat([query, mu[:, i, :, None, None].expand_as(query)], dim=1)) for i in range(3)
        )
        torch.testing.assert_close(head.matched(query, mu), expected, rtol=1e-9, atol=1e-9)


def test_shots_are_one_tall_image():
    """All positions of all supports make the mixture, in any order."""
    head, (query, support, masks) = random_head(), random_inputs(K=3)
    seen = head.see(support, masks)
    embedded = [head.embedded({m: [f[0][:, k]] for m, f in support.items()}) for k in range(3)]
    tall = torch.cat(embedded, dim=2)
    share = torch.cat(
        [F.interpolate(masks[:, k : k + 1].double(), (5, 5), mode="bilinear", align_corners=True) for k in range(3)],
        dim=2,
    )
    for side, weight in ((seen.foreground, share), (seen.background, 1 - share)):
        expected = means((tall * weight).flatten(2).mT, head.start3)
        torch.testing.assert_close(side, expected, rtol=1e-9, atol=1e-9)
    other = head({m: query[m] for m in query}, {m: [f[0].flip(1)] for m, f in support.items()}, masks.flip(1))
    torch.testing.assert_close(other, head(query, support, masks), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("value", [0, 1])
def test_an_episode_does_not_depend_on_its_batch_and_one_side_may_be_empty(value):
    head, (query, support, masks) = random_head(), random_inputs(B=3)
    masks[1] = value
    together = head(query, support, masks)
    assert together.isfinite().all()
    for e in range(3):
        one = slice(e, e + 1)
        alone = head(
            {m: [f[0][one]] for m, f in query.items()}, {m: [f[0][one]] for m, f in support.items()}, masks[one]
        )
        torch.testing.assert_close(alone[0], together[e], rtol=1e-7, atol=1e-7)


def test_no_gradient_passes_through_the_prototypes():
    head, (query, support, masks) = random_head(), random_inputs()
    support = {m: [f[0].requires_grad_()] for m, f in support.items()}
    assert not any(side.requires_grad for side in head.see(support, masks))
    head(query, support, masks).sum().backward()
    assert support["layer2"][0].grad is None
    assert head.embed[0].weight.grad.abs().sum() > 0, "of the query"


# The backbone


def test_strides_are_in_the_first_convolution_and_layer3_is_dilated():
    trunk = MixtureBackbone("resnet50", "none").trunk
    assert trunk.maxpool.ceil_mode
    assert not hasattr(trunk, "layer4")
    assert (trunk.layer2[0].conv1.stride, trunk.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert trunk.layer3[0].conv1.stride == trunk.layer3[0].downsample[0].stride == (1, 1)
    assert all(block.conv2.dilation == block.conv2.padding == (2, 2) for block in trunk.layer3)


@pytest.mark.parametrize("side, position", [(481, 61), (321, 41), (97, 13)])
def test_sides_of_feature_maps_are_the_authors(side, position):
    backbone = MixtureBackbone("resnet50", "none").to("meta")
    features = backbone(torch.zeros(1, 3, side, side, device="meta"), {"layer2": "last", "layer3": "last"})
    assert {tuple(f[0].shape[1:]) for f in features.values()} == {(512, position, position), (1024, position, position)}


def test_weights_of_torchvision_fit_and_small_resnets_are_refused(tmp_path):
    full = ResNetBackbone("resnet50", "none")
    torch.save(full.trunk.state_dict(), tmp_path / "resnet50.pth")
    own = MixtureBackbone("resnet50", str(tmp_path / "resnet50.pth")).trunk.state_dict()
    assert all(torch.equal(own[name], full.trunk.state_dict()[name]) for name in own)
    with pytest.raises(SettingError, match=r"resnet18 has no bottlenecks. Choose resnet50"):
        MixtureBackbone("resnet18", "none")


# The whole method


def episode_of(K=1, B=2, side=72):
    random = torch.Generator().manual_seed(K)
    images = torch.randint(0, 256, (B, K + 1, 3, side, side), generator=random, dtype=torch.uint8)
    masks = torch.zeros(B, K + 1, side, side, dtype=torch.uint8)
    masks[..., 10:40, 20:60] = 1
    masks[:, 0, :4] = 255
    spec = [EpisodeSpec("a", ("b",) * K, 0)] * B
    ids = torch.arange(B)
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], ids, ids, spec)


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return PMMs(SmallBackbone("quickstart")).eval()


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_segments_by_supports_seen_before(method, K):
    episode = episode_of(K)
    images = episode.query, episode.support, episode.support_masks
    logits = method(*images)
    assert logits.shape == (2, 2, 72, 72)
    assert torch.equal(method.predict(*images), logits.argmax(dim=1).bool())
    seen = method.see(*images[1:])
    assert_near(method.segment(episode.query, seen), logits, 1e-4)
    one = method.see(episode.support[:1], episode.support_masks[:1])
    assert_near(method.segment(episode.query, one)[:1], logits[:1], 1e-4)


def test_training_lowers_the_loss_and_moves_the_backbone_but_not_the_weights_of_its_norms():
    torch.manual_seed(0)
    method = without_dropout(PMMs(SmallBackbone("quickstart"), lr=1e-3).train())
    episode = episode_of()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optimizer = torch.optim.SGD(method.learned(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(method.loss(episode, CE))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(before[name], tensor)}
    assert "backbone.trunk.layer1.0.conv1.weight" in moved
    assert "backbone.trunk.layer1.0.bn1.running_mean" in moved
    assert "backbone.trunk.layer1.0.bn1.weight" not in moved
    assert not [name for name in moved if "layer4" in name or "start" in name]
    assert moved <= method.saved()
    assert "head.start3" in method.saved()


def test_new_weights_have_ten_times_the_rate_and_new_biases_twenty_times():
    method = PMMs(SmallBackbone("none"), lr=2.0)
    rates = {id(p): group["lr"] for group in method.learned() for p in group["params"]}
    learned = {name: rates[id(p)] for name, p in method.named_parameters() if p.requires_grad}
    assert len(rates) == len(learned)
    for name, rate in learned.items():
        assert rate == (2.0 if name.startswith("backbone") else 40.0 if name.endswith("bias") else 20.0)
    assert {type(p) for p in PMMs(SmallBackbone("none")).learned()} == {nn.Parameter}


def test_pixels_marked_255_are_background_in_the_loss(method):
    episode = episode_of()
    with torch.no_grad():
        loss = method.loss(episode, CE)
        episode.query_mask[episode.query_mask == 255] = 0
        assert torch.equal(method.loss(episode, CE), loss)
