"""A tiny next-token decoder of Llama's make, with prompts of several lengths, random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.shapes.prompts import vocabulary
from lightning_modules.backbone.image_tokenizer import PatchVQ
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.next_token_network import Prefix
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.text import WordTokenizer
from lightning_modules.backbone.transformer import Transformer, TransformerConfig


class TinyLlama(NextTokenDecoder):
    """A prompt is `start, words, end`; its unconditional twin has as many dropped words. Codes have 8 dimensions."""

    def __init__(self, config: TransformerConfig, grid: int, codes: int, interleaved: bool, **options: Any) -> None:
        tokenizer = PatchVQ(codebook_size=codes, grid=grid, image_size=16 * grid, width=16, blocks=1)
        nn.init.uniform_(tokenizer.codebook)
        super().__init__(tokenizer, config, **options)
        self.text_tokenizer, self.interleaved = WordTokenizer(vocabulary(), 12), interleaved
        self.words = nn.Embedding(self.text_tokenizer.size + 2, config.dim)
        self.codes, self.aligner = nn.Embedding(codes, 8), nn.Linear(8, config.dim)
        self.transformer, self.norm = Transformer(config), config.norm()
        self.head = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(), Linear(config.dim, codes))

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_words

    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        start, rows = self.text_tokenizer.size, []
        for words, kind in zip(self.text_tokenizer.encode(prompts), conditional, strict=True):
            rows.append([start, *(words if kind else [0] * len(words)), start + 1])
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.words.weight.device)
        padding = torch.tensor([length - len(row) for row in rows])
        spans = [range(pad + 1, length - 1) for pad in padding.tolist()]
        return Prefix(self.words(ids), padding, spans)

    def prefix_key(self, prompt: str, conditional: bool) -> Any:
        return prompt if conditional else len(prompt.split())

    def code_table(self) -> Tensor:
        return self.codes.weight

    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.aligner(table[tokens])

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.head[:2](self.norm(hidden))

    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        return self.head[2](head_input).float()

    def rotary(self, positions: Tensor) -> Rotary:
        turned = Rotary.at(positions, self.transformer.config.head_dim)
        return Rotary(turned.cos, turned.sin, self.interleaved)


def make_llama(
    dim: int = 32, depth: int = 3, grid: int = 4, interleaved: bool = False, checkpointing: bool = False, **options: Any
) -> TinyLlama:
    """Sharpened random weights, so that distributions are far from uniform."""
    torch.manual_seed(0)
    config = TransformerConfig(
        dim, depth, heads=4, mlp_ratio=2.5, rms_norm=True, swiglu=True, bias=False, norm_eps=1e-6,
        checkpointing=checkpointing,
    )  # fmt: skip
    decoder = TinyLlama(config, grid, 32, interleaved, **options)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.ndim > 1 and not name.startswith("image_tokenizer"):
                weight.mul_(1.0 if name == "codes.weight" else 4.0)
    return decoder.eval()
