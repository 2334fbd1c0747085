"""The training-free floors beside loops over positions, one formula after the other."""

import math

import pytest
import torch

from pmnet import Nearest, Prototype
from pmnet.backbones import SmallBackbone
from pmnet.errors import SettingError
from pmnet.methods.base import resize
from pmnet.methods.nearest import NearestHead
from pmnet.methods.prototype import PrototypeHead


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def shares(mask, h, w):
    """Of the pixels under each position of an h x w map, how many are foreground; sides divide."""
    H, W = mask.shape
    cells = [mask[i * H // h : (i + 1) * H // h, j * W // w : (j + 1) * W // w] for i in range(h) for j in range(w)]
    return [float(cell.mean()) for cell in cells]


def example(B=2, K=3, C=5, h=3, w=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, C, h, w, generator=random, dtype=torch.float64)
    support = torch.randn(B, K, C, h, w, generator=random, dtype=torch.float64)
    masks = (torch.rand(B, K, 6 * h, 6 * w, generator=random) < 0.5).double()
    return {"layer3": [query]}, {"layer3": [support]}, masks


def plain_prototype(query_feats, support_feats, masks):
    query, support = query_feats["layer3"][-1], support_feats["layer3"][-1]
    (B, K, C, h, w), rows = support.shape, []
    for b in range(B):
        totals = {side: [torch.zeros(C, dtype=torch.float64), 0.0] for side in (0, 1)}
        for k in range(K):
            for s, share in enumerate(shares(masks[b, k], h, w)):
                for side, weight in ((0, 1 - share), (1, share)):
                    totals[side][0] += weight * support[b, k].flatten(1)[:, s]
                    totals[side][1] += weight
        means = [total / weight for total, weight in totals.values()]
        rows.append([[cosine(query[b].flatten(1)[:, q], mean) for q in range(h * w)] for mean in means])
    return torch.tensor(rows, dtype=torch.float64).unflatten(2, (h, w))


def plain_nearest(query_feats, support_feats, masks):
    query, support = query_feats["layer3"][-1], support_feats["layer3"][-1]
    (B, K, _, h, w), rows = support.shape, []
    for b in range(B):
        positions = [
            (share >= 0.5, support[b, k].flatten(1)[:, s])
            for k in range(K)
            for s, share in enumerate(shares(masks[b, k], h, w))
        ]
        rows.append(
            [
                [max(cosine(query[b].flatten(1)[:, q], f) for side, f in positions if side == fg) for q in range(h * w)]
                for fg in (False, True)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64).unflatten(2, (h, w))


@pytest.mark.parametrize("head, plain", [(PrototypeHead, plain_prototype), (NearestHead, plain_nearest)])
def test_floor_is_the_plain_formula(head, plain):
    feats = example()
    expected = resize(10 * plain(*feats), (18, 24))
    torch.testing.assert_close(head("layer3")(*feats), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(head("layer3").predict(*feats), expected[:, 1] > expected[:, 0])


def test_object_smaller_than_a_position_is_found_by_the_position_that_shows_most_of_it():
    _, support_feats, masks = example(B=1, K=1)
    masks = torch.zeros_like(masks)
    masks[0, 0, 7, 8] = 1  # of the 36 pixels of position (1, 1)
    same = {"layer3": [support_feats["layer3"][-1][:, 0]]}
    seen = NearestHead("layer3").see(support_feats, masks)
    assert seen.foreground.nonzero().tolist() == [[0, 5]]
    found = NearestHead("layer3").segment(same, seen, (3, 4)).argmax(1)
    assert found.nonzero().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("kind", [Prototype, Nearest])
@pytest.mark.parametrize("value", [0, 1])
def test_supports_of_one_side_alone_give_finite_scores(kind, value):
    method = kind(SmallBackbone("none"), "layer3")
    images, masks = torch.rand(1, 2, 3, 64, 64), torch.full((1, 2, 64, 64), value)
    with torch.no_grad():
        assert method(images[:, 0], images, masks).isfinite().all()
    if kind is Nearest:
        assert method.predict(images[:, 0], images, masks).all() == bool(value)


@pytest.mark.parametrize("kind", [Prototype, Nearest])
def test_image_segments_itself_and_supports_are_seen_once(kind):
    """With features that tell the two sides apart, the support's mask comes back; K copies change nothing."""
    method = kind(SmallBackbone("quickstart"), "layer2")
    image = torch.zeros(1, 3, 96, 96)
    image[..., 48:] = 2
    mask = (image[:, 0] > 1).to(torch.uint8)
    found = method.predict(image, image[:, None], mask[:, None])
    assert (found == mask.bool()).float().mean() > (0.9 if kind is Nearest else 0.75)
    several = method.predict(image, image[:, None].repeat(1, 3, 1, 1, 1), mask[:, None].repeat(1, 3, 1, 1))
    assert (several == found).float().mean() > 0.999
    seen = method.see(image[:, None], mask[:, None])
    assert torch.equal(method.mask(image.repeat(2, 1, 1, 1), seen)[1], found[0])


@pytest.mark.parametrize("kind", [Prototype, Nearest])
def test_nothing_is_learned_and_unknown_layers_are_refused(kind):
    assert list(kind(SmallBackbone("none"), "layer1").learned()) == []
    with pytest.raises(SettingError, match="has no layer9; it has layer1, layer2"):
        kind(SmallBackbone("none"), "layer9")


def test_floor_leaves_a_backbone_as_it_is_that_another_method_trains():
    class Trained(Prototype):
        learned_layers = ("layer3",)

    backbone = SmallBackbone("none")
    trained = Trained(backbone, "layer3")
    Nearest(backbone)
    learned = {f"backbone.trunk.layer3.{name}" for name, _ in backbone.trunk.layer3.named_parameters()}
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == learned
    assert learned <= trained.saved()


def test_floor_takes_the_deepest_layer_unless_told_otherwise():
    assert Nearest(SmallBackbone("none")).query_reads == {"layer4": "last"}
