from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from datamodules import Episode
from datamodules.episodes.episode import EpisodeSpec
from pmnet import Nearest, PMNet, Prototype
from pmnet.backbones import SmallBackbone
from pmnet.errors import CheckpointError, NonFiniteLossError
from pmnet.training.metrics import FewShotIoU
from pmnet.training.module import FewShotModule, check_checkpoint, plain
from pmnet.training.pretrain import BackbonePretraining

CLASSES = [3, 5]
LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)
TRAINER = SimpleNamespace(current_epoch=7, global_step=123)


def make_module(monkeypatch=None, seed=0, scheduler=None, **options):
    torch.manual_seed(seed)
    module = FewShotModule(PMNet(SmallBackbone("none"), **options), CLASSES, LOSS, partial(SGD, lr=0.1), scheduler)
    if monkeypatch:  # Lightning's logging needs a running trainer
        module.logged = {}
        monkeypatch.setattr(module, "log", lambda name, value, **_: module.logged.update({name: value}))
        monkeypatch.setattr(module, "log_dict", module.logged.update)
        monkeypatch.setattr(module, "_trainer", TRAINER)
    return module


def make_batch(seed=0, B=3, K=1):
    random = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=random, dtype=torch.uint8)

    mask = integers(3, B, 32, 32)
    return Episode(
        query=integers(256, B, 3, 32, 32),
        query_mask=torch.where(mask == 2, 255, mask).to(torch.uint8),
        support=integers(256, B, K, 3, 32, 32),
        support_masks=integers(2, B, K, 32, 32),
        class_id=torch.tensor(CLASSES).repeat(B)[:B],
        index=torch.arange(B) + 10 * seed,
        spec=[EpisodeSpec(f"query{b}", tuple(f"support{b}_{k}" for k in range(K)), CLASSES[b % 2]) for b in range(B)],
    )


def change_logits(module, change):
    """Makes the head return `change(logits)`. Returns a list that collects these outputs."""
    kept, segment = [], module.network.head.segment

    def changed(*arguments):
        kept.append(change(segment(*arguments).detach()))
        return kept[-1]

    module.network.head.segment = changed
    return kept


# Training


def test_training_loss_is_the_cross_entropy_over_pixels_not_ignored(monkeypatch):
    module, batch = make_module(monkeypatch), make_batch()
    kept = change_logits(module, lambda logits: logits.clone())
    loss = module.training_step(batch, 0)
    p = torch.sigmoid(kept[0][:, 1] - kept[0][:, 0])  # 2-way softmax
    pixels = [
        -torch.log(p[b, i, j] if batch.query_mask[b, i, j] == 1 else 1 - p[b, i, j]).item()
        for b in range(3)
        for i in range(32)
        for j in range(32)
        if batch.query_mask[b, i, j] != 255
    ]
    assert 0 < len(pixels) < 3 * 32 * 32
    assert loss.item() == pytest.approx(sum(pixels) / len(pixels), rel=1e-5)
    assert module.logged["train/loss"] == loss


def test_loss_is_zero_if_every_pixel_is_ignored(monkeypatch):
    module, batch = make_module(monkeypatch), make_batch()
    loss = module.training_step(replace(batch, query_mask=torch.full_like(batch.query_mask, 255)), 0)
    assert loss.item() == 0


@pytest.mark.parametrize("steps, change, warnings", [(500, -1, 1), (100, -1, 0), (500, 1, 0)])
def test_one_warning_if_only_background_is_predicted(monkeypatch, caplog, steps, change, warnings):
    module, batch = make_module(monkeypatch), make_batch()
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(current_epoch=7, global_step=steps))
    change_logits(module, lambda logits: torch.stack([torch.zeros_like(logits[:, 0]), 0 * logits[:, 1] + change], 1))
    for _ in range(2):
        module.validation_step(batch, 0)
        module.on_validation_epoch_end()
    assert sum("only background" in record.message for record in caplog.records) == warnings


def test_gradients_reach_every_part_of_the_head_and_none_of_the_backbone(monkeypatch):
    module = make_module(monkeypatch)
    module.training_step(make_batch(), 0).backward()
    assert all(p.grad is None for p in module.network.backbone.parameters())
    assert [n for n, p in module.network.head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_message_for_a_non_finite_loss_names_the_episode(monkeypatch, value):
    module = make_module(monkeypatch)

    def break_second(logits):
        if len(logits) == 3:  # the batch; its episodes follow one by one
            logits[1, 0] = value
        elif len(kept) == 2:
            logits[0, 0] = value
        return logits

    kept = change_logits(module, break_second)
    with pytest.raises(NonFiniteLossError) as error:
        module.training_step(make_batch(K=2), 0)
    message = str(error.value)
    assert "query1" in message
    assert "support1_0, support1_1" in message
    assert "query0" not in message
    assert "query2" not in message
    assert "epoch 7, step 123" in message


def test_optimizer_gets_only_the_head():
    module = make_module()
    optimizer = module.configure_optimizers()
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in module.network.head.parameters()}


