"""Weights on disk: a folder with `model.safetensors` and `config.json`, loaded strictly."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_modules.backbone.checkpoint_folder import (
    PICKLED,
    exported,
    refuse_other_weights,
    resolve,
    weights_file,
)
from lightning_modules.broken_files import first_line, read_settings, read_torch, refuse_broken
from lightning_modules.files import whole, write_text

_INSIDE = ("model", "module", "state_dict")  # what pickled checkpoints call their weights
M = TypeVar("M", bound=nn.Module)


class CheckpointReader:
    """Reads the tensors of a folder with weights, in one file or several, or of one file, one at a time.

    Pickled weights are read only where there are no safetensors, and only as tensors. A missing file is a
    FileNotFoundError; one that is broken, or holds more than tensors, a ValueError. Both name it.
    """

    def __init__(self, folder: Path) -> None:
        found = weights_file(folder)
        files = [found]
        if found.suffix == ".json":
            names = read_settings(found).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{found} has no 'weight_map', which says which file holds which tensor")
            files = [folder / name for name in sorted(set(names.values()))]
        self._tensors: dict[str, Tensor] = {}  # files mapped to memory, which is filled when a tensor is read
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, which {found.name} names")
            self._tensors |= _tensors_of(path)

    @property
    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, names: Sequence[str]) -> list[int]:
        """The shape of some tensors joined along their first dimension."""
        shapes = [list(self._tensors[name].shape) for name in names]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if len(names) > 1 else shapes[0]

    def read(self, names: Sequence[str]) -> Tensor:
        """Some tensors joined along their first dimension."""
        return torch.cat([self._tensors[name] for name in names]) if len(names) > 1 else self._tensors[names[0]]


def _tensors_of(path: Path) -> dict[str, Tensor]:
    if path.suffix in PICKLED:
        pickled = read_torch(path)
        for name in _INSIDE:
            if isinstance(pickled, dict) and isinstance(pickled.get(name), dict):
                pickled = pickled[name]
        if not isinstance(pickled, dict) or not all(isinstance(value, Tensor) for value in pickled.values()):
            raise ValueError(f"{path} does not hold tensors with names alone")
        return pickled
    refuse_broken(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)}") from error


@torch.no_grad()
def copy_from(stored: CheckpointReader, targets: Mapping[str, Sequence[Tensor]], source: str) -> None:
    """Copy stored tensors into the targets under their names; ValueError if one is missing or of another shape."""
    for key, tensors in targets.items():
        if key not in stored.keys or stored.shape([key]) != list(tensors[0].shape):
            raise ValueError(f"{source} has no tensor {key!r} of shape {list(tensors[0].shape)}")
        for tensor in tensors:
            tensor.copy_(stored.read([key]))


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without the module's frozen parts, whose weights are stored elsewhere."""
    frozen = tuple(f"{part}." for part in getattr(module, "frozen_parts", ()))
    return {key: value for key, value in module.state_dict().items() if not key.startswith(frozen)}


@dataclass(frozen=True)
class Layout:
    """The names that published weights have for the tensors of a module."""

    # The names of the tensors that, joined along their first dimension, are the module's tensor `key`.
    stored_as: Callable[[str], list[str]]
    unused: str = "$."  # pattern of the names of tensors that the module has no use for; by default there are none


def pretrained(module: M, checkpoint: str | None = None, start: str | None = None) -> M:
    """Load a module's weights from a checkpoint (see `resolve`); without one it is as it was initialised.

    A module whose weights are published under other names has `layouts`; the one that knows most of the stored tensors
    is read. `check_stored(config)` and `check_tensors(stored, file)` raise ValueError if the stored config, or what a
    file holds, is of another model. A module with `warm_start` can begin training at the `start`, weights of another
    kind.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a tensor is missing, surplus or of another shape; the sentence names it.
    """
    if checkpoint is None:
        if start is not None:
            module.warm_start(start, CheckpointReader(resolve(start)))  # type: ignore[operator]
        return module
    folder, kind = resolve(checkpoint), type(module).__name__
    stored, expected = CheckpointReader(folder), own_state(module)
    check: Callable[[Mapping[str, Any]], None] = getattr(module, "check_stored", lambda config: None)
    check_tensors: Callable[[CheckpointReader, Path], None] = getattr(
        module, "check_tensors", lambda stored, file: None
    )
    if (folder / "config.json").is_file():
        check(read_settings(folder / "config.json"))
    names, unused = _names_in(stored.keys, [*getattr(module, "layouts", ()), Layout(lambda key: [key])], [*expected])
    used = {name for group in names.values() for name in group}
    other = exported(folder).get("_target_", kind).rpartition(".")[2]
    if other != kind and not used <= stored.keys:
        raise ValueError(f"checkpoint {checkpoint!r} holds the weights of a {other}, not of a {kind}")
    check_tensors(stored, folder)
    for key, value in expected.items():
        if missing := [name for name in names[key] if name not in stored.keys]:
            raise ValueError(f"checkpoint {checkpoint!r} has no tensor {missing[0]!r}, which {kind} needs")
        if (shape := stored.shape(names[key])) != list(value.shape):
            shapes = f"{shape} instead of {list(value.shape)}"
            tensors = " and ".join(map(repr, names[key]))
            raise ValueError(f"checkpoint {checkpoint!r} was made for another model: {tensors} has shape {shapes}")
    if unknown := sorted(name for name in stored.keys - used if not re.match(unused, name)):
        raise ValueError(f"checkpoint {checkpoint!r} has a tensor {unknown[0]!r} unknown to {kind}")
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(stored.read(names[key]))
    return module


def _names_in(keys: set[str], layouts: Sequence[Layout], own: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """Return the stored names of a module's `own` tensors, and the pattern of unused ones, in the fitting layout."""
    found = [({key: layout.stored_as(key) for key in own}, layout.unused) for layout in layouts]
    return max(found, key=lambda pair: sum(name in keys for group in pair[0].values() for name in group))


def export(module: nn.Module, folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Write a module's own weights and the config that builds it, whole or not at all; see `refuse_other_weights`."""
    refuse_other_weights(folder, config)
    tensors = {
        key: value.detach().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for key, value in own_state(module).items()
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")  # first: it says whose the weights are
    with whole(folder / "model.safetensors") as partial:
        partial.write_bytes(save(tensors))


def fingerprint(module: nn.Module) -> str:
    """Hash all weights, frozen parts included, and the layers that they are in, but not their device.

    Of a layer it sees what torch prints. What that leaves out, the `cache_key` of a network must name.
    """
    digest = hashlib.sha256()
    for key, part in module.named_modules():
        heads = part.num_heads if isinstance(part, nn.MultiheadAttention) else ""  # which torch does not print
        digest.update(f"{key} {type(part).__name__}({part.extra_repr()}) {heads}\n".encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy lacks bfloat16
    return digest.hexdigest()[:16]
