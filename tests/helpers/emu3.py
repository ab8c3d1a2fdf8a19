"""A tiny Emu3 of random weights, by transformers and as ours."""

from pathlib import Path
from typing import Any

import torch

from lightning_modules.backbone.emu3 import Emu3
from lightning_modules.backbone.emu3_vq import Emu3VQ
from lightning_modules.backbone.loading import pretrained
from lightning_modules.backbone.text import PublishedTokenizer
from lightning_modules.backbone.tiny_text_tokenizer import save_tiny_text_tokenizer
from lightning_modules.backbone.transformer import TransformerConfig

CODES, GRID, NEGATIVE = 24, 3, "blurry"
SPECIAL = ["<|extra_203|>", "<|image start|>", "<|image token|>", "<|extra_200|>", "<image>"]
VOCABULARY = [*SPECIAL, *(f"<|visual token {code:06d}|>" for code in range(CODES))]
TEXT = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 299}  # fmt: skip
VQ = {"codebook_size": CODES, "base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1],
      "attn_resolutions": [1], "hidden_size": 32}  # fmt: skip


def tiny_tokenizer(folder: Path, special: list[str] = SPECIAL, codes: int = CODES) -> PublishedTokenizer:
    """Every byte is a token; the first ids are those of the vocabulary above. It is written to the folder."""
    return PublishedTokenizer(save_tiny_text_tokenizer(str(folder / "text"), special, codes), SPECIAL[0], max_text=30)


def save_emu3(folder: Path) -> Any:
    """Build transformers' Emu3 with sharpened random weights and write it to a folder."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    torch.manual_seed(1)
    vocabulary = {token: place for place, token in enumerate(VOCABULARY)}
    model = Emu3ForConditionalGeneration(Emu3Config(text_config=TEXT, vq_config=VQ, vocabulary_map=vocabulary))
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "vqmodel" not in name:
            weight.data.mul_(8)  # far from uniform
    model.eval().save_pretrained(folder)
    return model


def load_emu3(folder: Path, checkpoint: Path | None = None, **options: Any) -> Emu3:
    """Our Emu3 with the weights of a checkpoint, or with new ones; its text tokenizer is written to the folder."""
    vq, stored = Emu3VQ(2 * GRID, VQ), checkpoint and str(checkpoint)
    sizes = TransformerConfig(
        dim=48, depth=2, heads=6, kv_heads=2, mlp_ratio=2.0, rms_norm=True, swiglu=True, bias=False, norm_eps=1e-5
    )
    options = {"negative_prompt": NEGATIVE} | options
    decoder = Emu3(pretrained(vq, stored), tiny_tokenizer(folder), TEXT["vocab_size"], sizes, **options)
    return pretrained(decoder, stored).eval()
