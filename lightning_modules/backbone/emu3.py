"""Emu3 (arXiv 2409.18869) as a next-token decoder: a Llama of one vocabulary, of words and the codes of images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.llama import LlamaDecoder, llama_layout
from lightning_modules.backbone.next_token_network import Prefix
from lightning_modules.backbone.text import PublishedTokenizer
from lightning_modules.backbone.transformer import TransformerConfig

_BOI, _CODES, _ROW_END = "<|image start|>", "<|image token|>", "<|extra_200|>"
_STORED = {  # ours -> transformers'
    "words": "text_model.model.embed_tokens",
    "transformer.blocks": "text_model.model.layers",
    "norm": "text_model.model.norm",
    "head": "text_model.lm_head",
}


class Emu3(LlamaDecoder):
    """Its guidance s is that of `Sampling`; the published scale is 1 + s.

    Args:
        text_tokenizer: turns prompts into ids, of at most `max_text`. Its `end_of_text` opens them, and ids of codes
            follow one another.
        negative_prompt: what unconditional rows read in the place of a prompt.
        image_tokenizer, text_vocabulary, transformer, feature_layers, rotary_base, compiled: see `LlamaDecoder`.
    """

    row_ends = True
    layouts = (llama_layout(_STORED, r"vqmodel\."),)
    text_tokenizer: PublishedTokenizer

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: PublishedTokenizer,
        text_vocabulary: int,
        transformer: TransformerConfig,
        negative_prompt: str = "",
        feature_layers: Sequence[int] = (),
        rotary_base: float = 1e6,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            image_tokenizer, text_tokenizer, text_vocabulary, transformer, feature_layers, rotary_base, compiled
        )
        self.negative_prompt, codes = negative_prompt, image_tokenizer.codebook_size
        self.boi, self.opens_codes, self.row_end = map(text_tokenizer.id_of, (_BOI, _CODES, _ROW_END))
        first, last = (text_tokenizer.id_of(f"<|visual token {code:06d}|>") for code in (0, codes - 1))
        if last - first != codes - 1:
            raise ValueError(f"decoder.module.text_tokenizer has not {codes} codes one after the other")
        self.codes = slice(first, last + 1)
        self.head = nn.Linear(transformer.dim, text_vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def cache_key(self) -> dict[str, Any]:
        return super().cache_key() | {"negative_prompt": self.negative_prompt}

    def check_stored(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if Emu3's config is of other sizes."""
        if "text_config" in config:  # which an export has not
            from transformers import Emu3TextConfig

            self.refuse_other_sizes(Emu3TextConfig(**config["text_config"]), "see decoder=emu3")

    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        text, grid = self.text_tokenizer, self.image_tokenizer.grid
        read = [prompt if kind else self.negative_prompt for prompt, kind in zip(prompts, conditional, strict=True)]
        own, end = text.encode(read), [self.boi, *text.encode([f"{grid}*{grid}"])[0], self.opens_codes]
        words = [range(1, 1 + len(ids) * kind) for ids, kind in zip(own, conditional, strict=True)]
        return Prefix.of_ids(self.words, [[text.end_of_text, *ids, *end] for ids in own], words)

    def code_table(self) -> Tensor:
        return self.words.weight

    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        ends = tokens == self.image_tokenizer.codebook_size
        return table[torch.where(ends, self.row_end, self.codes.start + tokens)]

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        return F.linear(head_input, self.head.weight[self.codes]).float()
