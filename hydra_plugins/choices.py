"""Lets integers and null choose from config groups: `fold=0`, `fold=0,1,2,3`, `shot=range(1,6)`, `target=null`.

Hydra 1.3 reads `fold=0` as an int and refuses it for a group ("must be a string or a list"), while it accepts
`fold='0'`; it refuses `target=null` and expects `~target`. This module reads the first form as the second. Hydra
imports every module of `hydra_plugins` before it composes a config, so this holds for the command line, for the jobs of
a sweep under any launcher, and for `hydra.compose`.
"""

from functools import wraps

from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.override_parser.types import Override, OverrideType

_init = getattr(Overrides.__init__, "__wrapped__", Overrides.__init__)  # this module may be executed twice


@wraps(_init)
def read_integers_as_names(self: Overrides, repo: IConfigRepository, overrides_list: list[Override]) -> None:
    for override in overrides_list:
        is_choice = not override.is_sweep_override() and repo.group_exists(override.key_or_group)
        if is_choice and type(override.value()) is int:
            override._value = str(override.value())
        elif is_choice and override.value() is None and override.type is OverrideType.CHANGE:
            override.type = OverrideType.DEL
    _init(self, repo, overrides_list)


Overrides.__init__ = read_integers_as_names  # type: ignore[method-assign]
