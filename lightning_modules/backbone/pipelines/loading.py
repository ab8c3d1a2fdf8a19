"""Pipelines of diffusers: loading them, and what tells them apart."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_modules.backbone.checkpoint_folder import from_hub
from lightning_modules.broken_files import first_line, read_settings, refuse_broken_folder
from lightning_modules.cache_key import class_name, digest, published_key


def load_pipeline(checkpoint: str, dtype: str, without: Sequence[str], kinds: Collection[str] | None = None) -> Any:
    """Load a text-to-image pipeline of diffusers.

    Args:
        checkpoint: a folder, or OWNER/NAME on the hub, with safetensors; code that comes with it is not run.
        dtype: of the weights.
        without: parts that are not loaded, such as `text_encoder_3` and `tokenizer_3` of Stable Diffusion 3.
        kinds: names of the classes that it may have; None: any.

    Raises:
        ImportError, FileNotFoundError: diffusers is not installed; there is no such checkpoint.
        ValueError: its class is none of `kinds`. No weights are loaded then.
    """
    try:
        from diffusers import AutoPipelineForText2Image
    except ImportError as error:
        raise ImportError("pipelines of diffusers need diffusers: pip install -e '.[diffusers]'") from error
    load: Any = AutoPipelineForText2Image.from_pretrained
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, **dict.fromkeys(without)}
    folder = Path(checkpoint)
    try:
        if folder.exists():
            refuse_broken_folder(folder)
        else:
            folder = from_hub(checkpoint, ["model_index.json"])  # unlike diffusers, it says what is the matter
        index = folder / "model_index.json"
        if kinds is not None and index.is_file() and (kind := read_settings(index).get("_class_name")) not in kinds:
            raise ValueError(
                f"decoder.checkpoint: {kind} cannot be run step by step here, as {', '.join(sorted(kinds))} can; "
                "decoder=diffusion makes its images whole"
            )
        pipeline = load(checkpoint, **options)
    except OSError as error:
        raise FileNotFoundError(f"decoder.checkpoint: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_key(pipeline: Any) -> dict[str, Any]:
    """What tells a pipeline apart beside the weights: its class and config, and those of its parts."""
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    return {
        "pipeline": digest([class_name(pipeline), published_key(pipeline.config)]),
        "parts": {name: digest([class_name(part), _part_key(part)]) for name, part in parts.items()},
    }


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _part_key(part: Any) -> dict[str, Any]:
    """What decides the work of a part beside the weights: its config, or a tokenizer's vocabulary."""
    from diffusers import ConfigMixin
    from transformers import PreTrainedTokenizerBase

    if isinstance(part, nn.Module | ConfigMixin):
        config: Any = part.config
        return published_key(config if isinstance(config, Mapping) else config.to_dict())
    if isinstance(part, PreTrainedTokenizerBase):
        return {"vocabulary": digest(part.get_vocab()), "length": part.model_max_length}
    return {}
