"""A T5 of two layers and random weights, with a tokenizer of T5's make, to try LlamaGen on a CPU."""

import string
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lightning_modules.files import make_once

_SPECIAL = ["<pad>", "</s>", "<unk>"]


def save_tiny_t5(folder: str, width: int = 24) -> str:
    """Write an encoder with features of some width, always the same one, and return its folder."""
    make_once(Path(folder), partial(_write, width=width))
    return folder


def _tokenizer() -> Tokenizer:
    """Every character is a token."""
    pieces = [*_SPECIAL, "▁", *string.ascii_lowercase, *string.digits, *string.punctuation]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def _write(folder: Path, width: int) -> None:
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tokenizer()
    sizes: Any = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), feed_forward_proj="gated-gelu", **sizes)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = T5EncoderModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "SelfAttention" in name:
                weight.mul_(8)  # so that words change one another's features
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
