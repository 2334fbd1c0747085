"""ASGNet beside its golden file; its seeds beside scipy, its clusters beside a loop over pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from pmnet.backbones import SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone, names_of_timm
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.asgnet import ASGNet, ASGNetHead, Seen, allocated, prototypes, seeds, small_mask
from pmnet.methods.pfenet import middle
from pmnet.methods.pooling import masked_mean
from tests.pmnet.methods.ruled import Golden, assert_near, gradient_norms, without_dropout

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "methods" / "asgnet_resnet50_1shot.npz")


def feats(golden):
    return golden.features("query"), golden.features("support"), golden["support_masks"]


# Golden file


@pytest.mark.slow
@torch.no_grad()
def test_intermediate_values_and_logits(golden):
    head = from_release("asgnet", golden.weights())
    query, support, masks = feats(golden)
    seen = head.see(support, masks)
    for b in range(2):
        n = len(seeds(small_mask(masks[b, 0], (21, 21))))
        assert seen.used[b].tolist() == [True] * n + [False] * (5 - n)
        assert_near(seen.prototypes[b, :n].T, golden[f"centres_{b}"])
    query_BChw = head.down_conv(middle(query))
    guide, similarity = allocated(query_BChw, seen)
    assert_near(similarity, golden["probability_map"])
    for b in range(2):
        which = golden[f"guide_map_{b}"].long()
        assert torch.equal(guide[b], seen.prototypes[b][which].movedim(2, 0))
    for i, inner in enumerate(head.outputs(query, seen).inner):
        assert_near(inner, golden[f"inner_{i}"])
    assert_near(head.head(query, support, masks), golden["logits"])
    assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(1).bool())


def test_seeds_are_those_of_the_authors(golden):
    for b in range(2):
        placed = seeds(small_mask(golden["support_masks"][b, 0], (21, 21)))
        expected = golden["seeds"][b, 0]
        assert torch.equal(placed, expected[: len(placed)])
        assert not expected[len(placed) :].any()


@pytest.mark.slow
@torch.no_grad()
def test_network_from_images(golden):
    state = golden.weights()
    method = ASGNet(DilatedResNetBackbone("resnet50s", "none")).eval()
    method.backbone.trunk.load_state_dict(names_of_timm(state), strict=False)
    method.head = from_release("asgnet", state)
    assert_near(method(golden["query"], golden["support"], golden["support_masks"]), golden["logits_full"], 1e-4)


@pytest.mark.slow
def test_loss_and_gradients(golden):
    head = without_dropout(from_release("asgnet", golden.weights()))
    loss = head.loss(*feats(golden), golden["query_mask"], LOSS)
    assert_near(loss, golden["train/main_loss"] + golden["train/aux_loss"])
    norms = gradient_norms(head, loss)
    for name, norm in golden.under("train/grad_norm").items():
        assert_near(norms[name], norm, 1e-4)


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("res1.0.weight"), "missing .*res1.0.weight"),
        (lambda s: s.update({"init_merge.0.0.weight": torch.zeros(1)}), "unknown .*init_merge.0.0.weight"),
        (lambda s: s.pop("down_conv.0.weight"), "down_conv.0.weight"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    state = ASGNetHead(16).state_dict()
    assert from_release("asgnet", {f"module.{name}": t for name, t in state.items()}).corr_conv
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("asgnet", state)


# Seeds


def blobs(seed, h=40, w=50):
    """Two overlapping ellipses."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:h, :w]
    mask = np.zeros((h, w), bool)
    for _ in range(2):
        (y, x), (a, b) = random.uniform(8, 30, 2), random.uniform(3, 14, 2)
        mask |= ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 <= 1
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_seeds_are_the_repeated_maxima_of_scipys_distance_transform(seed):
    mask = blobs(seed)
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    box = mask[top : rows.max() + 1, left : columns.max() + 1].copy()
    n, expected = min(round(mask.sum() / 100), 5), []
    for _ in range(n if n > 1 else 0):
        place = np.unravel_index(distance_transform_edt(box).argmax(), box.shape)
        box[place] = False
        expected.append([place[0] + top, place[1] + left])
    assert seeds(torch.from_numpy(mask)).tolist() == expected


def test_masks_that_fill_their_box_are_seeded_in_the_middle():
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[5:20, 10:25] = True
    assert seeds(mask).tolist()[0] == [12, 17]
    assert len(seeds(torch.ones(60, 60, dtype=torch.bool))) == 5


@pytest.mark.parametrize("area, count", [(0, 0), (99, 0), (149, 0), (150, 2), (250, 2), (251, 3), (350, 4), (999, 5)])
def test_larger_objects_have_more_seeds(area, count):
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[:area] = True
    assert len(seeds(mask.view(40, 25))) == count


def test_small_mask_takes_the_pixel_above_and_left():
    mask = torch.arange(473 * 20).view(473, 20)
    small = torch.stack([small_mask((mask == value).int(), (60, 5)) for value in (0, 20 * 7 + 4, 20 * 465 + 16)])
    assert small.nonzero().tolist() == [[0, 0, 0], [1, 1, 1], [2, 59, 4]]


# Clusters


