"""The weights of the golden files, which are made from the tensors' names by a rule, and what the files hold."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def ruled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, float32, made from its name alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(("running_mean", "bias")):
        value = 0.1 * random.standard_normal(shape)
    elif name.endswith("running_var"):
        value = 0.75 + 0.5 * random.random_sample(shape)
    elif len(shape) == 1 and name.endswith("bn3.weight"):
        value = 0.3 + 0.2 * random.random_sample(shape)
    elif len(shape) == 1:
        value = 0.8 + 0.4 * random.random_sample(shape)
    else:
        value = math.sqrt(2 / math.prod(shape[1:])) * random.standard_normal(shape)
    if name.startswith("down_conv"):
        value = value / 4
    elif name.startswith("down_") or name in ("layer5.0.weight", "layer9.weight"):
        value = value / 16
    return value.astype(np.float32)


class Golden:
    """One golden file.

    Args:
        path: of the .npz.

    Attributes:
        checksums: the authors' tensor names -> shape, sum, first value.
    """

    def __init__(self, path: Path) -> None:
        self.file = np.load(path)
        self.checksums = json.loads(str(self.file["checksums"]))

    def __getitem__(self, key: str) -> Tensor:
        value = torch.from_numpy(self.file[key])
        return value.float() if value.dtype == torch.float16 else value

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The values whose keys begin with `prefix/`, by the rest of the key."""
        return {key.removeprefix(f"{prefix}/"): self[key] for key in self.file.files if key.startswith(f"{prefix}/")}

    def features(self, whose: str) -> dict[str, list[Tensor]]:
        """Those of "query" or "support": layer -> a list of one."""
        return {layer: [value] for layer, value in self.under(f"features/{whose}").items()}

    def weights(self) -> dict[str, Tensor]:
        """Every tensor by its authors' name; checked."""
        state = {}
        for name, (shape, total, first) in self.checksums.items():
            stored = f"weights/{name}" in self.file.files
            tensor = self[f"weights/{name}"] if stored else torch.from_numpy(ruled(name, tuple(shape)))
            assert list(tensor.shape) == shape, name
            np.testing.assert_allclose(tensor.double().sum(), total, rtol=1e-6, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(float(tensor.flatten()[0]), first, rtol=1e-6, err_msg=name)
            state[name] = tensor
        return state


def assert_near(value: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Equal within a share of the largest expected value."""
    assert value.shape == expected.shape
    error, largest = float((value.detach() - expected).abs().max()), float(expected.abs().max())
    assert error <= share * largest, f"off by {error / largest:.1e} of the largest value"


def assert_masks(masks: Tensor, logits: Tensor, share: float = 1e-5) -> None:
    """Asserts that masks (..., H, W) are the larger of two logits (..., 2, H, W), where rounding does not decide.

    Args:
        share: of the largest logit, by which `assert_near` lets the logits differ.
    """
    margin = logits.select(-3, 1) - logits.select(-3, 0)
    clear = margin.abs() > 2 * share * logits.abs().max()
    assert clear.float().mean() > 0.9999
    assert torch.equal(masks[clear], margin[clear] > 0)


def gradient_norms(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The L2 norm of every parameter's gradient, by its name."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g.norm() for name, g in zip(named, gradients, strict=True) if g is not None}


def without_dropout(module: torch.nn.Module) -> torch.nn.Module:
    """In training mode, but for what is random in it."""
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout | torch.nn.Dropout2d):
            part.p = 0.0
    return module
