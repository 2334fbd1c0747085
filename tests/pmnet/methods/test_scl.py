"""SCL beside its golden file, and its answer to several shots beside the rule written out."""

from types import SimpleNamespace

import pytest
import torch

from pmnet.backbones import SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone, names_of_timm
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods import from_release
from pmnet.methods.base import resize
from pmnet.methods.scl import SCL, SCLHead, mean_iou
from tests.pmnet.methods.ruled import Golden, assert_near, gradient_norms, without_dropout

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "methods" / "scl_resnet50_1shot.npz")


def feats(golden):
    return golden.features("query"), golden.features("support"), golden["support_masks"]


# Golden file


@pytest.mark.slow
@torch.no_grad()
def test_intermediate_values_and_logits(golden):
    head = from_release("scl", golden.weights())
    query, support, masks = feats(golden)
    seen = head.see(support, masks)
    assert_near(head.self_guided(support, masks).out.logits, golden["support_logits"].flatten(0, 1))
    assert_near(seen.primary, golden["vector_primary"])
    assert_near(seen.auxiliary, golden["vector_auxiliary"])
    assert_near(head.head(query, support, masks), golden["logits"])
    assert torch.equal(head.predict(query, support, masks), golden["logits"].argmax(1).bool())


@pytest.mark.slow
@torch.no_grad()
def test_network_from_images(golden):
    state = golden.weights()
    method = SCL(DilatedResNetBackbone("resnet50s", "none")).eval()
    method.backbone.trunk.load_state_dict(names_of_timm(state), strict=False)
    method.head = from_release("scl", state)
    assert_near(method(golden["query"], golden["support"], golden["support_masks"]), golden["logits_full"], 1e-4)


@pytest.mark.slow
def test_loss_and_gradients(golden):
    head = without_dropout(from_release("scl", golden.weights()))
    loss = head.loss(*feats(golden), golden["query_mask"], LOSS)
    assert_near(loss, golden["train/main_loss"] + golden["train/aux_loss"])
    norms = gradient_norms(head, loss)
    for name, norm in golden.under("train/grad_norm").items():
        assert_near(norms[name], norm, 1e-4)


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda s: s.pop("supp_init_merge.3.0.weight"), "missing .*supp_init_merge.3.0.weight"),
        (lambda s: s.update({"init_merge.0.0.weight": torch.zeros(256, 513, 1, 1)}), "shape .*init_merge.0.0.weight"),
        (lambda s: s.pop("down_query.0.weight"), "down_query.0.weight"),
    ],
)
def test_tensors_of_something_else_are_refused(change, names):
    state = SCLHead(16).state_dict()
    from_release("scl", {f"module.{name}": t for name, t in state.items()})
    change(state)
    with pytest.raises(CheckpointError, match=names):
        from_release("scl", state)


# Several shots


def random_feats(B=2, K=3, side=5, seed=0):
    random = torch.Generator().manual_seed(seed)

    def maps(*shape):
        return [torch.randn(*shape, side, side, generator=random)]

    query = {"layer2": maps(B, 6), "layer3": maps(B, 10), "layer4": maps(B, 8)}
    support = {"layer2": maps(B, K, 6), "layer3": maps(B, K, 10), "layer4_masked": maps(B, K, 8)}
    return query, support, (torch.rand(B, K, 33, 33, generator=random) < 0.5).to(torch.uint8)


def part(feats, episode, shots):
    """Of one episode, some shots; of a query's features, all."""
    return {layer: [f[episode : episode + 1, shots] for f in fs] for layer, fs in feats.items()}


def iou(pred, truth):
    both = ((pred & truth).sum(), (pred | truth).sum())
    return float(both[0]) / float(both[1]) if both[1] else 0.0


