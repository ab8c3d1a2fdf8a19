"""The decoder of the shapes world: a small Transformer with a prompt encoder of its own, over words."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.next_token_network import Prefix
from lightning_modules.backbone.text import PromptEncoder, WordTokenizer
from lightning_modules.backbone.transformer import Transformer, TransformerConfig


class CompactDecoder(NextTokenDecoder):
    """Reads a prompt's encoded words, then image tokens (`H0 = concat(prompt embeddings, image tokens < t)`).

    Args:
        image_tokenizer, feature_layers, compiled: see `NextTokenNetwork`.
        vocabulary: the words that prompts consist of.
        max_words: longest prompt, words.
        transformer: sizes of the decoder.
        text_depth: layers of the prompt encoder, which has the decoder's width and heads.
    """

    shares_prefixes = False  # a prefix of a few words costs less in the rows than beside them
    text_tokenizer: WordTokenizer

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        vocabulary: Sequence[str],
        max_words: int,
        transformer: TransformerConfig,
        text_depth: int,
        feature_layers: Sequence[int] = (),
        compiled: bool = False,
    ) -> None:
        super().__init__(image_tokenizer, transformer, feature_layers, compiled)
        dim = transformer.dim
        self.text_tokenizer = WordTokenizer(vocabulary, max_words)
        self.prompt_encoder = PromptEncoder(self.text_tokenizer, replace(transformer, depth=text_depth))
        self.codes = nn.Parameter(torch.zeros(image_tokenizer.codebook_size, dim))
        self.code_proj = Linear(image_tokenizer.code_vectors.shape[1], dim, bias=False)
        self.rows = nn.Parameter(torch.zeros(image_tokenizer.grid, 1, dim))
        self.columns = nn.Parameter(torch.zeros(1, image_tokenizer.grid, dim))
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(dim)
        for weight in (self.codes, self.rows, self.columns):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.code_proj.weight, std=0.05 * self.code_proj.in_features**-0.5)

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_words

    def word_ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> word ids [B, L]; raises ValueError for unknown words and too many."""
        return self.text_tokenizer(prompts).to(self.rows.device)

    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        """Encoded words, padding included; the unconditional twin of each prompt is the empty one."""
        ids = self.word_ids(prompts) * torch.tensor(conditional, device=self.rows.device)[:, None]
        words = [range(self.max_words if kind else 0) for kind in conditional]
        return Prefix(self.prompt_encoder(ids), torch.zeros(len(prompts), dtype=torch.int64), words)

    def prompt_features(self, prompts: Sequence[str], prefix: Prefix, layers: Sequence[Tensor]) -> Tensor:
        return self.prompt_encoder.read(self.word_ids(prompts), prefix.embeddings[: len(prompts)])

    def read_prompts(self, prompts: Sequence[str]) -> Tensor:
        return self.prompt_features(prompts, self.prefix(prompts, [True] * len(prompts)), [])

    def code_table(self) -> Tensor:
        """Embeddings of all codes, [V, dim]: a map of what they look like, and a part of each one's own.

        Without the map the decoder hardly combines classes and colours that no training prompt names together.
        """
        return self.code_proj(self.image_tokenizer.code_vectors) + self.codes

    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return table[tokens] + (self.rows + self.columns).flatten(0, 1)[positions]

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        """[..., dim] -> [..., V]; the output matrix is the embedding of the codes."""
        return (head_input @ table.T).float()
