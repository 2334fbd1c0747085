"""NTRENet beside the authors' program in evaluation; its loss, which has no reference, beside its formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmnet.methods
import pmnet.methods.ntrenet
from datamodules import Episode
from datamodules.episodes.episode import EpisodeSpec
from pmnet.backbones import SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods.ntrenet import NTRENet, NTRENetHead, background_loss, distracting, from_release
from pmnet.methods.pfenet import middle
from tests.pmnet.methods.ruled import Golden, assert_near

CE = nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture(scope="module")
def golden(request):
    path = request.config.rootpath.parent / "shared/golden/methods/ntrenet_resnet50_1shot.npz"
    if not path.is_file():
        pytest.skip("the reference data (../shared) is not here")
    return Golden(path)


@pytest.fixture(scope="module")
def weights(golden):
    return golden.weights()


# The authors' program


@pytest.mark.slow
@torch.no_grad()
def test_every_step_is_the_authors(golden, weights):
    head = pmnet.methods.from_release("ntrenet", {f"module.{name}": tensor for name, tensor in weights.items()})
    query, support, masks = golden.features("query"), golden.features("support"), golden["support_masks"]
    distractors = []
    for merge in head.init_merge3:
        merge.register_forward_pre_hook(lambda _, inputs: distractors.append(inputs[0][:, 256:, 0, 0]))
    answers = head.answers(head.down_query(middle(query)), query, head.see(support, masks))
    assert_near(answers.background, golden["bg"])
    for i in range(4):
        assert_near(answers.first[i], golden[f"initial_{i}"])
        assert_near(distractors[i], golden[f"confused_prototype_{i}"])
        assert_near(answers.enriched.inner[i], golden[f"inner_{i}"])
    assert_near(head(query, support, masks), golden["logits"])
    assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(dim=1).bool())


@pytest.mark.slow
@torch.no_grad()
def test_whole_network_is_the_authors(golden, weights, tmp_path):
    """From the images; the backbone reads its part of the authors' file."""
    torch.save(weights, tmp_path / "theirs.pth")
    method = NTRENet(DilatedResNetBackbone("resnet50s", str(tmp_path / "theirs.pth"))).eval()
    method.head = from_release(weights)
    logits = method(golden["query"], golden["support"], golden["support_masks"])
    assert_near(logits, golden["logits_full"], 1e-4)


def test_parameters_are_as_many_as_the_authors():
    head = NTRENetHead(middle_channels=1536)
    assert sum(p.numel() for p in head.parameters()) == 20_846_868
    assert not head.bg_prototype.any(), "it starts at zero"


def test_checkpoint_of_another_method_is_refused(weights):
    with pytest.raises(CheckpointError, match=r"NTRENet.* missing \['bg_prototype'"):
        from_release({name: t for name, t in weights.items() if name != "bg_prototype"})


# The formulas


def test_distracting_is_neither_background_nor_object():
    """1 - background - object where that is positive, position by position."""
    background, found = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    found_mask = distracting(background, found)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                votes = sum(int(logits[b, 1, i, j] > logits[b, 0, i, j]) for logits in (background, found))
                assert bool(found_mask[b, 0, i, j]) == (max(1 - votes, 0) == 1)


def test_background_loss_is_the_plain_formula():
    logits = torch.randn(2, 2, 6, 6)
    mask = (torch.rand(2, 6, 6) < 0.3).to(torch.uint8)
    mask[0, 0] = 255
    log_p = logits.log_softmax(dim=1)
    inside, everywhere, counted = [], 0.0, 0
    for b in range(2):
        of_object = [float(log_p[b, 0, i, j]) for i in range(6) for j in range(6) if mask[b, i, j] == 1]
        inside.append(-sum(of_object) / (len(of_object) + 1e-5))
        for i in range(6):
            for j in range(6):
                if mask[b, i, j] != 255:
                    everywhere, counted = everywhere - float(log_p[b, 1, i, j]), counted + 1
    expected = sum(inside) / 2 + 0.5 * everywhere / counted
    assert float(background_loss(logits, mask, CE)) == pytest.approx(expected, rel=1e-5)
    assert background_loss(logits, torch.full_like(mask, 255), CE) == 0


@pytest.fixture
def head():
    torch.manual_seed(0)
    return NTRENetHead(12, bins=(4, 2, 2, 1)).eval()


