"""Cache keys: all that decides a result, as each thing says itself. Whatever is stored is found again by them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

# What a published model's config says about where it comes from, which decides nothing.
_ORIGIN = ("transformers_version", "architectures", "dtype")


class Keyed(ABC):
    """Something on which results depend."""

    @abstractmethod
    def cache_key(self) -> Any:
        """Return all that decides its results, as plain data: settings, weights, bytes.

        What changes no result is not in it: names, paths, devices, sizes of batches, what has been computed so far.
        """


def class_name(thing: object) -> str:
    """Name the class of a thing, with its module."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def key_of(value: Any) -> Any:
    """Return the key of a setting: its own, that of a dataclass, or the plain value; raises ValueError for others."""
    if isinstance(value, Keyed):
        return value.cache_key()
    if is_dataclass(value) and not isinstance(value, type):
        return fields_key(value)
    if isinstance(value, Mapping):
        return {str(name): key_of(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [key_of(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # in a config, 1 and 1.0 are one number
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{class_name(value)} decides results, and does not say its cache_key")


def fields_key(thing: Any) -> dict[str, Any]:
    """Return the key of a dataclass, its class and the fields it is compared by; raises ValueError for others."""
    if not is_dataclass(thing):
        raise ValueError(f"{class_name(thing)} is no dataclass, so it has to say its cache_key itself")
    compared = {entry.name: getattr(thing, entry.name) for entry in fields(thing) if entry.compare}
    return {"class": class_name(thing), **{name: key_of(value) for name, value in compared.items()}}


def published_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of a published model's own config (of transformers or diffusers)."""
    named = {str(name): value for name, value in config.items()}
    kept = {name: value for name, value in named.items() if not name.startswith("_") and name not in _ORIGIN}
    return {name: published_key(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def digest(key: Any) -> str:
    """Hash a key to a short name."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
