"""The tree of settings in conf/: which keys and choices there are, and which of them was probably meant."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lightning_modules.runs.messages import flat
from lightning_modules.runs.signatures import signature

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
CLOSE = 0.75  # of two names, as difflib counts: `temp` is not yet close to `temperature`, `genval` is to `geneval`


def options(group: str) -> list[str]:
    """List the files of a group; none if there is no such group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group in GROUPS else []


class SettingsTree:
    """The keys of the config that a command line composes, by overrides that choose an existing file of a group."""

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        pairs = (override.partition("=")[::2] for override in overrides)
        self.choices = {name: option for name, option in pairs if option in options(name.lstrip("+").partition("@")[0])}

    @cached_property
    def keys(self) -> dict[str, Any]:
        """All dotted keys, also of nodes, and their values; the defaults where the choices do not go together."""
        return _composed(*_overrides(self.choices)) or _composed()

    def is_added(self, group: str) -> bool:
        """Say if a file of a group is chosen by `+`: the defaults choose none."""
        defaults = OmegaConf.select(OmegaConf.load(CONF / "train.yaml"), "defaults")
        return group in GROUPS and not any(isinstance(each, Mapping) and group in each for each in defaults)

    def similar(self, name: str) -> list[str]:
        """Find keys or groups of that name elsewhere, or one that is spelt almost so; none that only Hydra reads."""
        keys = [key for key in dict.fromkeys([*GROUPS, *self.keys]) if not key.startswith("hydra.")]
        if name in keys:
            return [name]
        parent, _, last = name.rpartition(".")
        if elsewhere := [key for key in keys if f".{key}".endswith(f".{name}")]:
            return sorted(elsewhere, key=lambda key: (key.count("."), len(key)))[:3]
        keys = [key for key in keys if not name.startswith(f"{key}.")]
        longer = [key for key in keys if key.startswith(name) and key.rpartition(".")[0] == parent]
        alike = [key for key in keys if _is_alike(key, name)]
        if close := longer[:1] or get_close_matches(name, alike, 1, CLOSE):
            return close
        above = parent.rpartition(".")[0]
        if above and parent in self.keys:  # the settings of the nodes beside it are theirs
            keys = [key for key in keys if not re.match(rf"{re.escape(above)}\.\w+\.", key)]
        by_last = {key.rpartition(".")[2]: key for key in reversed(keys) if last[0] != "_"}  # every node has _target_
        return [by_last[match] for match in get_close_matches(last, by_last, 1, CLOSE)]

    def having(self, key: str) -> list[str]:
        """List choices of the key's group with which there is such a key, two of them at most."""
        group, name, *_ = [*key.split("."), ""]
        if group in GROUPS and group not in self.keys:  # the settings of some task
            group, name = "task", group
        texts = {other: (CONF / group / f"{other}.yaml").read_text("utf-8") for other in options(group)}
        sets = [
            other for other, text in texts.items() if re.search(rf"(?m)^ *(- )?/?([\w/@]+\.)?{re.escape(name)}\b", text)
        ]
        likely = sorted(sets, key=lambda other: key.rpartition(".")[2] not in texts[other])[:2]  # to compose takes long
        others = {other: _overrides({**self.choices, group: other}) for other in likely}
        return [f"{group}={other}" for other, overrides in others.items() if key in _composed(*overrides)]

    def within(self, key: str) -> list[str]:
        """Find keys of that name in nodes of the node that the key would be in."""
        node, _, name = key.rpartition(".")
        return [other for other in self.keys if node and other.startswith(f"{node}.") and other.endswith(f".{name}")]

    def takes(self, key: str) -> bool:
        """Say if what is built of the node around the key takes a setting of that name."""
        node, _, name = key.rpartition(".")
        target = self.keys.get(f"{node}._target_")
        return target is not None and name in signature(target)

    def around(self, key: str) -> tuple[str, list[str]]:
        """Find the node that the key would be in, or the nearest one above; returns it and the names in it."""
        parent = key.rpartition(".")[0]
        below = [other.rpartition(".") for other in self.keys]
        names = [last for above, _, last in below if above == parent and last[0] != "_" and last != "hydra"]
        return (parent, names) if names or not parent else self.around(parent)


def _is_alike(key: str, other: str) -> bool:
    """Say if two keys have as many parts, each somewhat like its counterpart."""
    parts, others = key.split("."), other.split(".")
    return len(parts) == len(others) and all(
        get_close_matches(part, [counterpart]) for part, counterpart in zip(parts, others, strict=True)
    )


@cache
def _composed(*choices: str) -> dict[str, Any]:
    """Return all keys of the config with these choices, and their values; none where they do not go together."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", list(choices), True)
    except HydraException:
        return {}
    return dict(flat(OmegaConf.to_container(config)))


def _overrides(choices: Mapping[str, str]) -> list[str]:
    return [f"{group}={option}" for group, option in choices.items()]
