"""The methods, one file each, and the contract they keep (`base.py`)."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from pmnet.errors import SettingError
from pmnet.methods.base import Head, Method

__all__ = ["Head", "Method", "all_methods", "from_release"]


@cache
def all_methods() -> dict[str, type[Method]]:
    """Every method, found by its file: the file's name -> the class."""
    found: dict[str, type[Method]] = {}
    for module in iter_modules(__path__):
        for kind in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(kind, type) and issubclass(kind, Method) and is_home(module.name, kind):
                found[module.name] = kind
    return found


def is_home(name: str, kind: type) -> bool:
    return f"{kind.__module__}.".startswith(f"{__name__}.{name}.") and kind is not Method


def from_release(name: str, state_dict: Mapping[str, Tensor], **options: Any) -> Head:
    """Builds a method's learned part from the tensors of its authors' program.

    Args:
        name: of the method's file: "pmnet", "hsnet", ...
        state_dict: tensors by the authors' names; prefixes such as "module." are tolerated.
        options: of the method, see its file.

    Returns:
        The head in eval mode: `head(query_feats, support_feats, support_masks)` gives logits (B, 2, H, W) at the
        masks' size, `head.predict(...)` the mask (B, H, W) bool.

    Raises:
        SettingError: there is no such method, or its authors published no weights.
        CheckpointError: a tensor is missing, unknown, or of an unexpected shape.
    """
    released = [n for n in all_methods() if hasattr(import_module(f"{__name__}.{n}"), "from_release")]
    if name not in released:
        raise SettingError(f"'{name}' is not a method with published weights. Choose one of {', '.join(released)}.")
    return import_module(f"{__name__}.{name}").from_release(state_dict, **options)
