"""Weights on disk: a folder with `model.safetensors` and `config.json`, loaded strictly."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_modules.broken_files import first_line, read_json, read_settings, read_torch, refuse_broken
from lightning_modules.files import whole, write_text

BUNDLED = Path(__file__).parent.parent / "bundled"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.safetensors", "pytorch_model.bin")
M = TypeVar("M", bound=nn.Module)


def resolve(checkpoint: str, advice: str | None = None) -> Path:
    """A folder with weights: a path, `bundled:NAME` for weights that come with the package, or OWNER/NAME on the hub.

    Args:
        checkpoint: which of these.
        advice: see `from_hub`.

    Raises:
        FileNotFoundError: there are no weights.
    """
    name = checkpoint.removeprefix("bundled:")
    folder = BUNDLED / name if name != checkpoint else Path(checkpoint)
    if any((folder / file).is_file() for file in _WEIGHTS):
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        known = ", ".join(sorted(f"bundled:{path.parent.name}" for path in BUNDLED.glob("*/model.safetensors")))
        raise FileNotFoundError(f"checkpoint {checkpoint!r}: no model.safetensors in {folder} (there are: {known})")
    return from_hub(checkpoint, ["*.safetensors", "*.json", "*.bin"], advice)


def from_hub(name: str, patterns: Sequence[str], advice: str | None = None, **options: Any) -> Path:
    """The folder in which the hub's files of OWNER/NAME are kept on this machine; fetched if they are not there yet.

    Args:
        name: of the model.
        patterns: of the files.
        advice: what to do where the hub cannot be reached; null says how to set a checkpoint to a folder.
        options: of `snapshot_download`, such as `revision`.

    Raises:
        FileNotFoundError: there is no such model, or no network.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except (OSError, ValueError) as error:
        advice = advice or f"run `hf download {name} --local-dir FOLDER`, then set the checkpoint to that folder"
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor to be had from the Hugging Face hub ({type(error).__name__}); where "
            f"there is network {advice}"
        ) from error


class CheckpointReader:
    """The tensors of a folder with weights, in one file or several, read one at a time.

    Pickled weights are read only where there are no safetensors, and only as tensors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or holds more than tensors; the sentence names it.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            named = read_settings(index).get("weight_map")
            if not isinstance(named, dict):
                raise ValueError(f"{index} has no 'weight_map', which says what is in which file")
            files = sorted(set(named.values()))
        else:
            files = [next(file for file in _WEIGHTS if (folder / file).is_file())]
        self._shapes: dict[str, list[int]] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file} is missing, which {index.name} names")
            if file.endswith(".bin"):
                pickled = read_torch(folder / file)
                if not isinstance(pickled, dict):
                    raise ValueError(f"{folder / file} holds no tensors with names")
                self._shapes |= {key: list(value.shape) for key, value in pickled.items()}
                self._read |= {key: partial(pickled.__getitem__, key) for key in pickled}
            else:
                refuse_broken(folder / file)
                try:
                    opened = safe_open(folder / file, framework="pt")
                except SafetensorError as error:
                    raise ValueError(f"{folder / file} is not a safetensors file: {first_line(error)}") from error
                self._shapes |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
                self._read |= {key: partial(opened.get_tensor, key) for key in opened.keys()}  # noqa: SIM118

    @property
    def keys(self) -> set[str]:
        return set(self._shapes)

    def shape(self, names: Sequence[str]) -> list[int]:
        """The shape of some tensors joined along their first dimension."""
        first, *rest = (self._shapes[name] for name in names)
        return [first[0] + sum(shape[0] for shape in rest), *first[1:]] if rest else first

    def read(self, names: Sequence[str]) -> Tensor:
        """Some tensors joined along their first dimension."""
        return torch.cat([self._read[name]() for name in names]) if len(names) > 1 else self._read[names[0]]()


def copy_from(stored: CheckpointReader, begin: Mapping[str, Sequence[Tensor]], where: str) -> None:
    """Copy tensors into those that begin with them, by their stored names.

    Raises:
        ValueError: one is missing or of another shape; the sentence names it, and `where` it is missing.
    """
    with torch.no_grad():
        for key, targets in begin.items():
            if key not in stored.keys or stored.shape([key]) != list(targets[0].shape):
                raise ValueError(f"{where} has no tensor {key!r} of shape {list(targets[0].shape)}")
            for target in targets:
                target.copy_(stored.read([key]))


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without the module's frozen parts, which have weights of their own elsewhere."""
    frozen = tuple(f"{part}." for part in getattr(module, "frozen_parts", ()))
    return {key: value for key, value in module.state_dict().items() if not key.startswith(frozen)}


