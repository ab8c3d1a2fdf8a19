"""Tiny real decoders, PARMs and judges with random weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from datamodules.shapes.prompts import vocabulary
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.flow import FlowDecoder
from lightning_modules.backbone.image_tokenizer import CodeVectors, PatchVQ
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.showo import ShowO
from lightning_modules.backbone.text import WordTokenizer, word_spans
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.rewards.parm import PARM, InputFeatures
from tests.helpers.overrides import ROOT

SHOWO = ROOT / "tests" / "golden" / "showo"
SHOWO_CONFIG = json.loads((SHOWO / "config.json").read_text())
FEATURES = [name for name in DecoderFeatures.__dataclass_fields__ if name not in ("undecided", "passes")]
VISION = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 41, "width": 32, "heads": 2, "layers": 1}


class Numbers:
    """Prompts that are written as their text ids."""

    size = SHOWO_CONFIG["showo"]["llm_vocab_size"]
    end_of_text = SHOWO_CONFIG["special_ids"]["<|eot|>"]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in prompt.split()] for prompt in prompts]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        return word_spans(prompt)


def phi(dim: int, depth: int, heads: int, mlp_ratio: float, checkpointing: bool = False) -> TransformerConfig:
    """A Transformer of Show-o's make."""
    more = {"parallel": True, "qk_norm": True, "gelu": "tanh", "checkpointing": checkpointing}
    return TransformerConfig(dim, depth, heads, mlp_ratio, **more)  # type: ignore[arg-type]


def make_showo(checkpointing: bool = False, **changes: Any) -> ShowO:
    """An untrained Show-o of the golden one's sizes, without an image tokenizer."""
    tokenizer: Any = torch.nn.Module()
    tokenizer.codebook_size, tokenizer.num_tokens = (
        SHOWO_CONFIG["showo"]["codebook_size"],
        SHOWO_CONFIG["showo"]["num_vq_tokens"],
    )
    golden = SHOWO_CONFIG["phi"]
    dim, heads = golden["hidden_size"], golden["num_attention_heads"]
    transformer = phi(dim, golden["num_hidden_layers"], heads, golden["intermediate_size"] / dim, checkpointing)
    rotary_dims = int(golden["partial_rotary_factor"] * dim / heads)
    sizes = {"max_text": SHOWO_CONFIG["max_text_len"], "rotary_dims": rotary_dims} | changes
    return ShowO(tokenizer, Numbers(), transformer=transformer, **sizes).eval()


def make_flow(depth: int = 2, image_size: int = 16) -> FlowDecoder:
    """A flow decoder of 16 tokens an image, sharpened like `make_decoder`; no layer is zero."""
    torch.manual_seed(0)
    tokenizer = PatchVQ(codebook_size=32, grid=4, image_size=image_size, width=16, blocks=1)
    torch.nn.init.uniform_(tokenizer.codebook)
    transformer = TransformerConfig(dim=32, depth=depth, heads=4)
    text = WordTokenizer(vocabulary(), 12)
    flow = FlowDecoder(CodeVectors(tokenizer), text, 14, transformer, 4, feature_layers=[1, depth])
    with torch.no_grad():
        for name, weight in flow.named_parameters():
            if name in ("stem.2.weight", "time_proj.weight"):
                weight.normal_(std=0.1)
            elif weight.ndim > 1 and not name.startswith("image_tokenizer."):
                weight.mul_(5)
    return flow.eval()


def make_decoder(grid: int = 4, depth: int = 3) -> CompactDecoder:
    """A decoder of 16 tokens an image with sharpened random weights, so that distributions are far from uniform."""
    torch.manual_seed(0)
    tokenizer = PatchVQ(codebook_size=32, grid=grid, image_size=64, width=16, blocks=1)
    torch.nn.init.uniform_(tokenizer.codebook)
    transformer = TransformerConfig(dim=32, depth=depth, heads=4)
    decoder = CompactDecoder(tokenizer, vocabulary(), 12, transformer, text_depth=1, feature_layers=[1, depth])
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.ndim > 1 and name != "code_proj.weight":
                weight.mul_(5)
    return decoder.eval()


def make_masked(estimate: MaskEstimate | None = None) -> MaskTokenDecoder:
    """The same for a mask-token decoder."""
    torch.manual_seed(0)
    tokenizer = PatchVQ(codebook_size=32, grid=4, image_size=64, width=16, blocks=1)
    torch.nn.init.uniform_(tokenizer.codebook)
    transformer = TransformerConfig(dim=32, depth=3, heads=4, parallel=True, qk_norm=True, gelu="tanh")
    text = WordTokenizer(vocabulary(), 12)
    decoder = MaskTokenDecoder(tokenizer, text, 14, transformer, 4, feature_layers=[1, 3], estimate=estimate)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    return decoder.eval()


def make_parm(
    decoder: CompactDecoder | MaskTokenDecoder | FlowDecoder, input_features: InputFeatures = "hidden"
) -> PARM:
    """A PARM for one of these decoders, random weights."""
    torch.manual_seed(1)
    parm = PARM(
        TransformerConfig(dim=32, depth=2, heads=4),
        grid=decoder.image_tokenizer.grid,
        decoder_dim=decoder.dim,
        feature_layers=decoder.feature_layers,
        input_features=input_features,
        causal=decoder.causal,
    )
    with torch.no_grad():
        for weight in parm.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
        if input_features == "hidden":
            parm.statistics_head.weight.normal_(std=0.1)
    return parm.eval()


def make_clip(activation: bool = False, **vision: Any) -> nn.Module:
    """A small CLIP of the words of the shapes world."""
    torch.manual_seed(0)
    text = TEXT | {"no_causal_mask": True, "pool_type": "last"}
    return open_clip.CLIP(16, VISION | vision, text, quick_gelu=activation)


def write_tokenizer(folder: Path, words: list[str]) -> str:
    """Save a tokenizer of these words, the first for unknown ones, into a folder."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(words[:1])
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)
