"""Says which file and line of a config cannot be read, where Hydra would print a traceback.

Hydra imports every module of `hydra_plugins` before it composes a config.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

DEFAULTS = (
    "defaults must be a list of names and of pairs such as - override /backbone: small. Put quotes around a number: "
    "- override /shot: '5'"
)
NO_SETTINGS = "it holds no settings. Write them as name: value"
Load = Callable[[FileConfigSource, str], ConfigResult]
_load: Load = getattr(FileConfigSource.load_config, "__wrapped__", FileConfigSource.load_config)


@wraps(_load)
def load_config(self: FileConfigSource, config_path: str) -> ConfigResult:
    """Raises ConfigCompositionException, which Hydra shows without a traceback, if the file is not a sound config."""
    path = Path(self.path) / self._normalize_file_name(config_path)
    try:
        result = _load(self, config_path)
    except ConfigLoadError:  # the file is not there
        raise
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise wrong(path, *reason(path, error)) from None
    if not isinstance(result.config, DictConfig) or is_word(path, result.config):
        raise wrong(path, root_of(path).start_mark.line + 1, NO_SETTINGS)
    plain: Any = OmegaConf.to_container(result.config, resolve=False)
    unsound = unsound_default(plain.get("defaults", []))
    if unsound is not None:
        raise wrong(path, line_of_default(path, unsound), DEFAULTS)
    return result


def wrong(path: Path, line: int | None, why: str) -> ConfigCompositionException:
    where = f" (line {line})" if line else ""
    return ConfigCompositionException(f"Error: {path.absolute()}{where} cannot be read: {why}.")


def reason(path: Path, error: Exception) -> tuple[int | None, str]:
    """The line at which a file is wrong, from 1, and what is wrong."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return error.problem_mark.line + 1, str(error.problem)
    if isinstance(error, UnicodeDecodeError):  # its position is within a part of the file
        lines = enumerate(path.read_bytes().split(b"\n"), start=1)
        return next(n for n, line in lines if not is_utf8(line)), "it is not UTF-8. Save it in this encoding"
    if isinstance(error, yaml.reader.ReaderError):
        before = path.read_text(encoding="utf-8")[: error.position]
        return before.count("\n") + 1, f"character U+{error.character:04X} is not allowed"
    if "Invalid loaded object" in str(error):
        return root_of(path).start_mark.line + 1, NO_SETTINGS
    if "header" in str(error) or "components" in str(error):
        header = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        at = next(n for n, text in header if text.strip().startswith("#") and text.lstrip(" #").startswith("@"))
        return at, f"{error}. Write, for example, # @package _global_"
    return None, (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def is_word(path: Path, config: DictConfig) -> bool:
    """Whether the file is a word or a sentence, of which OmegaConf makes a setting without a value."""
    without_value = OmegaConf.to_container(config, resolve=False) == dict.fromkeys(config)
    return len(config) == 1 and without_value and isinstance(root_of(path), yaml.ScalarNode)


def root_of(path: Path) -> yaml.Node:
    return yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)


def unsound_default(defaults: Any) -> int | None:
    """The index of an item that is neither a name nor a pair of group and choice; -1 if there is no list, or None."""
    if not isinstance(defaults, list):
        return -1
    return next((i for i, item in enumerate(defaults) if not is_sound(item)), None)


def is_sound(item: Any) -> bool:
    if not isinstance(item, dict):
        return isinstance(item, str)
    choices = [c for choice in item.values() for c in (choice if isinstance(choice, list) else [choice])]
    named = len(item) == 1 and all(isinstance(group, str) for group in item)
    return named and all(choice is None or isinstance(choice, str) for choice in choices)


def line_of_default(path: Path, item: int) -> int:
    """The line of an item of `defaults`, or of their beginning for -1."""
    key, value = next(pair for pair in root_of(path).value if pair[0].value == "defaults")
    node = key if item < 0 else value.value[item]
    return node.start_mark.line + 1


FileConfigSource.load_config = load_config  # type: ignore[method-assign]
