import itertools

import numpy as np
import pytest
import torch

from pmnet.training.metrics import FewShotIoU

CLASSES = [4, 9, 2]


def random_episodes(episodes=12, classes=CLASSES, seed=0):
    random = torch.Generator().manual_seed(seed)
    pred, target = (torch.randint(0, 2, (episodes, 6, 5), generator=random) for _ in range(2))
    class_id = torch.tensor(classes)[torch.randint(0, len(classes), (episodes,), generator=random)]
    ignore = (torch.rand(episodes, 6, 5, generator=random) < 0.2).int() * 255
    return pred, target, class_id, ignore


def scores(*updates, classes=CLASSES):
    metric = FewShotIoU(classes)
    for update in updates:
        metric.update(*update)
    return metric.compute()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def plain_scores(pred, target, class_id, ignore, classes):
    """The formulas of the published evaluator, on sets of (episode, row, column)."""
    intersection, union = np.zeros((len(classes), 2)), np.zeros((len(classes), 2))
    for i, c in enumerate(classes):
        episodes = [e for e in range(len(pred)) if class_id[e] == c]
        pixels = [p for p in itertools.product(episodes, range(6), range(5)) if ignore[p] == 0]
        for value in (0, 1):
            marked, true = ({p for p in pixels if mask[p] == value} for mask in (pred, target))
            intersection[i, value], union[i, value] = len(marked & true), len(marked | true)
    per_class = 100 * intersection[:, 1] / np.maximum(union[:, 1], 1)
    return per_class.mean(), (100 * intersection.sum(0) / union.sum(0)).mean(), per_class


def test_scores_equal_those_of_the_published_evaluator(shared):
    golden = {k: torch.from_numpy(v) for k, v in np.load(shared / "golden" / "metrics_pascal.npz").items()}
    metric = FewShotIoU(golden["class_ids"].tolist())
    for batch in torch.arange(len(golden["pred"])).split(7):
        metric.update(*(golden[name][batch] for name in ("pred", "gt", "class_id", "ignore")))
    ours = metric.compute()
    assert ours["miou"].item() == pytest.approx(golden["miou"].item(), abs=1e-4)
    assert ours["fb_iou"].item() == pytest.approx(golden["fb_iou"].item(), abs=1e-4)
    np.testing.assert_allclose(ours["iou_per_class"], golden["iou_per_class"], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_those_of_sets_of_pixels(seed):
    episodes = random_episodes(seed=seed)
    miou, fb_iou, per_class = plain_scores(*episodes, CLASSES)
    ours = scores(episodes)
    assert ours["miou"].item() == pytest.approx(miou, abs=1e-4)
    assert ours["fb_iou"].item() == pytest.approx(fb_iou, abs=1e-4)
    np.testing.assert_allclose(ours["iou_per_class"], per_class, atol=1e-4)


def test_every_pixel_counts_by_default():
    pred, target, class_id, ignore = random_episodes()
    assert_same(scores((pred, target, class_id)), scores((pred, target, class_id, torch.zeros_like(ignore))))
    assert scores((pred, target, class_id))["miou"] != scores((pred, target, class_id, ignore))["miou"]


def test_values_of_ignored_pixels_do_not_matter():
    pred, target, class_id, ignore = random_episodes()
    other = torch.where(ignore != 0, 1 - pred, pred), torch.where(ignore != 0, 1 - target, target)
    assert_same(scores((*other, class_id, ignore)), scores((pred, target, class_id, ignore)))


@pytest.mark.parametrize("batch", [1, 5])
def test_order_and_batch_size_do_not_matter(batch):
    episodes = random_episodes()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = [tuple(x[part] for x in episodes) for part in order.split(batch)]
    assert_same(scores(*parts), scores(episodes))


def test_metrics_of_two_processes_are_summed():
    episodes = random_episodes()
    first, second = FewShotIoU(CLASSES), FewShotIoU(CLASSES)
    first.update(*(x[:7] for x in episodes))
    second.update(*(x[7:] for x in episodes))
    first.merge_state(second)  # uses the states' reduction, as between processes
    assert_same(first.compute(), scores(episodes))


def test_class_without_episodes_counts_as_zero():
    pred, target, _, ignore = random_episodes()
    ours = scores((pred, target, torch.full((12,), 9), ignore))
    alone = scores((pred, target, torch.full((12,), 9), ignore), classes=[9])
    assert ours["iou_per_class"].tolist() == [0, alone["miou"].item(), 0]
    assert ours["miou"].item() == pytest.approx(alone["miou"].item() / 3, rel=1e-6)
    assert ours["fb_iou"] == alone["fb_iou"]


def test_class_without_pixels_in_prediction_and_truth_counts_as_zero():
    nothing = torch.zeros(1, 6, 5)
    ours = scores((nothing, nothing, torch.tensor([9])), classes=[9])
    assert ours["miou"] == 0
    assert ours["fb_iou"] == 50


def test_pixels_are_summed_before_dividing():
    target = torch.zeros(2, 1, 100)
    target[0, 0, :1], target[1, 0, :99] = 1, 1
    pred = target.clone()
    pred[0] = 0  # misses an object of 1 pixel, finds one of 99: the IoU is 99/100, not (0 + 1) / 2
    assert scores((pred, target, torch.tensor([9, 9])), classes=[9])["miou"].item() == pytest.approx(99)


@pytest.mark.parametrize("class_id", [[5, 9], [9, 5]])
def test_unknown_class_is_refused_and_changes_nothing(class_id):
    metric = FewShotIoU(CLASSES)
    ones = torch.ones(2, 6, 5)
    with pytest.raises(ValueError, match="class_id"):
        metric.update(ones, ones, torch.tensor(class_id))
    assert metric.union.sum() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_may_have_any_dtype(dtype):
    pred, target, class_id, ignore = random_episodes()
    others = pred.to(dtype), target.to(dtype), class_id, ignore.to(dtype)
    assert_same(scores(others), scores((pred, target, class_id, ignore)))


def test_reset_clears_the_sums():
    metric = FewShotIoU(CLASSES)
    metric.update(*random_episodes(seed=1))
    metric.reset()
    metric.update(*random_episodes(seed=2))
    assert_same(metric.compute(), scores(random_episodes(seed=2)))


def test_running_scores_include_all_episodes_so_far():
    metric = FewShotIoU(CLASSES)
    metric.update(*random_episodes(seed=1))
    assert_same(metric.running(), scores(random_episodes(seed=1)))
    metric.update(*random_episodes(seed=2))
    assert_same(metric.running(), scores(random_episodes(seed=1), random_episodes(seed=2)))
