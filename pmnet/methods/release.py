"""Reads the tensors of the authors' programs into this project's networks."""

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from pmnet.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)


def of_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are not the backbone's, without the prefixes that parallel training adds."""
    state = {re.sub(r"^(module\.|model\.)*", "", name): torch.as_tensor(value) for name, value in state_dict.items()}
    return {name: value for name, value in state.items() if not re.match(r"layer[0-4]\.", name)}


def inputs(state: Mapping[str, Tensor], name: str) -> int:
    """The number of input channels of a convolution."""
    if name not in state or state[name].ndim != 4:
        raise CheckpointError(f"Not a checkpoint of the authors' program: no convolution '{name}'.")
    return state[name].shape[1]


def filled(module: M, state: Mapping[str, Tensor], method: str | None = None, unread: str = "-") -> M:
    """Loads tensors into a head or a trunk, which must have exactly these; returns it in eval mode.

    Args:
        method: name of the method in messages; None: taken from the head's class.
        unread: prefix of the module's tensors that may be missing.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    own = module.state_dict()
    needed = {name for name in own if not name.startswith(unread) and not name.endswith("num_batches_tracked")}
    missing, unknown = sorted(needed - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unknown or wrong:
        raise CheckpointError(
            f"Not a checkpoint of {method or type(module).__name__.removesuffix('Head')} by its authors: "
            f"missing {missing[:3]}, unknown {unknown[:3]}, of another shape {wrong[:3]}."
        )
    module.load_state_dict(state, strict=False)
    return module.eval()