def plain_clusters(feature, mask, starts, rounds):
    pixels = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[i, j] == 1]
    centres = [(feature[:, i, j], float(i), float(j)) for i, j in starts.tolist()]
    for _ in range(rounds):
        moved = []
        for f, y, x in centres:
            d = [
                float(((feature[:, i, j] - f) ** 2).sum() + ((i - y) ** 2 + (j - x) ** 2) / 100) ** 0.5
                for i, j in pixels
            ]
            a = torch.tensor(d, dtype=torch.float64).neg().exp()
            a = (a / a.sum()).tolist()
            moved.append(
                (
                    sum(w * feature[:, i, j] for w, (i, j) in zip(a, pixels, strict=True)),
                    sum(w * i for w, (i, _) in zip(a, pixels, strict=True)),
                    sum(w * j for w, (_, j) in zip(a, pixels, strict=True)),
                )
            )
        centres = moved
    return torch.stack([f for f, _, _ in centres])


def test_clusters_are_the_plain_formula():
    torch.manual_seed(0)
    feature = torch.randn(4, 8, 9, dtype=torch.float64)
    mask = (torch.rand(8, 9, dtype=torch.float64) < 0.6).double()
    mask[0, :5] = 0.5  # a soft edge belongs to no cluster
    starts = mask.eq(1).nonzero()[[3, 20, 30]]
    for rounds in (5, 10):
        found = prototypes(feature, mask, starts, rounds)
        torch.testing.assert_close(found, plain_clusters(feature, mask, starts, rounds))


def test_far_pixels_give_finite_clusters():
    feature = 1000 * torch.randn(4, 8, 9)
    mask = torch.ones(8, 9)
    assert prototypes(feature, mask, torch.tensor([[1, 1], [5, 5]]), 5).isfinite().all()


def test_without_seeds_or_pixels_the_prototype_is_the_mean():
    feature, mask = torch.randn(4, 8, 9), torch.rand(8, 9)
    expected = masked_mean(feature[None], mask[None], 0.0005)
    torch.testing.assert_close(prototypes(feature, mask, torch.zeros(0, 2).long(), 5), expected)
    torch.testing.assert_close(prototypes(feature, mask, torch.tensor([[1, 1], [2, 2]]), 5), expected)


def test_gradient_reaches_a_mean_but_no_cluster():
    feature = torch.randn(4, 8, 9, requires_grad=True)
    assert not prototypes(feature, torch.ones(8, 9), torch.tensor([[1, 1], [5, 5]]), 5).requires_grad
    assert prototypes(feature, torch.ones(8, 9), torch.zeros(0, 2).long(), 5).requires_grad


def test_allocation_is_the_plain_formula():
    torch.manual_seed(0)
    query, given = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 10, 4, dtype=torch.float64)
    used = torch.tensor([[True] * 3 + [False] * 2 + [True] + [False] * 4, [True] * 5 + [True] * 2 + [False] * 3])
    guide, similarity = allocated(query, Seen(given, used))
    for b in range(2):
        there = given[b][used[b]]
        for i in range(3):
            for j in range(5):
                q = query[b, :, i, j]
                cosines = [float(q @ p) / float(q.norm() * p.norm()) for p in there]
                assert torch.equal(guide[b, :, i, j], there[cosines.index(max(cosines))])
                assert abs(float(similarity[b, 0, i, j]) - sum(cosines)) < 1e-9


# Method


def test_learned_parameters():
    method = ASGNet(DilatedResNetBackbone("resnet50s", "none"))
    assert sum(p.numel() for p in method.learned()) == 10_423_818


def batch(B=2, K=1, side=129, seed=0):
    """With an object that is large in the first support, and small in the others."""
    random = torch.Generator().manual_seed(seed)
    masks = torch.zeros(B, K, side, side, dtype=torch.uint8)
    masks[:, :, 20:30, 20:30] = 1
    masks[0, 0, 5:120, 9:110] = 1
    return SimpleNamespace(
        query=torch.rand(B, 3, side, side, generator=random),
        query_mask=torch.randint(0, 2, (B, side, side), generator=random),
        support=torch.rand(B, K, 3, side, side, generator=random),
        support_masks=masks,
    )


def small():
    torch.manual_seed(0)
    backbone = SmallBackbone("none")
    backbone.trunk.layer3[0].conv1.stride = backbone.trunk.layer3[0].downsample[0].stride = (1, 1)  # stride 8
    return ASGNet(backbone, bins=(6, 3))


@pytest.mark.parametrize("K", [1, 3])
@torch.no_grad()
def test_whole_way_of_images(K):
    method, b = small().eval(), batch(K=K)
    logits = method(b.query, b.support, b.support_masks)
    assert logits.shape == (2, 2, 129, 129)
    seen = method.see(b.support, b.support_masks)
    assert seen.used.sum(1).tolist() == [1 + K, K]
    torch.testing.assert_close(method.segment(b.query, seen), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(method.predict(b.query, b.support, b.support_masks), logits[:, 1] > logits[:, 0])
    second = method(b.query[1:], b.support[1:], b.support_masks[1:])
    torch.testing.assert_close(second, logits[1:], rtol=1e-4, atol=1e-5)
    turned = method(b.query, b.support.flip(1), b.support_masks.flip(1))
    torch.testing.assert_close(turned, logits, rtol=1e-4, atol=1e-5)


def test_training_step_moves_the_whole_head():
    method = small().train()
    before = {name: tensor.clone() for name, tensor in method.head.state_dict().items()}
    method.loss(batch(), LOSS).backward()
    torch.optim.SGD(method.learned(), lr=0.1).step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in method.head.state_dict().items())
    assert {name for name in method.saved() if name.endswith("running_mean")}


def test_other_sides_are_refused():
    with pytest.raises(SettingError, match=r"ASGNet takes image sides of 8n \+ 1"):
        small().check_sides((384, 384))
