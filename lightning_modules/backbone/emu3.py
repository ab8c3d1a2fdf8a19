"""Emu3 (arXiv 2409.18869) as a next-token decoder: a Llama of one vocabulary, of words and the codes of images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.llama import llama_layout, refuse_other_sizes
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.next_token_network import Prefix
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.text import PublishedTokenizer
from lightning_modules.backbone.transformer import Transformer, TransformerConfig

_BOS, _BOI, _CODES, _ROW_END = "<|extra_203|>", "<|image start|>", "<|image token|>", "<|extra_200|>"
_STORED = {  # ours -> transformers'
    "words": "text_model.model.embed_tokens",
    "transformer.blocks": "text_model.model.layers",
    "norm": "text_model.model.norm",
    "head": "text_model.lm_head",
}


class Emu3Tokenizer(PublishedTokenizer):
    """The tokenizer as published with Emu3.

    Args:
        checkpoint: a folder with `tokenizer.json`, or OWNER/NAME on the hub.
        negative_prompt: what unconditional rows read in the place of a prompt.
        max_text: longest prompt, in tokens; longer ones are refused.

    Raises:
        FileNotFoundError, ValueError: there is no `tokenizer.json`; it is broken, or not Emu3's.
    """

    def __init__(self, checkpoint: str, negative_prompt: str = "", max_text: int = 256) -> None:
        super().__init__(checkpoint, end_of_text=_BOS)
        self.negative_prompt, self.max_text = negative_prompt, max_text
        self.boi, self.codes, self.row_end = map(self.id_of, (_BOI, _CODES, _ROW_END))

    def cache_key(self) -> dict[str, Any]:
        return super().cache_key() | {"negative_prompt": self.negative_prompt, "max_text": self.max_text}

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        rows = super().encode(prompts)
        for prompt, ids in zip(prompts, rows, strict=True):
            if len(ids) > self.max_text:
                found = f"prompt {prompt[:40] + '...'!r} has {len(ids)} tokens"
                raise ValueError(f"{found}, more than the {self.max_text} of decoder.module.text_tokenizer.max_text")
        return rows


class Emu3(NextTokenDecoder):
    """Its guidance s is that of `Sampling`; the published scale is 1 + s.

    Args:
        image_tokenizer, transformer, feature_layers, compiled: see `NextTokenNetwork`.
        text_tokenizer: turns prompts into ids; those of the image's codes follow one another.
        text_vocabulary: rows of the embedding and of the head, for words and codes; the tokenizer does not use all.
        rotary_base: see `Rotary.at`.
    """

    row_ends = True
    layouts = (llama_layout(_STORED, r"vqmodel\."),)
    text_tokenizer: Emu3Tokenizer

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: Emu3Tokenizer,
        text_vocabulary: int,
        transformer: TransformerConfig,
        feature_layers: Sequence[int] = (),
        rotary_base: float = 1e6,
        compiled: bool = False,
    ) -> None:
        super().__init__(image_tokenizer, transformer, feature_layers, compiled)
        self.text_tokenizer, self.rotary_base = text_tokenizer, rotary_base
        codes = image_tokenizer.codebook_size
        first, last = (text_tokenizer.id_of(f"<|visual token {code:06d}|>") for code in (0, codes - 1))
        if last - first != codes - 1 or text_tokenizer.size > text_vocabulary:
            raise ValueError(f"decoder.module.text_tokenizer has not {codes} codes in {text_vocabulary} ids")
        self.codes = slice(first, last + 1)
        self.words = nn.Embedding(text_vocabulary, transformer.dim)
        self.transformer, self.norm = Transformer(transformer), transformer.norm()
        self.head = nn.Linear(transformer.dim, text_vocabulary, bias=False)
        for layer in (self.words, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    def cache_key(self) -> dict[str, Any]:
        return super().cache_key() | {"rotary_base": self.rotary_base}

    def check_stored(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if Emu3's config is of other sizes."""
        if "text_config" in config:  # which an export has not
            from transformers import Emu3TextConfig

            stored, sizes, rows = (
                Emu3TextConfig(**config["text_config"]),
                self.transformer.config,
                len(self.words.weight),
            )
            refuse_other_sizes(stored, sizes, self.rotary_base, rows, "Emu3", "see decoder=emu3")

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_text

    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        text, grid = self.text_tokenizer, self.image_tokenizer.grid
        read = [prompt if kind else text.negative_prompt for prompt, kind in zip(prompts, conditional, strict=True)]
        size = text.encode([f"{grid}*{grid}"])[0]
        own = text.encode(read)
        words = [range(1, 1 + len(ids) * kind) for ids, kind in zip(own, conditional, strict=True)]
        return Prefix.of_ids(self.words, [[text.end_of_text, *ids, text.boi, *size, text.codes] for ids in own], words)

    def code_table(self) -> Tensor:
        return self.words.weight

    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        ends = tokens == self.image_tokenizer.codebook_size
        return table[torch.where(ends, self.text_tokenizer.row_end, self.codes.start + tokens)]

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        return F.linear(head_input, self.head.weight[self.codes]).float()

    def rotary(self, positions: Tensor) -> Rotary:
        return Rotary.at(positions, self.transformer.config.head_dim, self.rotary_base)