def test_scheduler_changes_the_learning_rate():
    made = make_module(scheduler=partial(StepLR, step_size=1, gamma=0.5)).configure_optimizers()
    made["optimizer"].step()
    made["lr_scheduler"].step()
    assert made["optimizer"].param_groups[0]["lr"] == 0.05


# Validation and test


def test_each_validation_scores_only_its_own_episodes(monkeypatch):
    module = make_module(monkeypatch).eval()
    change_logits(module, lambda logits: torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    for seed in (1, 2):  # one batch per epoch: earlier epochs must not count
        batch = make_batch(seed)
        module.validation_step(batch, 0)
        module.on_validation_epoch_end()
        expected = FewShotIoU(CLASSES)
        pred = module(batch)
        expected.update(pred, batch.query_mask == 1, batch.class_id, batch.query_mask == 255)
        assert module.logged["val/miou"] == expected.compute()["miou"] > 0
        assert module.logged["val/fb_iou"] == expected.compute()["fb_iou"]


def test_result_contains_all_episodes_of_only_the_last_test(monkeypatch):
    module = make_module(monkeypatch).eval()
    kept = change_logits(module, lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(len(kept))))
    for seeds in ((3,), (1, 2)):
        kept.clear()
        module.on_test_epoch_start()
        batches = [make_batch(seed) for seed in seeds]
        for i, batch in enumerate(batches):
            module.test_step(batch, i)
        module.on_test_epoch_end()
    result = module.test_result

    ours, everything, episode_iou = FewShotIoU(CLASSES), FewShotIoU(CLASSES), {}
    for batch, logits in zip(batches, kept, strict=True):
        pred = logits[:, 1] > logits[:, 0]
        truth, ignore = batch.query_mask == 1, batch.query_mask == 255
        ours.update(pred, truth, batch.class_id, ignore)
        everything.update(torch.ones_like(pred), truth, batch.class_id, ignore)
        for b in range(3):
            counted = ~ignore[b]
            both, either = (pred[b] & truth[b])[counted].sum(), (pred[b] | truth[b])[counted].sum()
            episode_iou[int(batch.index[b])] = 100 * both.item() / either.item()
    assert result.scores == {k: v.tolist() for k, v in ours.compute().items()}
    assert result.baselines["all_foreground"] == {k: v.tolist() for k, v in everything.compute().items()}
    assert result.episode_iou == pytest.approx(episode_iou, rel=1e-5)
    assert module.logged["test/miou"].item() == result.scores["miou"]


# Checkpoints


def saved(module):
    checkpoint = {"state_dict": module.state_dict(), "epoch": 4}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_checkpoint_contains_only_the_head_and_names_its_backbone():
    module = make_module()
    checkpoint = saved(module)
    head = {f"network.head.{name}": tensor for name, tensor in module.network.head.state_dict().items()}
    assert checkpoint["state_dict"].keys() == head.keys()
    assert all(torch.equal(checkpoint["state_dict"][name], tensor) for name, tensor in head.items())
    assert checkpoint["backbone"] == module.network.backbone.provenance.as_dict()
    assert checkpoint["backbone"]["backbone"] == "small"
    assert checkpoint["epoch"] == 4


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_not_saved(monkeypatch, value):
    module = make_module(monkeypatch)
    with torch.no_grad():
        module.network.head.decoder.mixer3[2].bias[1] = value
    with pytest.raises(NonFiniteLossError, match=r"network\.head\.decoder\.mixer3\.2\.bias.* epoch 7"):
        saved(module)


def test_loaded_checkpoint_gives_the_same_predictions(tmp_path):
    torch.save(saved(make_module(seed=1)), tmp_path / "a.ckpt")
    module, trained = make_module(seed=2), make_module(seed=1)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(module.eval()(batch), trained.eval()(batch))


def test_checkpoint_of_another_backbone_is_refused_with_both_names():
    module = make_module()
    checkpoint = saved(make_module())
    checkpoint["backbone"] |= {"backbone": "resnet50", "weights": "a1h", "sha256": "0123456789abcdef"}
    with pytest.raises(CheckpointError, match=r"resnet50.*'a1h'.*01234567\).*small.*'none'.*backbone=resnet50"):
        module.on_load_checkpoint(checkpoint)


def test_checkpoint_is_refused_if_the_weights_file_of_its_backbone_has_changed(tmp_path):
    path = tmp_path / "mine.pth"
    state = SmallBackbone("none").trunk.state_dict()
    torch.save(state, path)
    checkpoint = saved(FewShotModule(PMNet(SmallBackbone(str(path))), CLASSES, LOSS, partial(SGD, lr=0.1)))
    state["layer4.0.conv1.weight"] += 1
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"mine\.pth"):
        check_checkpoint(checkpoint, PMNet(SmallBackbone(str(path))))


