"""GenEval's detector and colour classifier, small and with random weights (always the same), to try all on a CPU."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from lightning_modules.files import make_once
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES

_CLIP: Any = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_PREPROCESS = {"size": [32, 32], "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}


def save_tiny_mask2former(folder: str, labels: int = len(CLASS_NAMES)) -> str:
    """Write a random Mask2Former of a few thousand weights that finds something, and return its folder."""
    make_once(Path(folder), partial(_write_mask2former, labels=labels))
    return folder


def _write_mask2former(folder: Path, labels: int) -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin: Any = {"image_size": 64, "embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
    swin["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    sizes: Any = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    sizes |= {"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_queries": 12, "num_labels": labels}
    config = Mask2FormerConfig(backbone_config=SwinConfig(**swin), **sizes)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "class_predictor" in name:
                weight.mul_(32)  # sure of some objects, and not of the same ones in every image
            elif "mask_embedder" in name or "queries" in name:
                weight.mul_(8)  # masks of all shapes
    model.save_pretrained(folder)


def save_tiny_clip(folder: str) -> str:
    """Write a random CLIP, and return its name for open_clip."""
    make_once(Path(folder), _write_clip)
    return f"local-dir:{folder}"


def _write_clip(folder: Path) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        clip = open_clip.CLIP(_CLIP["embed_dim"], _CLIP["vision_cfg"], _CLIP["text_cfg"], quick_gelu=True)
    with torch.no_grad():
        for weight in clip.parameters():
            if weight.ndim > 1:
                weight.mul_(3)  # so that colours are told apart
    folder.mkdir()
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": _CLIP, "preprocess_cfg": _PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
