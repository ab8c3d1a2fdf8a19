"""Which architectures and weights open_clip knows, read without importing it, which imports torch."""

import json
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_ALIAS = "_open_clip_without_torch"
_SLOW = ("safetensors.torch", "huggingface_hub")  # packages that its table of weights can do without


@cache
def _folder() -> Path:
    spec = find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@cache
def _weights() -> ModuleType:
    """open_clip.pretrained, in a package of another name around the same files."""
    package = ModuleType(_ALIAS)
    package.__path__ = [str(_folder())]
    missing = dict.fromkeys(name for name in _SLOW if name not in sys.modules)  # an import of them fails
    modules: dict[str, ModuleType | None] = {_ALIAS: package, **missing}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        return import_module(f"{_ALIAS}.pretrained")
    finally:
        for name in modules:
            del sys.modules[name]


def split_name(name: str) -> tuple[str, str]:
    """`hf-hub:OWNER/NAME`, `local-dir:FOLDER` or an architecture -> the part before the colon, if any, and the rest."""
    place, colon, rest = name.partition(":")
    return (place, rest) if colon else ("", name.replace("/", "-"))


def architectures() -> list[str]:
    """The names of all architectures."""
    return sorted(path.stem for path in (_folder() / "model_configs").glob("*.json"))


@cache
def architecture(name: str) -> dict[str, Any] | None:
    """The settings of an architecture; None if there is none of this name."""
    if name not in architectures():
        return None
    config: dict[str, Any] = json.loads((_folder() / "model_configs" / f"{name}.json").read_text())
    return config


def weights_of(name: str, tag: str) -> dict[str, Any]:
    """What is known of the weights of an architecture under a tag; empty if there are none."""
    return dict(_weights().get_pretrained_cfg(name.replace("/", "-"), tag) or {})


def tags_of(name: str) -> list[str]:
    """The tags of all weights of an architecture."""
    return list(_weights().list_pretrained_tags_by_model(name))
