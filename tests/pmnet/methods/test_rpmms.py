"""RPMMs beside the authors' program and beside three rounds written one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmnet.methods
from datamodules import Episode
from datamodules.episodes.episode import EpisodeSpec
from pmnet.backbones import SmallBackbone
from pmnet.errors import CheckpointError
from pmnet.methods.mixture import MixtureBackbone, upsampled
from pmnet.methods.rpmms import RPMMs, RPMMsHead, from_release
from tests.pmnet.methods.ruled import Golden, assert_near

CE = nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture(scope="module")
def golden(request):
    path = request.config.rootpath.parent / "shared/golden/methods/rpmms_resnet50_1shot.npz"
    if not path.is_file():
        pytest.skip("the reference data (../shared) is not here")
    return Golden(path)


@pytest.fixture(scope="module")
def weights(golden):
    return golden.weights() | {f"mu/{k}": golden[f"mu/{k}"] for k in (1, 3, 6)}


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0
    return module


# The authors' program


@torch.no_grad()
def test_every_round_is_the_authors(golden, weights):
    head = pmnet.methods.from_release("rpmms", weights)
    query, support, masks = golden.features("query"), golden.features("support"), golden["support_masks"]
    seen, embedded = head.see(support, masks), head.embedded(query)
    for i, (prototypes, share) in enumerate(zip(seen.prototypes, (1e-5, 3e-5, 1e-3), strict=True)):
        assert_near(prototypes.foreground, golden[f"prototypes_{i}"], share)  # rounds of a mixture amplify rounding
        assert_near(head.probability_map(embedded, prototypes), golden[f"probability_map_{i}"])
    expected = golden["output_stage_0"], golden["output_stage_1"], golden["output"]
    for logits, theirs in zip(head.rounds(query, seen), expected, strict=True):
        assert_near(logits, theirs)
    assert_near(head(query, support, masks), upsampled(golden["output"], (97, 97)))
    assert torch.equal(head.predict(query, support, masks), golden["prediction"].bool())


def test_training_step_is_the_authors(golden, weights):
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
        assert_near(head.get_parameter(names[name]).grad.norm(), norm, 1e-4)


@torch.no_grad()
def test_whole_network_is_the_authors(golden, weights, tmp_path):
    torch.save({name: t for name, t in weights.items() if not name.startswith("mu")}, tmp_path / "theirs.pth")
    method = RPMMs(MixtureBackbone("resnet50", str(tmp_path / "theirs.pth"))).eval()
    method.head = from_release(weights)
    logits = method(golden["query"], golden["support"], golden["support_masks"])
    assert_near(logits, upsampled(golden["output_full"], (97, 97)), 1e-4)


def test_parameters_are_as_many_as_the_authors():
    assert sum(p.numel() for p in RPMMsHead({"layer2": 512, "layer3": 1024}).parameters()) == 11_089_666


def test_checkpoint_of_pmms_is_refused(weights):
    norm = {f"layer55.1.{name}": torch.ones(256) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(CheckpointError, match=r"RPMMs.* unknown \['match.1.bias'"):
        from_release(weights | norm)


# The rounds


def random_head():
    torch.manual_seed(0)
    return RPMMsHead({"layer2": 4, "layer3": 8}).double().eval()


def random_inputs(B=2, K=1, side=5):
    random = torch.Generator().manual_seed(K)

    def features(*axes):
        return {f"layer{i}": [torch.randn(*axes, 2**i, side, side, generator=random).double()] for i in (2, 3)}

    return features(B), features(B, K), (torch.rand(B, K, 33, 33, generator=random) < 0.4).to(torch.uint8)


def plain_rounds(head, query, seen):
    """A convolution a prototype, the query's side repeated; the first history is empty."""
    q, history, rounds = head.embedded(query), torch.zeros(2, 2, 50, 50).double(), []
    for k, (fg, bg) in zip((1, 3, 6), seen.prototypes, strict=True):
        assert fg.shape == bg.shape == (2, k, 256)
        parts = [head.match(torch.cat([q, fg[:, i, :, None, None].expand_as(q)], dim=1)) for i in range(k)]
        scores = torch.einsum("bkc,bchw->bkhw", torch.cat([fg, bg], dim=1), q).exp()
        shares = scores / scores.sum(dim=1, keepdim=True)
        both = torch.stack([shares[:, k:].sum(dim=1), shares[:, :k].sum(dim=1)], dim=1)
        x = head.merge(torch.cat([sum(parts), both], dim=1))
        small = F.interpolate(history, q.shape[-2:], mode="bilinear", align_corners=True)
        rounds.append(head.decode(x, small))
        history = rounds[-1].softmax(dim=1)
    return rounds


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 5])
def test_answer_of_one_shot_is_the_last_round_and_of_several_the_sum(K):
    head, (query, support, masks) = random_head(), random_inputs(K=K)
    rounds = plain_rounds(head, query, head.see(support, masks))
    expected = rounds[-1] if K == 1 else sum(logits.softmax(dim=1) for logits in rounds) / 5
    expected = F.interpolate(expected, (33, 33), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(query, support, masks), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(head.predict(query, support, masks), expected[:, 1] > expected[:, 0])


def test_loss_counts_every_round():
    head, (query, support, masks) = random_head(), random_inputs()
    truth = masks[:, 0].clone()
    rounds = plain_rounds(head, query, head.see(support, masks))
    each = [
        F.cross_entropy(F.interpolate(r, (33, 33), mode="bilinear", align_corners=False), truth.long()) for r in rounds
    ]
    torch.testing.assert_close(head.loss(query, support, masks, truth, CE).double(), sum(each), rtol=1e-5, atol=1e-5)


# The whole method


def episode_of(K, B=2, side=72):
    random = torch.Generator().manual_seed(K)
    images = torch.randint(0, 256, (B, K + 1, 3, side, side), generator=random, dtype=torch.uint8)
    masks = torch.zeros(B, K + 1, side, side, dtype=torch.uint8)
    masks[..., 10:40, 20:60] = 1
    ids, spec = torch.arange(B), [EpisodeSpec("a", ("b",) * K, 0)] * B
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], ids, ids, spec)


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_segments_by_supports_seen_before(K):
    torch.manual_seed(0)
    method, episode = RPMMs(SmallBackbone("quickstart")).eval(), episode_of(K)
    images = episode.query, episode.support, episode.support_masks
    logits = method(*images)
    assert logits.shape == (2, 2, 72, 72)
    assert torch.equal(method.predict(*images), logits.argmax(dim=1).bool())
    assert_near(method.segment(episode.query, method.see(*images[1:])), logits, 1e-4)
    one = method.see(episode.support[:1], episode.support_masks[:1])
    assert_near(method.segment(episode.query, one)[:1], logits[:1], 1e-4)


@pytest.mark.slow
def test_training_lowers_the_loss():
    torch.manual_seed(0)
    method, episode = without_dropout(RPMMs(SmallBackbone("quickstart"), lr=3e-4).train()), episode_of(1)
    optimizer = torch.optim.SGD(method.learned(), lr=3e-4, momentum=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(method.loss(episode, CE))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