@pytest.mark.parametrize("options", [{"norm": "group"}, {"b3dconvs": False}, {"linear_heads": True}])
def test_checkpoint_of_another_head_is_refused(options):
    own, theirs = make_module(), make_module(**options)
    check_checkpoint(saved(make_module()), own.network)
    for module, checkpoint in ((own, saved(theirs)), (theirs, saved(own))):
        with pytest.raises(CheckpointError, match=r"another network.*'network\.head\."):
            check_checkpoint(checkpoint, module.network)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"state_dict": {}},
        {"state_dict": {}, "backbone": "resnet50"},
        {"backbone": {"sha256": ""}},
        {"state_dict": {}, "backbone": {"conv1.weight": torch.zeros(1)}},
        {"conv_4d_blocks.2.0.conv1.weight": torch.zeros(1)},
    ],
)
def test_file_of_another_program_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        check_checkpoint(checkpoint, make_module().network)


# Pretraining a backbone


def test_pretraining_ignores_pixels_marked_255_and_trains_the_whole_backbone(monkeypatch):
    torch.manual_seed(0)
    module = BackbonePretraining(SmallBackbone("none"), 4, partial(SGD, lr=0.1), StepLR)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    images = make_batch().query
    classes = torch.randint(0, 4, (3, 32, 32)).to(torch.uint8)
    classes[:, :16] = 255
    module.eval()  # with batch statistics, the image content at ignored pixels would matter
    loss = module.training_step((images, classes), 0)
    with torch.no_grad():
        parts = []
        features = module.backbone(images)
        for layer, classifier in module.classifiers.items():
            logits = torch.nn.functional.interpolate(classifier(features[layer][-1]), (8, 8), mode="bilinear")
            log_p = logits.log_softmax(1)
            at = [(b, i, j) for b in range(3) for i in range(4, 8) for j in range(8)]
            parts.append(-sum(log_p[b, int(classes[b, 4 * i, 4 * j]), i, j] for b, i, j in at) / len(at))
    assert loss.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)
    loss.backward()
    assert [n for n, p in module.backbone.named_parameters() if p.grad is None] == []


# Floors


def test_floors_share_the_backbone_pass_and_score_as_if_tested_alone():
    backbone = SmallBackbone("none")
    floors = {"prototype": Prototype(backbone, "layer2"), "nearest": Nearest(backbone, "layer4")}
    module = FewShotModule(PMNet(backbone), CLASSES, LOSS, partial(SGD, lr=0.1), floors=floors).eval()
    passes, stem = [], backbone.stem
    backbone.stem = lambda images: (passes.append(len(images)), stem(images))[1]
    batches = [make_batch(seed, K=2) for seed in (1, 2)]
    with torch.no_grad():
        for i, batch in enumerate(batches):
            module.log = lambda *_, **__: None
            module.test_step(batch, i)
    assert passes == [9, 9]  # 3 queries and 6 supports
    for name, floor in floors.items():
        expected = FewShotIoU(CLASSES)
        for batch in batches:
            pred = floor.predict(batch.query, batch.support, batch.support_masks)
            expected.update(pred, batch.query_mask == 1, batch.class_id, batch.query_mask == 255)
        assert plain(module.test_baselines[name].compute()) == plain(expected.compute())
    assert not any("floors" in name or "baselines" in name for name in module.state_dict())


def test_photos_are_scored_at_their_own_size(monkeypatch):
    """One by one, against sums over pixels written out; one photo has a border that counts nowhere."""
    module, batch = make_module(monkeypatch).eval(), make_batch()
    random = torch.Generator().manual_seed(5)
    truth = [torch.randint(0, 2, size, generator=random, dtype=torch.uint8) for size in ((40, 70), (31, 17), (9, 50))]
    truth[1][20:] = 255
    batch = replace(batch, truth=truth)
    module.on_test_epoch_start()
    with torch.no_grad():
        module.test_step(batch, 0)
        module.on_test_epoch_end()
        areas = {c: [0, 0] for c in CLASSES}
        for b, mask in enumerate(truth):
            feats = module.network.features(batch.query[b][None], batch.support[b][None], batch.support_masks[b][None])
            seen = module.network.head.see(feats[1], batch.support_masks[b][None])
            logits = module.network.head.segment(feats[0], seen, (32, 32))
            logits = interpolate(logits, mask.shape, mode="bilinear", align_corners=True)
            for (y, x), value in zip(torch.cartesian_prod(*map(torch.arange, mask.shape)), mask.flatten(), strict=True):
                if value != 255:
                    marked = bool(logits[0, 1, y, x] > logits[0, 0, y, x])
                    areas[CLASSES[b % 2]][0] += marked and bool(value)
                    areas[CLASSES[b % 2]][1] += marked or bool(value)
    expected = [100 * i / u for i, u in areas.values()]
    assert module.test_result.scores["iou_per_class"] == pytest.approx(expected, abs=1e-3)