@torch.no_grad()
def test_several_shots_are_weighted_by_how_well_each_segments_all():
    torch.manual_seed(1)
    head = SCLHead(16, (6, 3)).eval()
    for p in head.parameters():
        torch.nn.init.kaiming_normal_(p) if p.ndim > 1 else p.zero_()
    query, support, masks = random_feats()
    head.cls[3].bias -= head.self_guided(support, masks).out.logits.mean((0, 2, 3))  # predictions of both sides
    found, pred = head(query, support, masks), head.predict(query, support, masks)
    weights = []
    for b in range(2):
        one = {layer: [f[b : b + 1] for f in fs] for layer, fs in query.items()}
        guided = [head.self_guided(part(support, b, [k]), masks[b : b + 1, [k]]) for k in range(3)]
        answer = torch.zeros(1, 2, 33, 33)
        for i in range(3):
            scores = []
            for j in range(3):
                vectors = guided[i].primary, guided[i].auxiliary
                out = head.of_support(guided[j].feature, *vectors, guided[j].out.kept)
                mine, truth = resize(out.logits, (33, 33)).argmax(1)[0] == 1, masks[b, j] == 1
                scores.append((iou(mine, truth) + iou(~mine, ~truth)) / 2)
            weights.append(sum(scores) / 3)
            answer += weights[-1] / 5 * head(one, part(support, b, [i]), masks[b : b + 1, [i]])
        torch.testing.assert_close(found[b : b + 1], answer, rtol=1e-4, atol=1e-6)
        assert torch.equal(pred[b], answer[0, 1] > answer[0, 0])
    assert len(set(weights)) == 6


@torch.no_grad()
def test_order_of_the_shots_and_the_rest_of_the_batch_change_nothing():
    torch.manual_seed(0)
    head = SCLHead(16, (6, 3)).eval()
    query, support, masks = random_feats()
    logits = head(query, support, masks)
    turned = {layer: [f.flip(1) for f in fs] for layer, fs in support.items()}
    torch.testing.assert_close(head(query, turned, masks.flip(1)), logits, rtol=1e-4, atol=1e-5)
    second = [{layer: [f[1:] for f in fs] for layer, fs in feats.items()} for feats in (query, support)]
    torch.testing.assert_close(head(*second, masks[1:]), logits[1:], rtol=1e-4, atol=1e-5)


def test_mean_iou_is_over_both_sides():
    pred = torch.tensor([[True, True, False, False]])
    assert mean_iou(pred, torch.tensor([[True, False, False, False]])) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_iou(torch.ones(2, 2).bool(), torch.ones(2, 2).bool()) == 0.5  # there is no background


def test_parts_of_the_object_are_what_is_found_and_what_is_overlooked():
    torch.manual_seed(0)
    head = SCLHead(16, (6, 3)).eval()
    _, support, masks = random_feats(B=1, K=1)
    guided = head.self_guided(support, masks)
    mask, found = masks[0, 0, ::8, ::8] == 1, guided.out.logits.argmax(1)[0] == 1
    for vector, where in ((guided.primary, mask & found), (guided.auxiliary, mask & ~found)):
        expected = guided.feature[0][:, where].sum(1) / (where.sum() + 0.0005)
        torch.testing.assert_close(vector[0], expected)


# Method


def test_learned_parameters():
    method = SCL(DilatedResNetBackbone("resnet50s", "none"))
    assert sum(p.numel() for p in method.learned()) == 11_865_610


def batch(B=2, K=1, side=65, seed=0):
    random = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        query=torch.rand(B, 3, side, side, generator=random),
        query_mask=torch.randint(0, 2, (B, side, side), generator=random),
        support=torch.rand(B, K, 3, side, side, generator=random),
        support_masks=(torch.rand(B, K, side, side, generator=random) < 0.5).to(torch.uint8),
    )


def small():
    torch.manual_seed(0)
    return SCL(SmallBackbone("none"), bins=(6, 3))


@pytest.mark.parametrize("K", [1, 3])
@torch.no_grad()
def test_whole_way_of_images(K):
    method, b = small().eval(), batch(K=K)
    logits = method(b.query, b.support, b.support_masks)
    assert logits.shape == (2, 2, 65, 65)
    seen = method.see(b.support, b.support_masks)
    torch.testing.assert_close(method.segment(b.query, seen), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(method.predict(b.query, b.support, b.support_masks), logits[:, 1] > logits[:, 0])


@torch.no_grad()
def test_supports_seen_once_answer_many_queries():
    method, b = small().eval(), batch(B=1, K=2)
    seen, queries = method.see(b.support, b.support_masks), torch.rand(3, 3, 65, 65)
    alone = torch.cat([method.segment(query[None], seen) for query in queries])
    torch.testing.assert_close(method.segment(queries, seen), alone, rtol=1e-4, atol=1e-5)


def test_training_step_moves_the_whole_head():
    method = small().train()
    before = {name: tensor.clone() for name, tensor in method.head.state_dict().items()}
    method.loss(batch(), LOSS).backward()
    torch.optim.SGD(method.learned(), lr=0.1).step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in method.head.state_dict().items())


def test_training_with_several_shots_is_refused():
    with pytest.raises(SettingError, match="train_shot=1"):
        small().loss(batch(K=2), LOSS)
