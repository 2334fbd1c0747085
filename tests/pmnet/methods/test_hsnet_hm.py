"""HSNet with hybrid masking beside its golden file."""

from types import SimpleNamespace

import pytest
import torch

from pmnet.backbones import ResNetBackbone, SmallBackbone
from pmnet.errors import SettingError
from pmnet.methods import all_methods, from_release
from pmnet.methods.hsnet import HSNet, HSNetHead
from pmnet.methods.hsnet_hm import HSNetHM, HSNetHMHead
from tests.pmnet.methods.dense import DenseGolden, norm
from tests.pmnet.methods.ruled import assert_masks, assert_near

LOSS = torch.nn.CrossEntropyLoss(ignore_index=255)


@pytest.fixture
def golden(shared):
    return DenseGolden(shared / "golden" / "methods" / "hsnet_hm_resnet50_1shot.npz")


@pytest.mark.slow
def test_logits_loss_and_gradients(golden):
    head = from_release("hsnet_hm", golden.under("weights")).head
    assert not head.training
    query, support, masks = golden.features()
    with torch.no_grad():
        assert_near(head(query, support, masks), golden["logits"])
        assert_masks(head.predict(query, support, masks), golden["logits"])
        other_names = {f"masked_{m[:6]}" if m.endswith("_masked") else m: fs for m, fs in support.items()}
        assert_near(head(query, other_names, masks), golden["logits"])
    loss = head.train().loss(query, support, masks, golden["query_mask"], LOSS)
    assert_near(loss, golden["loss"].float())
    loss.backward()
    gradients = {f"hpn_learner.{name}": p.grad for name, p in head.named_parameters()}
    for name, expected in golden.under("grad_norm").items():
        assert_near(norm(gradients[name]), expected, 1e-4)
    for name, expected in golden.under("grad").items():
        assert_near(gradients[name], expected, 1e-4)


def test_same_parameters_as_hsnet():
    blocks = {"layer2": 4, "layer3": 6, "layer4": 3}
    torch.manual_seed(0)
    head = HSNetHMHead(blocks)
    assert sum(p.numel() for p in head.parameters()) == 2_573_794
    assert head.state_dict().keys() == HSNetHead(blocks).state_dict().keys()
    found = all_methods()
    assert (found["hsnet"], found["hsnet_hm"]) == (HSNet, HSNetHM)
    assert not found.keys() & {"hybrid", "votes", "correlation", "conv4d"}


def images(B=2, K=3, H=72, W=88):
    random = torch.Generator().manual_seed(0)
    query, support = (torch.randint(0, 256, (*n, 3, H, W), generator=random).byte() for n in ((B,), (B, K)))
    masks = torch.zeros(B, K, H, W, dtype=torch.uint8)
    masks[..., H // 4 : H // 2, W // 3 :] = 1
    return query, support, masks


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 3])
def test_method_passes_the_masked_images_too(K):
    torch.manual_seed(0)
    method = HSNetHM(SmallBackbone("none")).eval()
    query, support, masks = images(K=K)
    seen = method.see(support, masks)
    assert torch.equal(method.mask(query, seen), method.predict(query, support, masks))
    logits = method(query, support, masks)
    torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-6)

    backbone, reads = method.backbone, method.support_reads
    normalised = (support / 255 - backbone.mean) / backbone.std
    of_images, of_masked = (
        {m: [f.unflatten(0, (2, K)) for f in fs] for m, fs in backbone(x.flatten(0, 1), reads).items()}
        for x in (normalised, normalised * masks[:, :, None])
    )
    support_feats = of_images | {f"{m}_masked": fs for m, fs in of_masked.items()}
    expected = method.head(backbone(query, reads), support_feats, masks)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_features_without_a_masked_pass_are_refused():
    head = HSNetHMHead({"layer2": 1, "layer3": 1, "layer4": 1})
    with pytest.raises(SettingError, match="masked support images"):
        head.see({"layer2": [torch.zeros(1, 1, 2, 3, 3)]}, torch.ones(1, 1, 24, 24))


def test_one_step_of_training():
    torch.manual_seed(0)
    method = HSNetHM(ResNetBackbone("resnet18", "none")).train()
    query, support, masks = images(K=1)
    episode = SimpleNamespace(query=query, support=support, support_masks=masks, query_mask=masks[:, 0])
    optimizer = torch.optim.Adam(method.learned(), lr=1e-3)
    loss = method.loss(episode, LOSS)
    loss.backward()
    optimizer.step()
    assert method.loss(episode, LOSS) < loss
