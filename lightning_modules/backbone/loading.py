"""Weights on disk: a folder with `model.safetensors` and `config.json`, loaded strictly."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BUNDLED = Path(__file__).parent.parent / "bundled"
M = TypeVar("M", bound=nn.Module)


def resolve(checkpoint: str) -> Path:
    """A folder with weights: a path, or `bundled:NAME` for weights that come with the package.

    Raises:
        FileNotFoundError: there is no `model.safetensors` in it.
    """
    name = checkpoint.removeprefix("bundled:")
    folder = BUNDLED / name if name != checkpoint else Path(checkpoint)
    if not (folder / "model.safetensors").is_file():
        known = ", ".join(sorted(f"bundled:{path.parent.name}" for path in BUNDLED.glob("*/model.safetensors")))
        raise FileNotFoundError(f"checkpoint {checkpoint!r}: no model.safetensors in {folder} (there are: {known})")
    return folder


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without the module's frozen parts, which have weights of their own elsewhere."""
    frozen = tuple(f"{part}." for part in getattr(module, "frozen_parts", ()))
    return {key: value for key, value in module.state_dict().items() if not key.startswith(frozen)}


def pretrained(module: M, checkpoint: str | None = None) -> M:
    """Load a module's weights; without a checkpoint the module stays as it was initialised.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a tensor is missing, surplus or of another shape; the sentence names it.
    """
    if checkpoint is None:
        return module
    folder = resolve(checkpoint)
    stored, expected = load_file(folder / "model.safetensors"), own_state(module)
    for key in expected:
        if key not in stored:
            raise ValueError(f"checkpoint {checkpoint!r} has no tensor {key!r}, which {type(module).__name__} needs")
        if stored[key].shape != expected[key].shape:
            shapes = f"{list(stored[key].shape)} instead of {list(expected[key].shape)}"
            raise ValueError(f"checkpoint {checkpoint!r} was made for another model: {key!r} has shape {shapes}")
    if surplus := sorted(stored.keys() - expected.keys()):
        raise ValueError(f"checkpoint {checkpoint!r} has a tensor {surplus[0]!r} unknown to {type(module).__name__}")
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(stored[key])
    return module


def export(module: nn.Module, folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Write a module's own weights and the config that builds it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.detach().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for key, value in own_state(module).items()
    }
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial)
    os.replace(partial, folder / "model.safetensors")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary one, so that it appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def fingerprint(module: nn.Module) -> str:
    """A short hash of all weights, frozen parts included: equal exactly if the module computes the same."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
