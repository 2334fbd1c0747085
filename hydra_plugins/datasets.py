"""Makes every dataset of `conf/dataset/` a choice of the groups `target` and `validation` too, from the same file."""

from pathlib import PurePosixPath

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP, ALIASES = "dataset", ("target", "validation")


class DatasetSource(FileConfigSource):
    """A config folder in which the groups `target` and `validation` are other names of `dataset`, and nothing else."""

    @staticmethod
    def scheme() -> str:
        return "datasets"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(real(config_path))

    def available(self) -> bool:
        return FileConfigSource.is_group(self, GROUP)

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (is_alias(config_path) and super().is_group(real(config_path)))

    def is_config(self, config_path: str) -> bool:
        return is_alias(config_path) and super().is_config(real(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return list(ALIASES) if results_filter is not ObjectType.CONFIG else []
        return FileConfigSource(self.provider, self.path).list(real(config_path), results_filter)


class DatasetSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in list(search_path.get_path()):
            folder = element.path.removeprefix("file://")
            if element.provider == "main" and "://" not in folder:
                search_path.append(provider="datasets", path=f"{DatasetSource.scheme()}://{folder}")


def is_alias(config_path: str) -> bool:
    return PurePosixPath(config_path).parts[:1] in [(alias,) for alias in ALIASES]


def real(config_path: str) -> str:
    """The path in the group `dataset`: target/isic -> dataset/isic."""
    return str(PurePosixPath(GROUP, *PurePosixPath(config_path).parts[1:]))
