"""Reads checkpoints of the authors' program (github.com/chenhao-zju/PMNet) into `PMNetHead`."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pmnet.errors import CheckpointError
from pmnet.methods.pmnet.hsfm import Norm
from pmnet.methods.pmnet.network import PMNetHead

STAGE = {"2": "layer3", "3": "layer4"}
CONV1 = {"conv1": "a", "conv23": "b_wide", "conv21": "b_point", "conv33": "c_wide", "conv31": "c_point", "conv4": "out"}
CONV2 = {"conv11": "x1", "conv13": "x2", "conv21": "y1", "conv23": "y2.0", "conv33": "y2.1", "conv4": "out"}
ROOTS = r"(?:^|\.)((?:conv_4d_blocks|linears|conv_layer|conv4|conv5|mixer[123])\..*)"


def from_release(state_dict: Mapping[str, Tensor]) -> PMNetHead:
    """Builds the head from a checkpoint of the authors' program.

    The number of blocks, the kind of norm, the channels and the use of linear heads are inferred from the tensors. The
    backbone's tensors and the position codes, which are constants, are ignored.

    Args:
        state_dict: tensors by the authors' names; prefixes such as `module.model.` are allowed.

    Returns:
        The head in eval mode.

    Raises:
        CheckpointError: a tensor of the head is missing, unknown, or has an unexpected shape.

    Example:
        >>> import torch
        >>> from pmnet.methods import from_release
        >>> state_dict = torch.load("released.pth", weights_only=True)  # doctest: +SKIP
        >>> head = from_release("pmnet", state_dict)  # doctest: +SKIP
    """
    release = {}
    for key, value in state_dict.items():
        found = re.search(ROOTS, key)
        if found and "feature_extractor" not in key and "backbone" not in key.split("."):
            release[found.group(1)] = torch.as_tensor(value)
    try:
        blocks = {STAGE[i]: release[f"conv_4d_blocks.{i}.0.conv1.weight"].shape[1] for i in STAGE}
        low = release["mixer1.0.weight"].shape[1] - 64  # a third of it from layer1, the rest from layer2
    except KeyError as error:
        raise CheckpointError(f"This is not a checkpoint of the authors' PMNet: it has no tensor {error}.") from error
    linear_heads = "linears.2.0.weight" in release
    layer3 = release["linears.2.0.weight"].shape[0] if linear_heads else 4 * low // 3
    channels = {"layer1": low // 3, "layer2": 2 * low // 3, "layer3": layer3, "layer4": 2 * layer3}
    norm: Norm = "batch" if "conv_4d_blocks.2.1.running_mean" in release else "group"
    try:
        head = PMNetHead(channels, blocks, norm=norm, linear_heads=linear_heads)
    except ValueError as error:
        raise CheckpointError(f"mixer1.0.weight has a shape that fits no backbone: {error}.") from error

    own = head.state_dict()
    renamed = {rename(key): value for key, value in release.items()}
    for key, value in renamed.items():
        if key.endswith("query_conv.weight") and value.ndim == 5:  # release: (o, i, 1, k, k) over permuted axes
            renamed[key] = value.movedim(2, 4)
    missing, unknown = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    wrong = [k for k in own.keys() & renamed.keys() if own[k].shape != renamed[k].shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            "The tensors are not those of the authors' PMNet or DAM: "
            f"missing {missing[:3]}, unknown {unknown[:3]}, of another shape {wrong[:3]}."
        )
    head.load_state_dict(renamed)
    return head.eval()


def rename(key: str) -> str:
    """Converts a tensor's name in the authors' program to its name in `PMNetHead`."""
    root, *path = key.split(".")
    if root == "conv_4d_blocks":  # <stage>.<0 conv, 1 norm, 3 conv, 4 norm>...
        stage, step, *rest = path
        part = "norm." if step in "14" else ""
        rest = [{"conv1": "query_conv", "conv2": "support_conv"}.get(name, name) for name in rest]
        return f"hsfm.{STAGE.get(stage, stage)}.b3dconvs.{int(step) // 3}.{part}{'.'.join(rest)}"
    if root == "linears":  # <stage>.<0 query, 1 support>...
        stage, side, *rest = path
        return f"affinity.{STAGE.get(stage, stage)}.{('query', 'support')[int(side)]}_linear.{'.'.join(rest)}"
    if root == "conv_layer":
        stage, conv, *rest = path
        return f"decoder.conv1_{int(stage) + 1}.{CONV1.get(conv, conv)}.{'.'.join(rest)}"
    if root in ("conv4", "conv5"):
        conv, *rest = path
        return f"decoder.conv2_{'a' if root == 'conv4' else 'b'}.{CONV2.get(conv, conv)}.{'.'.join(rest)}"
    return f"decoder.{key}"
