"""The head against a golden file of the authors' program and against a second, plain implementation."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmnet.methods.pmnet.affinity
import pmnet.methods.pmnet.lean
from pmnet import PMNet, PMNetHead
from pmnet.backbones import SmallBackbone
from pmnet.backbones.dilated import DilatedResNetBackbone
from pmnet.backbones.vgg import VGGBackbone
from pmnet.errors import CheckpointError, SettingError
from pmnet.methods.nearest import NearestHead
from pmnet.methods.pmnet import decoder, from_release
from pmnet.methods.pmnet.affinity import Affinity, Dropout
from pmnet.methods.pmnet.hsfm import share
from pmnet.methods.pmnet.lean import filtered
from pmnet.methods.prototype import PrototypeHead
from tests.pmnet.methods import plain_pmnet as plain
from tests.pmnet.methods.plain_network import plain_network_head
from tests.pmnet.methods.plain_pmnet import plain_head

RESNET = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
SMALL = {"layer1": 8, "layer2": 16, "layer3": 32, "layer4": 64}
BLOCKS = {"layer3": 3, "layer4": 2}
VARIANTS = {
    "default": {},
    "group": {"norm": "group"},
    "no_b3dconvs": {"b3dconvs": False},
    "no_background": {"support_background": False},
    "dam": {"norm": "group", "linear_heads": True},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture
def exact_code(monkeypatch):
    """Replaces the float32 position code by one in float64, so that comparisons in float64 hold to 1e-9."""
    monkeypatch.setattr(
        pmnet.methods.pmnet.affinity, "position_code", lambda t, c, like: plain.position_code(t, c).to(like)
    )


def random_head(seed=0, channels=SMALL, blocks=BLOCKS, **options):
    """A head in eval mode with no tensor at its initial value, so that a test fails if one is left out."""
    torch.manual_seed(seed)
    head = PMNetHead(channels, blocks, **options).eval()
    for name, tensor in head.state_dict().items():
        if name.endswith("running_var") or (name.endswith(("norm.weight", ".1.weight")) and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.2)
    return head


def random_inputs(seed=0, shots=1, batch=1, query_size=(64, 64), support_size=(64, 64), dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)

    def features(layer, size, *axes):
        stride = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}[layer]
        shape = (*axes, SMALL[layer], size[0] // stride, size[1] // stride)
        return [torch.randn(shape, generator=random, dtype=dtype) / 2 for _ in range(BLOCKS.get(layer, 1))]

    query = {layer: features(layer, query_size, batch) for layer in SMALL}
    support = {layer: features(layer, support_size, batch, shots) for layer in BLOCKS}
    masks = torch.rand(batch, shots, *support_size, generator=random) < 0.4
    return query, support, masks.to(dtype)


def with_shots(support, masks, order):
    return {layer: [block[:, order] for block in blocks] for layer, blocks in support.items()}, masks[:, order]


# The authors' program


def golden_inputs(golden):
    def features(side, layer):
        keys = sorted(k for k in golden if k.startswith(f"{side}/{layer}."))
        return [torch.from_numpy(golden[k]).float() for k in keys]

    query = {layer: features("query", layer) for layer in RESNET}
    support = {layer: [f[:, None] for f in features("support0", layer)] for layer in BLOCKS}
    return query, support, torch.from_numpy(golden["support_masks"])


def golden_weights(golden):
    return {k.removeprefix("weights/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("weights/")}


@pytest.fixture
def golden(shared):
    return dict(np.load(shared / "golden" / "pmnet_resnet50_1shot.npz"))


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_logits_equal_those_of_the_authors_program(golden, prefix):
    others = {
        "feature_extractor.layer4.2.conv3.weight": torch.zeros(1),
        "feature_extractor.conv4.weight": torch.zeros(1),
        "backbone.conv1.weight": torch.zeros(1),
        "backbone.layers.2.blocks.0.conv5.weight": torch.zeros(1),
        "pe.0.pe": torch.zeros(1, 576, 1024),
        "pe.1.pe": torch.zeros(1, 144, 2048),
    }
    release = golden_weights(golden) | (others if prefix else {})
    head = from_release({prefix + name: tensor for name, tensor in release.items()})
    with torch.no_grad():
        logits = head(*golden_inputs(golden))
    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=0, atol=1e-6)


def test_plain_implementation_agrees_with_the_authors_program(golden):
    head = from_release(golden_weights(golden))
    with torch.no_grad():
        logits = plain_head(head, *golden_inputs(golden))
    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=0, atol=1e-5)


def release_state(head):
    """The head's tensors under the names of the authors' program."""
    sides = {"query_conv": "conv1", "support_conv": "conv2"}
    conv1 = {"a": "conv1", "b_wide": "conv23", "b_point": "conv21", "c_wide": "conv33", "c_point": "conv31"}
    conv2 = {"x1": "conv11", "x2": "conv13", "y1": "conv21", "y2.0": "conv23", "y2.1": "conv33"}
    release = {}
    for own, tensor in head.state_dict().items():
        name = own
        if m := re.fullmatch(r"hsfm\.layer(\d)\.b3dconvs\.(\d)\.(\w+)\.(\w+)", own):
            layer, pair, part, end = int(m[1]), int(m[2]), m[3], m[4]
            step = f"{3 * pair + 1}" if part == "norm" else f"{3 * pair}.{sides[part]}"
            name = f"conv_4d_blocks.{layer - 1}.{step}.{end}"
            if own.endswith("query_conv.weight"):
                tensor = tensor.movedim(4, 2)
        elif m := re.fullmatch(r"affinity\.layer(\d)\.(query|support)_linear\.(\w+)", own):
            name = f"linears.{int(m[1]) - 1}.{'01'[m[2] == 'support']}.{m[3]}"
        elif m := re.fullmatch(r"decoder\.conv1_(\d)\.(\w+)\.(\d\.\w+)", own):
            name = f"conv_layer.{int(m[1]) - 1}.{conv1.get(m[2], 'conv4')}.{m[3]}"
        elif m := re.fullmatch(r"decoder\.conv2_(a|b)\.(\w+|y2\.\d)\.(\d\.\w+)", own):
            name = f"{'conv4' if m[1] == 'a' else 'conv5'}.{conv2.get(m[2], 'conv4')}.{m[3]}"
        elif own.startswith("decoder.mixer"):
            name = own.removeprefix("decoder.")
        release[name] = tensor
    return release


RELEASED = {
    "group": {"norm": "group"},
    "batch": {"norm": "batch"},
    "dam": {"norm": "group", "linear_heads": True},
    "dam_batch": {"norm": "batch", "linear_heads": True},
}


def test_release_state_has_the_names_of_the_golden_file(golden):
    head = PMNetHead(RESNET, {"layer3": 6, "layer4": 3}, norm="group")
    shapes = {name: tensor.shape for name, tensor in golden_weights(golden).items()}
    assert {name: tensor.shape for name, tensor in release_state(head).items()} == shapes


@pytest.mark.parametrize("options", RELEASED.values(), ids=RELEASED.keys())
def test_options_are_inferred_from_a_release_state_dict(options):
    head = random_head(**options)
    read = from_release(release_state(head))
    assert not read.training
    assert read.state_dict().keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_channels_of_other_backbones_are_inferred_from_a_release():
    channels = {"layer1": 128, "layer2": 256, "layer3": 512, "layer4": 1024}
    head = PMNetHead(channels, {"layer3": 18, "layer4": 2}, norm="group")
    read = from_release(release_state(head))
    assert {n: t.shape for n, t in read.state_dict().items()} == {n: t.shape for n, t in head.state_dict().items()}


@pytest.mark.parametrize(
    "name", ["mixer3.2.bias", "conv_4d_blocks.2.0.conv1.weight", "conv5.conv33.1.weight", "mixer1.0.weight"]
)
def test_missing_tensor_of_a_release_is_refused(name):
    release = release_state(random_head(norm="group"))
    del release[name]
    with pytest.raises(CheckpointError):
        from_release(release)


@pytest.mark.parametrize(
    "name",
    [
        "mixer3.4.weight",
        "conv_4d_blocks.2.6.conv1.bias",
        "conv4.conv23.2.weight",
        "conv_layer.2.conv99.0.weight",
        "conv5.conv99.0.bias",
        "conv_4d_blocks.1.0.conv1.weight",
        "linears.1.0.weight",
    ],
)
def test_unknown_tensor_of_a_release_is_refused(name):
    release = release_state(random_head(norm="group"))
    like = {"conv_layer.2.conv99.0.weight": "conv_layer.2.conv4.0.weight", "conv5.conv99.0.bias": "conv5.conv4.0.bias"}
    release[name] = torch.zeros_like(release[like.get(name, "mixer3.2.bias")])
    with pytest.raises(CheckpointError):
        from_release(release)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("conv_layer.3.conv1.0.weight", (16, 15, 3, 3)),
        ("mixer3.2.bias", (3,)),
        ("mixer1.0.weight", (64, 64 + 25, 3, 3)),
        ("conv_4d_blocks.2.3.conv1.weight", (16,)),
    ],
)
def test_release_tensor_of_another_shape_is_refused(name, shape):
    release = release_state(random_head(norm="group"))
    release[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError):
        from_release(release)


@pytest.mark.parametrize("state", [{}, {"fc.weight": torch.zeros(2, 2)}])
def test_state_dict_of_another_program_is_refused(state):
    with pytest.raises(CheckpointError):
        from_release(state)


# Size


@pytest.mark.parametrize(
    "blocks, options, count",
    [
        ({"layer3": 6, "layer4": 3}, {}, 675_362),
        ({"layer3": 6, "layer4": 3}, {"norm": "group"}, 675_362),
        ({"layer3": 23, "layer4": 3}, {}, 688_962),
        ({"layer3": 6, "layer4": 3}, {"linear_heads": True}, 11_167_266),
    ],
    ids=["resnet50", "resnet50_group", "resnet101", "dam"],
)
def test_parameter_count(blocks, options, count):
    assert sum(p.numel() for p in PMNetHead(RESNET, blocks, **options).parameters() if p.requires_grad) == count


def test_channels_that_cannot_be_split_into_heads_are_refused():
    with pytest.raises(SettingError, match="multiple of 8 channels, not 36 and"):
        PMNetHead(SMALL | {"layer3": 36}, BLOCKS)


@pytest.mark.parametrize("build", [VGGBackbone, partial(DilatedResNetBackbone, "resnet50s")])
def test_backbone_of_other_strides_is_refused(build):
    with pytest.raises(SettingError, match="PMNet needs a backbone with strides of 4, 8, 16, 32"):
        PMNet(build("none"))


# Agreement with the plain implementation


@pytest.mark.parametrize("tokens, channels", [(576, 16), (144, 2048), (7, 1024)])
def test_position_code_follows_the_formula(tokens, channels):
    code = pmnet.methods.pmnet.affinity.position_code(tokens, channels, torch.zeros(1))
    torch.testing.assert_close(code.double(), plain.position_code(tokens, channels), rtol=0, atol=2e-4)


@every_variant
@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.usefixtures("exact_code")
def test_head_agrees_with_the_plain_implementation(options, shots):
    head = random_head(**options).double()
    inputs = random_inputs(shots=shots, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(head(*inputs), plain_head(head, *inputs), rtol=0, atol=1e-9)


@every_variant
@pytest.mark.usefixtures("exact_code")
def test_head_agrees_on_images_that_are_not_square(options):
    head = random_head(**options).double()
    inputs = random_inputs(shots=2, query_size=(64, 96), support_size=(96, 32))
    with torch.no_grad():
        logits = head(*inputs)
        assert logits.shape == (1, 2, 64, 96)
        torch.testing.assert_close(logits, plain_head(head, *inputs), rtol=0, atol=1e-9)


@every_variant
@pytest.mark.usefixtures("exact_code")
def test_gradients_agree_with_the_plain_implementation(options):
    head = random_head(**options).double()
    query, support, masks = random_inputs(shots=2)
    inputs = [block.requires_grad_() for side in (query, support) for blocks in side.values() for block in blocks]
    wanted = {**dict(head.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    weighting = torch.randn(1, 2, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((logits * weighting).sum(), wanted.values())
        for logits in (head(query, support, masks), plain_head(head, query, support, masks))
    ]
    for name, ours, theirs in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        # biases are exempt, because a normalisation may cancel them
        assert name.endswith("bias") or theirs.abs().max() > 1e-9, f"{name} does not matter in this test"


@pytest.mark.parametrize("largest", [1, 1000, 20_000])
@pytest.mark.parametrize("options", [{}, {"norm": "group"}, {"b3dconvs": False}, {"evidence": ["nearest"]}])
def test_processing_in_parts_changes_nothing(options, largest, monkeypatch):
    """Pairs, heads and rows of the query one after the other: each row's neighbours are seen as before."""
    network = PMNet(SmallBackbone("none"), **options).double().eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm3d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    source = torch.Generator().manual_seed(3)
    query, support = (
        torch.rand(2, *shape, generator=source, dtype=torch.double) for shape in ((3, 256, 96), (2, 3, 96, 128))
    )
    masks = (torch.rand(2, 2, 96, 128, generator=source) < 0.4).double()
    with torch.no_grad():
        at_once = network(query, support, masks)
        monkeypatch.setattr(pmnet.methods.pmnet.lean, "ON_CPU", largest)
        torch.testing.assert_close(network(query, support, masks), at_once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("largest", [1, 2**21])
def test_training_agrees_with_standard_operations(norm, largest, monkeypatch):
    """Includes batch statistics, which the plain implementation lacks."""
    monkeypatch.setattr(pmnet.methods.pmnet.lean, "ON_CPU", largest)
    head = random_head(norm=norm, dropout=0.0).double().train()
    inputs = random_inputs(batch=3)
    running = {name: t.clone() for name, t in head.named_buffers()}
    found = []
    for forward in (head, partial(plain_network_head, head)):
        head.load_state_dict(running, strict=False)
        logits = forward(*inputs)
        gradients = torch.autograd.grad(logits.square().mean(), list(head.parameters()))
        found.append([logits, *gradients, *(t.clone() for t in head.buffers())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_batch_norms_may_stay_in_eval_mode_in_training():
    head, inputs = random_head(dropout=0.0).double(), random_inputs(batch=2)
    with torch.no_grad():
        expected, running = head(*inputs), {name: t.clone() for name, t in head.named_buffers()}
    head.train()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.eval()
    logits = head(*inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(t, running[name]) for name, t in head.named_buffers())
    logits.square().mean().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_other_norm_classes_are_called_in_training():
    """`trainer.sync_batchnorm=true` replaces each BatchNorm."""

    class Counting(torch.nn.BatchNorm3d):
        seen = 0

        def forward(self, x):
            Counting.seen += 1
            return super().forward(x)

    head, inputs = random_head(dropout=0.0).double().train(), random_inputs(batch=2)
    expected = head(*inputs)
    for layer in (layer for m in head.hsfm.values() for layer in m.b3dconvs):
        norm = Counting(layer.norm.num_features).double()
        norm.load_state_dict(layer.norm.state_dict())
        layer.norm = norm
    torch.testing.assert_close(head(*inputs), expected, rtol=0, atol=1e-12)
    assert Counting.seen == 4


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradients_through_a_norm_are_rounded_once(norm, low):
    """Like PyTorch's norms. If each step were rounded to float16, small gradients of a scaled loss would vanish."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(4, 900, 16, generator=random).mul_(3).add_(1).to(low)
    given = torch.randn(4, 900, 16, generator=random).mul_(1e-4).to(low)
    layer = torch.nn.BatchNorm3d(16) if norm == "batch" else torch.nn.GroupNorm(4, 16)
    mean, rstd, groups = pmnet.methods.pmnet.lean.statistics(layer, z)
    rectified = pmnet.methods.pmnet.lean.Rectified(z, mean, rstd, layer.weight.detach(), layer.bias.detach(), groups)
    ours = rectified.backward(lambda i, y: given[i].clone())[0]

    exact = z.double().requires_grad_()
    normed = layer.double()(exact.movedim(2, 1)[..., None, None]).flatten(2).movedim(1, 2)
    (theirs,) = torch.autograd.grad(normed.relu(), exact, given.double())
    decided = normed.abs() > 1e-3  # closer to 0, rounding may change the sign
    worst = (ours.double() - theirs).abs()[decided].max() / theirs.abs().max()
    assert worst < torch.finfo(low).eps


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradients_in_half_precision_are_close_to_those_in_full(norm):
    """The maps are large because PyTorch's bfloat16 gradients of convolutions are inaccurate on maps below 8x8."""
    head = random_head(norm=norm, dropout=0.0).train()
    inputs = random_inputs(query_size=(256, 256), support_size=(256, 256), dtype=torch.float32)
    found = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = head(*inputs)
        found.append(torch.autograd.grad(logits.float().square().mean(), list(head.parameters())))
    for (name, parameter), full, half in zip(head.named_parameters(), *found, strict=True):
        assert half.dtype == parameter.dtype
        alike = torch.cosine_similarity(full.flatten(), half.flatten(), dim=0)
        assert alike > 0.95 or full.norm() < 1e-5, f"{name}: {alike}"


@pytest.mark.parametrize("shots", [1, 3])
def test_standard_operations_agree_with_the_head(shots):
    head, inputs = random_head().double(), random_inputs(shots=shots, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(plain_network_head(head, *inputs), head(*inputs), rtol=0, atol=1e-12)


def test_whole_network_agrees_with_the_plain_implementation():
    torch.manual_seed(0)
    network = PMNet(SmallBackbone("none"), norm="group").eval()
    query, support = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 3, 96, 64)
    masks = torch.rand(2, 3, 96, 64) < 0.5
    with torch.no_grad():
        of_shots = [network.backbone(support[:, k]) for k in range(3)]
        support_feats = {
            layer: [torch.stack(blocks, dim=1) for blocks in zip(*[shot[layer] for shot in of_shots], strict=True)]
            for layer in ("layer3", "layer4")
        }
        expected = plain_head(network.head, network.backbone(query), support_feats, masks)
        torch.testing.assert_close(network(query, support, masks), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("few", [0, 100], ids=["nine products", "one convolution"])
def test_both_forms_of_the_mixing_convolution_are_the_convolution(few: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoder, "FEW", few)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5 + 3, 4, 3, padding=1).double()
    inputs = torch.randn(2, 5, 3, 4).double().requires_grad_(), torch.randn(2, 3, 6, 8).double().requires_grad_()
    weights = torch.randn(2, 4, 6, 8).double()

    def plain(coarse, fine):
        larger = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
        return F.conv2d(torch.cat([larger, fine], dim=1), conv.weight, conv.bias, padding=1)

    made, want = decoder.fused(conv, *inputs), plain(*inputs)
    torch.testing.assert_close(made, want)
    wrt = [*inputs, *conv.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((x * weights).sum(), wrt) for x in (made, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 30.0])
def test_evidence_of_one_block_is_that_of_all_channels(scale: float):
    """Values and gradients, also where affinities differ by less than the softmax shows."""
    torch.manual_seed(0)
    S, mask = (scale * torch.randn(2, 4, 5, 6)).requires_grad_(), torch.rand(2, 6)
    made = share(S, mask)
    want = [x[..., 0].unflatten(0, (2, 4)) for x in filtered(S.flatten(0, 1)[..., None], mask.repeat_interleave(4, 0))]
    for ours, theirs in zip(made, want, strict=True):
        weights = torch.randn_like(ours)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad((x * weights).sum(), S, retain_graph=True)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*grads)


def test_dropout_applies_to_query_and_support_tokens_in_training():
    torch.manual_seed(0)
    affinity = Affinity(8)
    # token 0 has the code 0, 1, 0, 1, ...; the sum is 1, 0, 1, 0, ..., so each head's inner product is 1 * 1
    feature = torch.tensor([1.0, -1.0] * 4).view(1, 8, 1, 1).expand(4096, -1, -1, -1)
    affinity.train()
    (S,) = affinity(affinity.query_tokens([feature]), affinity.support_tokens([feature]))
    assert set(S.unique().tolist()) == {0.0, 4.0}  # (1 / 0.5) ** 2 where neither was dropped
    assert (S == 4).float().mean().item() == pytest.approx(0.25, abs=0.02)
    affinity.eval()
    (S,) = affinity(affinity.query_tokens([feature]), affinity.support_tokens([feature]))
    assert (S == 1).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_dropout_drops_its_share_independently_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout = Dropout(p)
    x = torch.full((3, 1_000_001), 2.0)
    y = dropout(x)
    assert y.unique().tolist() == [0.0, pytest.approx(2 / (1 - p))]
    dropped = (y == 0).double()
    torch.testing.assert_close(dropped.mean(1), torch.full((3,), p, dtype=torch.float64), rtol=0, atol=0.003)
    for lag in (1, 2, 3, 4, 5, 8):  # entries that share a draw, and those that do not
        both = (dropped[:, lag:] * dropped[:, :-lag]).mean().item()
        assert both == pytest.approx(p * p, abs=0.002)
    for i in range(4):
        assert dropped[0, i::4].mean().item() == pytest.approx(p, abs=0.004)
    assert not torch.equal(dropout(x), y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_rate_is_an_option_of_the_network(dropout):
    network = PMNet(SmallBackbone("none"), norm="group", dropout=dropout)
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 64, 64), torch.randn(1, 1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    with torch.no_grad():
        inputs[2][..., :32] = 0
        in_training, in_test = network.train()(*inputs), network.eval()(*inputs)
    assert torch.allclose(in_training, in_test, atol=1e-6) == (dropout == 0)


# Shots


@every_variant
def test_order_of_shots_does_not_matter(options):
    head = random_head(**options).double()
    query, support, masks = random_inputs(shots=3, batch=2)
    with torch.no_grad():
        logits = head(query, support, masks)
        torch.testing.assert_close(head(query, *with_shots(support, masks, [2, 0, 1])), logits, rtol=0, atol=1e-9)
        swapped = head(query, with_shots(support, masks, [2, 0, 1])[0], masks)  # masks of other shots
    assert (swapped - logits).abs().max() > 1e-6


@every_variant
def test_repeating_a_support_changes_nothing(options):
    head = random_head(**options).double()
    query, support, masks = random_inputs()
    with torch.no_grad():
        once, repeated = head(query, support, masks), head(query, *with_shots(support, masks, [0] * 4))
    torch.testing.assert_close(repeated, once, rtol=0, atol=1e-9)


def test_number_of_shots_may_differ_between_calls():
    head = random_head().double()
    query, support, masks = random_inputs(shots=5)
    with torch.no_grad():
        first = head(query, *with_shots(support, masks, [0]))
        five = head(query, support, masks)
        again = head(query, *with_shots(support, masks, [0]))
    assert five.shape == first.shape
    assert torch.equal(first, again)
    assert (five - first).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_may_have_any_dtype(dtype):
    head = random_head().double()
    query, support, masks = random_inputs()
    with torch.no_grad():
        assert torch.equal(head(query, support, masks.to(dtype)), head(query, support, masks))


# Processing supports once


@pytest.fixture(scope="module")
def network():
    return PMNet(SmallBackbone("none")).eval()


@pytest.mark.parametrize("episodes, queries", [(1, 1), (1, 3), (2, 2)])
def test_see_and_segment_equal_forward(network, episodes, queries):
    torch.manual_seed(0)
    query, support = torch.randn(queries, 3, 64, 96), torch.randn(episodes, 2, 3, 96, 64)
    masks = torch.rand(episodes, 2, 96, 64) < 0.4
    passes = []
    hook = network.backbone.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    with torch.no_grad():
        seen = network.see(support, masks)
        logits = [network.segment(query, seen) for _ in range(2)]
        assert passes == [2 * episodes, queries, queries]
        hook.remove()
        expected = network(query, support.expand(queries, -1, -1, -1, -1), masks.expand(queries, -1, -1, -1))
    for again in logits:
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_segment_refuses_queries_that_do_not_match(network):
    seen = network.see(torch.rand(2, 1, 3, 32, 32), torch.ones(2, 1, 32, 32))
    with pytest.raises(ValueError, match="3 queries do not match the supports of 2 episodes"):
        network.segment(torch.rand(3, 3, 32, 32), seen)
    with pytest.raises(ValueError, match="multiples of 32"):
        network.segment(torch.rand(2, 3, 33, 32), seen)
    with pytest.raises(ValueError, match=r"masks \(B,K,H,W\)"):
        network.see(torch.rand(2, 1, 3, 32, 32), torch.ones(2, 2, 32, 32))


# Wrong input


@pytest.mark.parametrize(
    "query_size, support_size", [((100, 64), (64, 64)), ((64, 48), (64, 64)), ((64, 64), (64, 65))]
)
def test_sides_must_be_multiples_of_32(network, query_size, support_size):
    with pytest.raises(ValueError, match="multiples of 32"):
        network(torch.rand(1, 3, *query_size), torch.rand(1, 1, 3, *support_size), torch.ones(1, 1, *support_size))


@pytest.mark.parametrize("queries, masks", [(2, (1, 2)), (1, (1, 1)), (1, (2, 2))])
def test_shapes_must_match(network, queries, masks):
    with pytest.raises(ValueError, match="expected query"):
        network(torch.rand(queries, 3, 32, 32), torch.rand(1, 2, 3, 32, 32), torch.ones(*masks, 32, 32))


# Evidence of the floors


def test_head_with_evidence_starts_as_the_sum_of_the_floors():
    torch.manual_seed(0)
    head = PMNetHead(SMALL, BLOCKS, evidence=["prototype", "nearest"]).eval().double()
    query, support, masks = random_inputs(shots=2, batch=2)
    floors = [kind("layer4")(query, support, masks) for kind in (PrototypeHead, NearestHead)]
    torch.testing.assert_close(head(query, support, masks), sum(floors))


def test_evidence_is_a_coarse_mask_that_learns():
    head = PMNetHead(SMALL, BLOCKS, evidence=["prototype"], dropout=0.0).double()
    query, support, masks = random_inputs()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        head(query, support, masks)[:, 1].mean().backward()
        optimizer.step()
    extra = [head.decoder.conv1_3.a[0].weight.grad[:, 16:], head.decoder.conv1_4.a[0].weight.grad[:, 16:]]
    assert all(gradient.shape[1] == 1 and gradient.abs().sum() > 0 for gradient in extra)


def test_unknown_evidence_is_refused():
    with pytest.raises(SettingError, match=r"model\.evidence=oracle is not one of prototype, nearest"):
        PMNetHead(SMALL, BLOCKS, evidence=["oracle"])