def test_negatives_are_kept_for_each_class_newest_first_and_no_more_than_the_limit(head, monkeypatch):
    monkeypatch.setattr(pmnet.methods.ntrenet, "KEPT", 3)
    background = torch.zeros(2, 2, 2, 2)  # a tie: no position is background
    mask = torch.zeros(2, 2, 2, dtype=torch.uint8)
    mask[1] = 1  # all of the object: nothing distracts
    for value in range(1, 6):
        feature = torch.full((2, 256, 2, 2), float(value), requires_grad=True)
        head.remember([feature], [background], [mask], classes=[7, 8])
    assert head.negatives.keys() == {7}
    torch.testing.assert_close(head.negatives[7][:, 0], torch.tensor([5.0, 4.0, 3.0]), rtol=1e-3, atol=0)
    assert not head.negatives[7].requires_grad
    assert not [name for name in head.state_dict() if "negatives" in name]


def test_contrast_is_the_plain_formula(head):
    feature, logits, prototype = torch.randn(2, 256, 3, 3), torch.randn(2, 2, 3, 3), torch.randn(2, 256)
    head.negatives = {1: torch.randn(5, 256)}
    found = head.contrast(feature, logits, prototype, classes=[1, 2])  # nothing is known of class 2

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    chosen = [feature[0, :, i, j] for i in range(3) for j in range(3) if logits[0, 1, i, j] > logits[0, 0, i, j]]
    pooled = sum(chosen) / (len(chosen) + 0.0005)
    against = sum(math.exp(cosine(pooled, negative)) for negative in head.negatives[1])
    expected = -math.log(math.exp(cosine(pooled, prototype[0])) / against + 1e-8)
    assert float(found) == pytest.approx(expected / 2, rel=1e-4)


def test_loss_is_the_weighted_sum_of_its_parts(head, monkeypatch):
    random = torch.Generator().manual_seed(0)
    query = {f"layer{i}": [torch.randn(2, 2**i, 5, 5, generator=random)] for i in (2, 3, 4)}
    support = {f"layer{i}": [torch.randn(2, 2, 2**i, 5, 5, generator=random)] for i in (2, 3)}
    support["layer4_masked"] = [torch.randn(2, 2, 16, 5, 5, generator=random)]
    masks = (torch.rand(2, 2, 33, 33, generator=random) < 0.4).to(torch.uint8)
    truth = (torch.rand(2, 33, 33, generator=random) < 0.4).to(torch.uint8)
    monkeypatch.setattr(head, "contrast", lambda *_: torch.tensor(3.0))
    loss = head.loss(query, support, masks, truth, CE)

    answers = head.answers(head.down_query(middle(query)), query, head.see(support, masks))
    large = lambda x: F.interpolate(x, (33, 33), mode="bilinear", align_corners=True)  # noqa: E731
    score = lambda x: F.cross_entropy(large(x), truth.long())  # noqa: E731
    backgrounds = [background_loss(answers.background, truth, CE)]
    for k in range(2):
        feature = head.down_supp(middle({m: [f[0][:, k]] for m, f in support.items()}))
        backgrounds.append(background_loss(head.background(feature), masks[:, k], CE))
    expected = score(answers.enriched.logits) + sum(backgrounds) / 3 + 0.01 * 3
    expected = expected + 0.4 * sum(map(score, answers.enriched.inner)) / 4 + 0.6 * sum(map(score, answers.first)) / 4
    torch.testing.assert_close(loss, expected)


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
    method, episode = NTRENet(SmallBackbone("quickstart"), bins=(6, 4, 2, 1)).eval(), episode_of(K)
    images = episode.query, episode.support, episode.support_masks
    logits = method(*images)
    assert logits.shape == (2, 2, 73, 73)
    assert torch.equal(method.predict(*images), logits.argmax(dim=1).bool())
    assert_near(method.segment(episode.query, method.see(*images[1:])), logits, 1e-4)
    alone = method(episode.query[1:], episode.support[1:], episode.support_masks[1:])
    assert_near(alone[0], logits[1], 1e-4)
    flipped = method(episode.query, episode.support.flip(1), episode.support_masks.flip(1))
    assert_near(flipped, logits, 1e-4)


def test_training_lowers_the_loss_and_remembers_the_classes_of_the_episodes():
    torch.manual_seed(0)
    method, episode = NTRENet(SmallBackbone("quickstart"), bins=(6, 4, 2, 1)).train(), episode_of(1)
    for part in method.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0
    optimizer = torch.optim.SGD(method.learned(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(method.loss(episode, CE))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert method.head.negatives.keys() <= {0, 1}
    assert method.head.negatives
    assert "backbone.trunk.layer1.0.bn1.running_mean" in method.saved()


def test_other_sides_are_refused():
    episode = episode_of(1, side=64)
    with pytest.raises(SettingError, match=r"NTRENet takes image sides of 8n \+ 1, such as 473 or 385, not 64x64"):
        NTRENet(SmallBackbone("none")).predict(episode.query, episode.support, episode.support_masks)