def pretrained(module: M, checkpoint: str | None = None, start: str | None = None) -> M:
    """Load a module's weights; without a checkpoint the module is as it was initialised, or as it is at the `start`.

    Args:
        module: to be loaded.
        checkpoint: its weights; see `resolve`.
        start: where training begins if there are none: weights of another kind of model, for modules that have
            `warm_start`.

    A module whose weights are published under other names says so in `stored_as`: the names of the tensors that, joined
    along their first dimension, are one of its own. One that can tell from a `config.json` that weights are another
    model's has `check_stored`.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a tensor is missing, surplus or of another shape; the sentence names it.
    """
    if checkpoint is None:
        if start is not None:
            module.warm_start(start, CheckpointReader(resolve(start)))  # type: ignore[operator]
        return module
    folder = resolve(checkpoint)
    stored, expected = CheckpointReader(folder), own_state(module)
    stored_as: Callable[[str], list[str]] = getattr(module, "stored_as", lambda key: [key])
    check: Callable[[Mapping[str, Any]], None] = getattr(module, "check_stored", lambda config: None)
    if (folder / "config.json").is_file():
        check(read_settings(folder / "config.json"))
    names = {key: stored_as(key) for key in expected}
    for key, value in expected.items():
        if missing := [name for name in names[key] if name not in stored.keys]:
            raise ValueError(f"checkpoint {checkpoint!r} has no tensor {missing[0]!r}, which {_name(module)} needs")
        if (shape := stored.shape(names[key])) != list(value.shape):
            shapes = f"{shape} instead of {list(value.shape)}"
            tensors = " and ".join(map(repr, names[key]))
            raise ValueError(f"checkpoint {checkpoint!r} was made for another model: {tensors} has shape {shapes}")
    if surplus := sorted(stored.keys - {name for group in names.values() for name in group}):
        raise ValueError(f"checkpoint {checkpoint!r} has a tensor {surplus[0]!r} unknown to {_name(module)}")
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(stored.read(names[key]))
    return module


def _name(module: nn.Module) -> str:
    return type(module).__name__


def export(module: nn.Module, folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Write a module's own weights and the config that builds it, whole or not at all.

    Raises:
        ValueError: the folder holds weights of something else.
    """
    refuse_other_weights(folder, config)
    tensors = {
        key: value.detach().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for key, value in own_state(module).items()
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")  # first: it says whose the weights are
    with whole(folder / "model.safetensors") as partial:
        partial.write_bytes(save(tensors))


def refuse_other_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder holds weights, or a config of some, that are not an export of the same network."""
    there = [name for name in (*_WEIGHTS, "config.json") if (folder / name).is_file()]
    stored = read_json(folder / "config.json") if "config.json" in there else None
    if there and not (isinstance(stored, dict) and _network(stored) == _network(json.loads(json.dumps(config)))):
        raise ValueError(f"export_dir: {folder} holds {there[0]} of something else: name another folder")


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an exported config that does not say where its weights came from."""
    return {key: value for key, value in config.items() if key not in ("checkpoint", "start")}


def fingerprint(module: nn.Module) -> str:
    """A short hash of all weights, frozen parts included, and of the layers that they are in; the device is not in it.

    A layer is what torch prints of it. What that leaves out, such as the heads of most attention layers, is for the
    `cache_key` of who uses the network.
    """
    digest = hashlib.sha256()
    for key, part in module.named_modules():
        heads = part.num_heads if isinstance(part, nn.MultiheadAttention) else ""  # which torch does not print
        digest.update(f"{key} {type(part).__name__}({part.extra_repr()}) {heads}\n".encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy lacks bfloat16
    return digest.hexdigest()[:16]
