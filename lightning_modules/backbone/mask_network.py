"""The network of mask-token decoders (Show-o, arXiv 2408.12528): a prompt, then all image tokens, some of them masked.

A sequence is `t2i sot text eot soi image eoi`. Text is causal and does not see the image, so its keys and values are
computed once per prompt; soi, image and eoi see everything.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.loading import CheckpointReader, copy_from
from lightning_modules.backbone.mask_attention import Grid, Prefix
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_state import Vocabulary
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.text import DelimitedTokenizer
from lightning_modules.backbone.transformer import Transformer, TransformerConfig
from lightning_modules.cache_key import key_of


class MaskNetwork(TokenDecoder):
    """Reads prompts and grids of codes, some of them masked, and predicts the code at each position.

    Args:
        image_tokenizer, feature_layers: see `TokenDecoder`; without feature layers there are no features.
        text_tokenizer: turns prompts into ids.
        max_text: see `Vocabulary`; longer prompts lose their end.
        transformer: sizes of the decoder.
        rotary_dims: dimensions of each head that carry the position.
        estimate: of log p of whole images; the default is `MaskEstimate()`.
        visual: codes are embedded and predicted by their looks too, tokens by row and column: small decoders learn
            much faster, but Show-o has neither.
        compiled: decoding's passes are compiled, on GPUs with CUDA graphs.
    """

    causal = False

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: DelimitedTokenizer,
        max_text: int,
        transformer: TransformerConfig,
        rotary_dims: int,
        feature_layers: Sequence[int] = (),
        estimate: MaskEstimate | None = None,
        visual: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(image_tokenizer, transformer.depth, feature_layers)
        if not 0 < rotary_dims <= transformer.head_dim or rotary_dims % 2:
            raise ValueError(f"rotary_dims={rotary_dims} must be even and within the head's {transformer.head_dim}")
        self.estimate = estimate or MaskEstimate()
        if (n_masks := self.estimate.n_masks) > self.num_tokens:
            raise ValueError(f"decoder.estimate.n_masks={n_masks}, but an image has only {self.num_tokens} tokens")
        self.text_tokenizer = text_tokenizer
        text, codes = text_tokenizer.size, image_tokenizer.codebook_size
        self.vocabulary = Vocabulary(text, text_tokenizer.end_of_text, codes, max_text)
        self.rotary_dims, self.visual, self.compiled = rotary_dims, visual, compiled
        self.embed = nn.Embedding(self.vocabulary.total, transformer.dim)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(transformer.dim)
        self.head = Linear(transformer.dim, self.vocabulary.total)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if visual:
            self.code_proj = Linear(image_tokenizer.code_vectors.shape[1], transformer.dim, bias=False)
            nn.init.normal_(self.code_proj.weight, std=0.05 * self.code_proj.in_features**-0.5)
            self.rows = nn.Parameter(torch.randn(image_tokenizer.grid, 1, transformer.dim) * 0.02)
            self.columns = nn.Parameter(torch.randn(1, image_tokenizer.grid, transformer.dim) * 0.02)

    def cache_key(self) -> dict[str, Any]:
        """See `TokenDecoder`; `estimate` changes no image."""
        return super().cache_key() | {"rotary_dims": self.rotary_dims, "vocabulary": key_of(self.vocabulary)}

    def warm_start(self, name: str, stored: CheckpointReader) -> None:
        """Begin training with what a next-token decoder has too, as Show-o begins with a language model.

        That is the Transformer and its norm, what codes look like, rows and columns, words, and the part of each code
        that is its own. ValueError if a tensor is missing or of another shape, with it and the `name` of the weights.
        """
        codes, words = slice(self.vocabulary.first_code, self.vocabulary.mask), slice(self.vocabulary.text)
        other = ("image_tokenizer.", "embed.", "head.")
        targets: dict[str, list[Tensor]]
        targets = {key: [weight] for key, weight in self.named_parameters() if not key.startswith(other)}
        targets["codes"] = [self.embed.weight[codes], self.head.weight[codes]]
        targets["prompt_encoder.words.weight"] = [self.embed.weight[words]]
        copy_from(stored, targets, f"decoder.start={name!r}")

    @property
    def max_words(self) -> int:
        return self.vocabulary.max_text - 2

    def _rotary(self, start: int, length: int) -> Rotary:
        positions = torch.arange(start, start + length, device=self.embed.weight.device)
        return Rotary.at(positions, self.rotary_dims)

    def prompt_pass(self, blocks: Sequence[Sequence[int]]) -> tuple[Prefix, list[Tensor]]:
        """G prompts `t2i sot text eot` -> their keys and values, and hidden states [G, P, dim] after every layer."""
        length, device = max(map(len, blocks)), self.embed.weight.device
        padding = [length - len(block) for block in blocks]
        real = torch.arange(length) >= torch.tensor(padding)[:, None] if any(padding) else None
        ids = [[self.vocabulary.text] * pad + list(block) for pad, block in zip(padding, blocks, strict=True)]
        rotary = self._rotary(self.vocabulary.max_text + 1 - length, length)
        prefix = Prefix(rotary, None if real is None else real.to(device))
        return prefix, self.transformer.run(self.embed(torch.tensor(ids, device=device)), prefix)

    def _blocks(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.vocabulary.block(text) for text in self.text_tokenizer.encode(prompts)]

    def encode_prompts(self, prompts: Sequence[str]) -> Prefix:
        """The keys and values of G prompts; those of the empty prompt are the unconditional ones."""
        return self.prompt_pass(self._blocks(prompts))[0]

    def encode_with_features(self, prompts: Sequence[str]) -> tuple[Prefix, Tensor]:
        """The keys and values of G prompts, and their features, [G, L, 2 dim]; [G, 0, 0] without feature layers.

        The features are each text token by itself, beside the last of the feature layers; aligned on the left, with
        zeros after the end, they do not depend on the other prompts.
        """
        blocks = self._blocks(prompts)
        prefix, layers = self.prompt_pass(blocks)
        if not self.feature_layers:
            return prefix, self.embed.weight.new_zeros(len(prompts), 0, 0)
        layer = layers[max(self.feature_layers) - 1]
        read = layer.new_zeros(len(blocks), self.max_words, 2 * self.dim)
        for row, block in enumerate(blocks):
            words = self.embed(torch.tensor(block[2:-1], dtype=torch.int64, device=layer.device))
            in_prompt = layer[row, layer.shape[1] - len(block) + 2 : -1]
            both = [F.layer_norm(x, x.shape[-1:]) for x in (words, in_prompt)]
            read[row, : len(words)] = torch.cat(both, -1)
        return prefix, read

    def code_features(self) -> Tensor:
        """Embeddings of what each code looks like, [C, dim]."""
        return self.code_proj(self.image_tokenizer.code_vectors)

    @property
    def places(self) -> Tensor:
        """Embeddings of the places in the grid, [n, dim]."""
        return (self.rows + self.columns).flatten(0, 1)

    def _sequence(self, tokens: Tensor, unknown: Tensor) -> Tensor:
        """Codes [R, n] and which are masked -> ids of soi, image and eoi, [R, n + 2]."""
        words = self.vocabulary
        ids = torch.where(unknown, words.mask, tokens + words.first_code)
        return F.pad(F.pad(ids, (1, 0), value=words.soi), (0, 1), value=words.eoi)

    def _grid(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> tuple[Tensor, Grid]:
        """Embeddings of soi, image and eoi, [R, n + 2, dim], and how they attend; see `grid_pass`."""
        ids = self._sequence(tokens, unknown)
        x = self.embed(ids)
        if self.visual:
            shown = self.code_features()[tokens].masked_fill(unknown[..., None], 0)
            x = x + F.pad(shown + self.places, (0, 0, 1, 1))
        return x, self.attending(prefixes)

    def attending(self, prefixes: Sequence[Prefix]) -> Grid:
        """How soi, image and eoi attend to each other and to prompts; each prefix is for an equal part of the rows."""
        return Grid(self._rotary(self.vocabulary.max_text + 1, self.num_tokens + 2), prefixes)

    def grid_pass(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> list[Tensor]:
        """Hidden states of soi, image and eoi, [R, n + 2, dim], after every layer, or just the last without features.

        Of the codes [R, n] those that are `unknown` are masked. Each prefix is for an equal part of the rows.
        """
        grid = self._grid(tokens, unknown, prefixes)
        return self.transformer.run(*grid) if self.feature_layers else [self.transformer.last(*grid)]

    def image_hidden(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """The last hidden states of the image, normalised, [R, n, dim]: those that logits are read from."""
        return self.norm(self.transformer.last(*self._grid(tokens, unknown, prefixes))[:, 1:-1])

    def code_head(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states [..., dim] -> logits of the image codes, single precision [..., C]."""
        codes = slice(self.vocabulary.first_code, self.vocabulary.mask)
        weight = self.head.weight[codes] + self.code_features() if self.visual else self.head.weight[codes]
        return F.linear(hidden, weight, self.head.bias[codes]).float()

    def code_logits(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits of the image codes at every position, single precision [R, n, C]; see `grid_pass`."""
        return self.code_head(self.image_hidden(tokens, unknown, prefixes))

    def guided_logits(self, branches: Sequence[Tensor], guidance: float, positions: Tensor) -> Tensor:
        """Guided logits [M, C] at positions [M] of the B * n, counted row by row.

        The branches, normalised hidden states [B, n, dim] with the prompt and without, are guided themselves: logits
        are linear in them, so the head runs once.
        """
        conditional, *unconditional = (branch.flatten(0, 1)[positions] for branch in branches)
        if unconditional and guidance:
            conditional = torch.lerp(unconditional[0], conditional, 1 + guidance)
        return self.code_head(conditional)

    def token_log_probs(self, prefix: Prefix, tokens: Tensor, masked: Tensor, as_trained: bool = False) -> Tensor:
        """log p(token | prompt, tokens that are not masked) of codes where `masked`, else 0, [B, n]. Differentiable.

        With `as_trained` among all ids, and of soi and eoi as well, [B, n + 2]: Show-o's own training excludes none.
        """
        if not as_trained:
            log_p = self.code_logits(tokens, masked, [prefix]).log_softmax(-1)
            return log_p.gather(-1, tokens[..., None]).squeeze(-1) * masked
        hidden = self.transformer.last(*self._grid(tokens, masked, [prefix]))
        log_p = self.head(self.norm(hidden)).float().log_softmax(-1)
        ids = self._sequence(tokens, torch.zeros_like(masked))
        return log_p.gather(-1, ids[..., None]).squeeze(-1) * F.pad(masked, (1, 1), value=True)

    def training_bytes(self, images: int, size: int, weight: int) -> float:
        """Estimate the activations that wait for the backward pass, and the logits with their gradient."""
        tokens = self.num_tokens + 2
        positions = tokens + self.vocabulary.max_text + 1
        kept = self.transformer.config.saved_bytes(positions, size, weight)
        logits = 2 * tokens * self.vocabulary.total * 4
        return images * (kept + logits) + (self.cast_bytes(size, weight) if images else 0)

    def decoding_bytes(self, images: int, size: int) -> float:
        """Estimate the keys and values of prompts, and the largest of what else there is, guidance included.

        That is a layer's hidden states, the probabilities of all codes and their cumulative sum, in single precision,
        or what the image tokenizer takes.
        """
        config = self.transformer.config
        prompts = 2 * config.depth * config.dim * (self.vocabulary.max_text + 1) * size
        layer = 2 * (self.num_tokens + 2) * config.dim * (5 + 2 * config.mlp_ratio) * size
        codes = 2 * self.num_tokens * self.vocabulary.codes * 4
        return images * (prompts + max(layer, codes, self.image_tokenizer.decoding_bytes(size)))
