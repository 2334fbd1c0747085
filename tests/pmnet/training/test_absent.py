"""Scores of absent episodes, against slow plain loops."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from pmnet import Prototype
from pmnet.backbones import SmallBackbone
from pmnet.methods.hsnet import HSNet
from pmnet.training.absent import AbsentScores, auroc
from pmnet.training.module import FewShotModule
from tests.conftest import TINY, results, run
from tests.pmnet.training.test_module import CLASSES, LOSS, make_batch


def episodes(count=13, seed=0):
    """Margins, masks of 0, 1, 2 and 255, and which episodes are absent. Equal margins occur; some mark nothing."""
    random = torch.Generator().manual_seed(seed)
    margin = torch.randint(-6, 4, (count, 5, 4), generator=random) / 2
    margin[::4] -= 3
    masks = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (count, 5, 4), generator=random)]
    absent = torch.arange(count) >= count // 2
    masks[absent] = torch.where(masks[absent] == 1, 0, masks[absent])
    masks[~absent] = torch.where(masks[~absent] == 2, 0, masks[~absent])
    return margin, masks.to(torch.uint8), absent


def plain_scores(margin, masks, absent):
    empty, other, scores = [], [], []
    for b in range(len(margin)):
        pixels = [(margin[b, i, j].item(), masks[b, i, j].item()) for i in range(5) for j in range(4)]
        pixels = [(m, value) for m, value in pixels if value != 255]
        scores.append(max(m for m, _ in pixels))
        if absent[b]:
            empty += [m > 0 for m, _ in pixels]
            other += [m > 0 for m, value in pixels if value == 2]
    there, gone = ([s for s, a in zip(scores, absent, strict=True) if a == kind] for kind in (False, True))
    pairs = [(p > a) + 0.5 * (p == a) for p in there for a in gone]
    right = [s > 0 for s in there] + [s <= 0 for s in gone]
    shares = {"false_positive": empty, "marked": [s > 0 for s in gone], "confused": other}
    shares |= {"presence_auroc": pairs, "presence_accuracy": right}
    return {name: 100 * sum(values) / len(values) for name, values in shares.items()}


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_those_of_plain_loops(seed):
    drawn = episodes(seed=seed)
    metric = AbsentScores()
    for part in torch.arange(13).split(3):
        metric.update(*(x[part] for x in drawn))
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert scores == pytest.approx(plain_scores(*drawn), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_batches_and_their_order_change_no_number(size):
    drawn = episodes()
    metrics = [AbsentScores(), AbsentScores()]
    metrics[0].update(*drawn)
    for part in torch.arange(13).flip(0).split(size):
        metrics[1].update(*(x[part] for x in drawn))
    assert metrics[0].compute() == metrics[1].compute()


def test_auroc_of_equal_and_of_separate_scores():
    ones, infinite = torch.ones(4), torch.full((3,), -torch.inf)
    assert auroc(ones, ones[:2]) == 50
    assert auroc(ones, infinite) == 100
    assert auroc(infinite, ones) == 0


@pytest.mark.parametrize("method, K", [(Prototype, 1), (Prototype, 3), (HSNet, 1), (HSNet, 3)])
def test_margins_are_positive_exactly_where_the_mask_is(method, K):
    torch.manual_seed(0)
    network, batch = method(SmallBackbone("none")).eval(), make_batch(K=K)
    images = batch.query, batch.support, batch.support_masks
    with torch.no_grad():
        seen, feats = network.see(*images[1:]), network.features(*images)[0]
        margin = network.head.margin(feats, seen, (32, 32))
        assert torch.equal(margin > 0, network.predict(*images))
    assert margin.dtype == torch.float32


def test_absent_episodes_have_scores_of_their_own(monkeypatch):
    """Episodes 0 to 4 are ordinary, 5 to 8 absent; the second batch has both."""
    batches = [make_batch(seed) for seed in (1, 2, 3)]
    for i, batch in enumerate(batches):
        batch.index = torch.arange(3) + 3 * i
        gone = batch.index >= 5
        batch.query_mask[gone] = torch.where(batch.query_mask[gone] == 1, 2, batch.query_mask[gone])
    found = []
    for absent_from, kept in ((None, 5), (5, 9)):
        torch.manual_seed(0)
        network = Prototype(SmallBackbone("none"))
        floors = {"floor": Prototype(network.backbone, "layer2")}
        module = FewShotModule(network, CLASSES, LOSS, partial(SGD, lr=0.1), floors=floors, absent_from=absent_from)
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
        module.eval().on_test_epoch_start()
        with torch.no_grad():
            for batch in batches:
                keep = batch.index < kept
                rows = {n: x[keep] for n, x in vars(batch).items() if isinstance(x, torch.Tensor)}
                if keep.any():
                    module.test_step(type(batch)(**rows, spec=batch.spec[: int(keep.sum())]), 0)
        module.on_test_epoch_end()
        found.append(module.test_result)
    plain, both = found
    assert both.episode_iou == plain.episode_iou
    assert sorted(both.absent_marked) == [5, 6, 7, 8]
    assert set(both.baselines) == {"all_foreground", "floor"}
    for before, after in [
        (plain.scores, both.scores),
        *((plain.baselines[b], both.baselines[b]) for b in plain.baselines),
    ]:
        absent = after.pop("absent")
        assert after == before
        assert len(absent) == 5
        assert all(0 <= score <= 100 for score in absent.values())


def test_marking_everything_never_tells_whether_the_class_is_there():
    _, masks, absent = episodes()
    metric = AbsentScores()
    metric.update(torch.ones(masks.shape), masks, absent)
    scores = {name: value.item() for name, value in metric.compute().items()}
    expected = dict.fromkeys(("false_positive", "marked", "confused"), 100.0) | {"presence_auroc": 50.0}
    assert scores == pytest.approx(expected | {"presence_accuracy": 100 * 6 / 13})


@pytest.mark.slow
def test_a_run_reports_absent_episodes_beside_unchanged_scores(tmp_path: Path) -> None:
    options = [*TINY, "model=prototype", "hydra.job.chdir=false"]
    for name, more in (("plain", []), ("one", ["episodes.absent=0.3"]), ("two", ["episodes.absent=0.3",
                       "episodes.test_batch_size=3", "episodes.workers=1"])):  # fmt: skip
        done = run(*options, *more, f"hydra.run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert ("presence AUROC" in done.stdout) == bool(more)
    plain, one, two = (results(tmp_path / name) for name in ("plain", "one", "two"))
    assert one["test"] == two["test"]
    assert one["baselines"] == two["baselines"]
    assert one["episodes"] == two["episodes"]
    assert plain["episodes"] == {k: v for k, v in one["episodes"].items() if k != "absent"}
    assert one["episodes"]["absent"]["episodes"] == 5
    for before, after in [(plain["test"], one["test"]), *((plain["baselines"][b], one["baselines"][b])
                          for b in plain["baselines"])]:  # fmt: skip
        assert "absent" not in before
        assert after == before | {"absent": after["absent"]}
    everything = one["baselines"]["all_foreground"]["absent"]
    assert everything == {"false_positive": 100, "marked": 100, "confused": 100, "presence_auroc": 50,
                          "presence_accuracy": pytest.approx(100 * 11 / 16, abs=1e-3)}  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "one" / "episodes.csv").open()))
    assert [bool(row["shown"]) for row in rows] == [False] * 11 + [True] * 5
    assert all((row["iou"] == "") == bool(row["shown"]) for row in rows)
    first = (tmp_path / "plain" / "episodes.csv").read_text().splitlines()[0]
    assert first == "index,class,query,supports,iou"
