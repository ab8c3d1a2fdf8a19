"""The project's config, composed as a run composes it; configs that differ in values alone share the slow part."""

import pickle
from functools import cache

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

import lightning_modules.runs.checkpoints  # noqa: F401  (registers resolvers of the config)
from tests.helpers.overrides import ROOT

CONF = ROOT / "conf"


def composed(*overrides: str) -> DictConfig:
    """Compose train.yaml with overrides and with Hydra's own settings."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [] if any("searchpath" in item for item in overrides) else [each for each in parsed if _is_value(each)]
    config: DictConfig = pickle.loads(_pickled(*(str(each.input_line) for each in parsed if each not in values)))
    ConfigLoaderImpl._apply_overrides_to_config(values, config)  # which is what Hydra does with them, at the end
    config.hydra.overrides.task = [str(each.input_line) for each in parsed if not each.is_hydra_override()]
    return config


def _is_value(override: Override) -> bool:
    """Say if an override chooses no file of conf/."""
    key = str(override.key_or_group)
    return override.package is None and not override.is_hydra_override() and not (CONF / key).is_dir()


@cache
def _pickled(*overrides: str) -> bytes:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return pickle.dumps(compose("train", list(overrides), return_hydra_config=True))
