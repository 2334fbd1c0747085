"""Keeps Hydra from copying its ConfigStore each time it looks into a config group: `--help` looks 131 times.

The store is a singleton that is only read once plugins are loaded, and what it hands out is a copy anyway. Hydra
imports every module of `hydra_plugins` before it composes a config.
"""

from typing import Any

from hydra.core.config_store import ConfigStore


def itself(store: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    return store


ConfigStore.__deepcopy__ = itself  # type: ignore[attr-defined]
