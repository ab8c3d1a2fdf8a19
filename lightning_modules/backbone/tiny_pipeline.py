"""Stable Diffusion 3 with few channels and random weights, to try everything on a CPU."""

import string
from pathlib import Path
from typing import Any

import torch

from lightning_modules.files import make_once


def tiny_text_parts() -> tuple[Any, Any]:
    """A tokenizer of letters, and the config of CLIP's text encoder for it."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    letters = string.ascii_lowercase
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends: Any = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1}
    return tokenizer, CLIPTextConfig(vocab_size=len(pieces), **sizes, **ends, projection_dim=16)


def tiny_autoencoder(**more: Any) -> Any:
    """An image autoencoder that halves each side."""
    from diffusers import AutoencoderKL

    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        **blocks, norm_num_groups=4, block_out_channels=(8, 8), latent_channels=4, shift_factor=0.0, scaling_factor=0.5,
        **more,
    )  # fmt: skip


def save_tiny_sd3(folder: str) -> str:
    """Write a pipeline of a few thousand weights, the same each time, and return its folder."""
    make_once(Path(folder), _write_sd3)
    return folder


def _write_sd3(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        tokenizer, text = tiny_text_parts()
        vae = tiny_autoencoder(use_quant_conv=False, use_post_quant_conv=False)
        transformer = SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        )  # fmt: skip
        encoders = [CLIPTextModelWithProjection(text) for _ in range(2)]
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = (transformer, scheduler, vae, encoders[0], tokenizer, encoders[1], tokenizer, None, None)
    pipeline: Any = StableDiffusion3Pipeline(*parts)
    pipeline.save_pretrained(folder)
