"""The network of next-token decoders: what comes before an image, then its tokens, each predicted from all before it.

A subclass gives the parts of its model. Full passes, likelihoods and features are here; decoding is in `next_token.py`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.attention import AttentionFn, FullAttention
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.sampling import Sampling, guide, sampling_log_probs
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.backbone.transformer import TransformerConfig


@dataclass(frozen=True)
class Prefix:
    """What comes before the first image token of U rows, padded on the left."""

    embeddings: Tensor  # [U, P, dim]; those of padding may be anything finite
    padding: Tensor  # positions of padding of each row, [U], on the CPU
    words: Sequence[range]  # positions (from 0) of the prompt's words in each row; empty ranges for unconditional ones

    @staticmethod
    def of_ids(embedding: nn.Embedding, rows: Sequence[Sequence[int]], words: Sequence[range]) -> "Prefix":
        """Embed the ids of each row; `words` are the positions of the prompt's own among them."""
        padding = [max(map(len, rows)) - len(row) for row in rows]
        ids = [[0] * pad + [*row] for pad, row in zip(padding, rows, strict=True)]
        places = [range(each.start + pad, each.stop + pad) for pad, each in zip(padding, words, strict=True)]
        return Prefix(embedding(torch.tensor(ids, device=embedding.weight.device)), torch.tensor(padding), places)

    def padded(self, multiple: int) -> "Prefix":
        """The same with more padding, up to a multiple of some positions."""
        more = -self.embeddings.shape[1] % multiple
        words = [range(each.start + more, each.stop + more) for each in self.words]
        return Prefix(F.pad(self.embeddings, (0, 0, more, 0)), self.padding + more, words)


class NextTokenNetwork(TokenDecoder):
    """Reads prompts and the first tokens of images, and predicts the next one.

    A subclass sets `text_tokenizer` and `transformer` as `TokenDecoder` names them, beside its embeddings and head.

    Args:
        image_tokenizer, feature_layers: see `TokenDecoder`; without feature layers there are no features.
        transformer: sizes of the decoder.
        compiled: decoding's passes of one token are compiled, on GPUs with CUDA graphs.
    """

    causal = True
    shares_prefixes: ClassVar[bool] = True  # rows with equal prompts read one copy of its keys and values
    row_ends: ClassVar[bool] = False  # every row of an image has an end, which is read but never drawn; see `places`

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        transformer: TransformerConfig,
        feature_layers: Sequence[int] = (),
        compiled: bool = False,
    ) -> None:
        super().__init__(image_tokenizer, transformer.depth, feature_layers)
        self.compiled = compiled

    @abstractmethod
    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        """What comes before the image for each prompt that is `conditional`, else for its unconditional twin.

        No key is asked for twice; conditional rows come first. Differentiable. ValueError for prompts that cannot be
        read.
        """

    def prefix_key(self, prompt: str, conditional: bool) -> Any:
        """What tells the `prefix` of a row from others: rows with equal keys share it. Each prompt has its own."""
        return prompt, conditional

    @abstractmethod
    def code_table(self) -> Tensor:
        """What tokens are embedded from, [V, ...]; asked for once per image or training pass. Differentiable."""

    @abstractmethod
    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens [..., S] at some positions of the image, [S] or [..., S] -> [..., S, dim].

        With `row_ends`, the token V, one more than the last code, is such an end.
        """

    @abstractmethod
    def head_input(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., dim] -> the last norm and all of the head but its last layer, [..., D]."""

    @abstractmethod
    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        """[..., D] -> the last layer of the head, which is affine: guidance may come before it. [..., V], fp32."""

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Rotary embeddings of `places` [S], counted from the first image token: the prompt's are below 0."""
        return None

    def places(self, positions: Tensor) -> Tensor:
        """Where the Transformer reads the tokens at some positions, of any shape, counted from the first token.

        Only ends of rows make a difference. A token is read at its place and, if it is the last of its row, with the
        end of the row after it; the place before that of a token predicts it.
        """
        return positions + positions.clamp(min=0) // self.image_tokenizer.grid if self.row_ends else positions

    @property
    def image_places(self) -> int:
        """Places of an image, from its first token to its last one."""
        return self.num_tokens + (self.image_tokenizer.grid - 1 if self.row_ends else 0)

    def embed_places(self, table: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Embed what is read at some places, [S] or [B, S], of images [B, T] -> [B, S, dim]."""
        across = self.image_tokenizer.grid + 1
        positions = places - places // across if self.row_ends else places
        read = tokens.gather(1, positions.clamp(max=self.num_tokens - 1).expand(len(tokens), -1))
        if self.row_ends:
            read = torch.where(places % across == across - 1, self.image_tokenizer.codebook_size, read)
        return self.embed(table, read, positions)

    @property
    def prefix_length(self) -> int:
        """Positions that usually come before an image; memory is estimated by it."""
        return self.max_words

    def training_bytes(self, images: int, size: int, weight: int) -> float:
        """Estimate the activations that wait for the backward pass, and the logits, their softmax and its gradient."""
        tokens = self.num_tokens
        kept = self.transformer.config.saved_bytes(self.prefix_length + self.image_places, size, weight)
        codes = 3 * tokens * self.image_tokenizer.codebook_size * 4
        return images * (kept + codes) + (self.cast_bytes(size, weight) if images else 0)

    def decoding_bytes(self, images: int, size: int) -> float:
        """Estimate keys and values with logits and what is drawn from them, or what the image tokenizer takes.

        Guidance is included.
        """
        config, codes = self.transformer.config, 8 * self.image_tokenizer.codebook_size * 4
        positions = self.prefix_length + self.image_places
        cached = 2 * 2 * config.depth * config.dim * positions * size
        return images * max(cached + codes, self.image_tokenizer.decoding_bytes(size))

    def prompt_features(self, prompts: Sequence[str], prefix: Prefix, layers: Sequence[Tensor]) -> Tensor:
        """Features of prompts, the first rows of the prefix, for verifiers: [U', L, 2 dim], empty without any.

        That is each word by itself, beside the last of the feature layers; aligned on the left, with zeros after the
        end. The layers are the hidden states of a pass over the prefix, [U, P, dim] each.
        """
        if not self.feature_layers:
            return prefix.embeddings.new_zeros(len(prompts), 0, 0)
        sources = prefix.embeddings, layers[max(self.feature_layers) - 1]
        read = sources[1].new_zeros(len(prompts), self.max_words, 2 * self.dim)
        for row, words in enumerate(prefix.words[: len(prompts)]):
            both = [F.layer_norm(x[row, words.start : words.stop], x.shape[-1:]) for x in sources]
            read[row, : len(words)] = torch.cat(both, -1)
        return read

    def read_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts [B, L, 2 dim], from a pass over them alone; see `prompt_features`."""
        prefix, rows = self.distinct_prefixes(prompts, [True] * len(prompts))
        rotary = self.rotary(torch.arange(-prefix.embeddings.shape[1], 0, device=prefix.embeddings.device))
        layers = self.pass_over(prefix.embeddings, FullAttention(True, rotary, prefix.padding))
        return self.prompt_features(list(dict.fromkeys(prompts)), prefix, layers)[rows]

    def distinct_prefixes(self, prompts: Sequence[str], conditional: Sequence[bool]) -> tuple[Prefix, Tensor]:
        """What comes before the image, each distinct row once, and which of them R rows have, [R], on the CPU."""
        rows = list(zip(prompts, conditional, strict=True))
        if not self.shares_prefixes:
            return self.prefix(prompts, conditional), torch.arange(len(rows))
        keys = {row: self.prefix_key(*row) for row in dict.fromkeys(rows)}
        first = {key: row for row, key in reversed(keys.items())}  # row of each key
        index = {row: i for i, row in enumerate(dict.fromkeys(first[key] for key in keys.values()))}
        prefix = self.prefix([prompt for prompt, _ in index], [kind for _, kind in index])
        return prefix, torch.tensor([index[first[keys[row]]] for row in rows])

    def pass_over(self, x: Tensor, attention: AttentionFn) -> list[Tensor]:
        """Hidden states [R, S, dim] after every layer, or just after the last where there are no feature layers."""
        if self.feature_layers:
            return self.transformer.run(x, attention)
        return [self.transformer.last(x, attention)]

    def _sequence(
        self, table: Tensor, prompts: Sequence[str], conditional: bool, tokens: Tensor
    ) -> tuple[Tensor, FullAttention, Prefix]:
        """Embeddings of prompts, or their unconditional twins, and of images [B, T] but their last token."""
        prefix, rows = self.distinct_prefixes(prompts, [conditional] * len(prompts))
        length, device = prefix.embeddings.shape[1], tokens.device
        image = self.embed_places(table, tokens, torch.arange(self.image_places - 1, device=device))
        x = torch.cat([prefix.embeddings.index_select(0, rows.to(device)), image], dim=1)
        rotary = self.rotary(torch.arange(-length, self.image_places - 1, device=device))
        return x, FullAttention(True, rotary, prefix.padding[rows]), prefix

    def _predicting(self, hidden: Tensor, prefix: Prefix) -> Tensor:
        """Of the hidden states [B, P + S, dim] of such a sequence, those that predict tokens, [B, T, dim]."""
        hidden = hidden[:, prefix.embeddings.shape[1] - 1 :]
        if not self.row_ends:
            return hidden
        return hidden[:, self.places(torch.arange(self.num_tokens, device=hidden.device))]

    def _head_inputs(self, table: Tensor, prompts: Sequence[str], conditional: bool, tokens: Tensor) -> Tensor:
        """What the last layer of the head reads, [B, T, D], to predict each token of images [B, T]."""
        x, attention, prefix = self._sequence(table, prompts, conditional, tokens)
        return self.head_input(self._predicting(self.transformer.last(x, attention), prefix))

    def token_logits(self, prompts: Sequence[str], tokens: Tensor, conditional: bool = True) -> Tensor:
        """Logits [B, T, V] of each token of images [B, T], given its prompt and the tokens before it. Differentiable.

        Not `conditional`: given the prompt's unconditional twin.
        """
        table = self.code_table()
        return self.logits(table, self._head_inputs(table, prompts, conditional, tokens))

    def token_log_probs(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """log p(token t | prompt, tokens < t) of images [B, T] -> [B, T]. Differentiable."""
        logits = self.token_logits(prompts, tokens)
        return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        return -self.token_log_probs(prompts, tokens).mean()

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.token_log_probs(prompts, tokens).sum(1)  # exact: seeds are for estimates

    def policy_log_probs(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        sampling: Sampling,
        trajectory: Trajectory | None = None,
        steps: int | None = None,
    ) -> Tensor:
        table = self.code_table()
        read = self._head_inputs(table, prompts, True, tokens)
        if sampling.guidance:
            scale = sampling.guidance_at(torch.arange(tokens.shape[1], device=tokens.device))
            read = guide(read, self._head_inputs(table, prompts, False, tokens), scale)
        read, tokens = read[:, :steps], tokens[:, :steps]
        log_p = sampling_log_probs(self.logits(table, read).flatten(0, 1), sampling)
        return log_p.gather(-1, tokens.flatten()[:, None]).view_as(tokens)

    def feature_states(self, layers: Sequence[Tensor]) -> Tensor:
        """Hidden states of every layer [..., dim] -> those of `feature_layers`, [..., F]."""
        return torch.cat([layers[depth - 1] for depth in self.feature_layers], dim=-1)

    def _feature_pass(
        self, table: Tensor, prompts: Sequence[str], conditional: bool, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The `feature_states` [B, T, F] and log-probabilities [B, T, V] that predict the tokens of images [B, T]."""
        x, attention, prefix = self._sequence(table, prompts, conditional, tokens)
        layers = [self._predicting(layer, prefix) for layer in self.transformer.run(x, attention)]
        return self.feature_states(layers), self.logits(table, self.head_input(layers[-1])).log_softmax(-1)

    @torch.no_grad()
    def features(self, prompts: Sequence[str], tokens: Tensor) -> DecoderFeatures:
        copies = len(prompts) // len(tokens)
        table = self.code_table()
        bare = self._feature_pass(table, prompts[::copies], False, tokens)
        tokens = tokens.repeat_interleave(copies, 0)
        full = self._feature_pass(table, prompts, True, tokens)
        hidden, log_p = (torch.cat([f, b.repeat_interleave(copies, 0)]) for f, b in zip(full, bare, strict=True))
        everywhere = torch.arange(self.num_tokens, device=tokens.device)
        return self.describe(self.read_prompts(prompts), table, tokens, everywhere, hidden, log_p)

    def describe(
        self, prompt: Tensor, table: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor, log_p: Tensor
    ) -> DecoderFeatures:
        """Features of tokens [B, S] at positions [S] or [B, S or 1].

        Hidden states and log-probabilities of all codes, [2B, S or 1, ...], are those with the prompt, then without.
        """
        own = log_p.expand(-1, tokens.shape[1], -1).gather(-1, tokens.repeat(2, 1)[..., None]).squeeze(-1)
        conditional = log_p[: len(tokens)]
        return DecoderFeatures(
            prompt=prompt,
            embeddings=self.embed(table, tokens, positions),
            hidden=hidden[: len(tokens)],
            unconditional_hidden=hidden[len(tokens) :],
            log_probs=own[: len(tokens)],
            unconditional_log_probs=own[len(tokens) :],
            entropy=-(conditional.exp() * conditional).sum(-1),
        )

    @torch.no_grad()
    def features_from_cache(self, prompts: Sequence[str], tokens: Tensor, **stored: Any) -> DecoderFeatures:
        """Features `stored` while decoding images [B, T], and those that follow cheaply from prompts and tokens."""
        everywhere = torch.arange(self.num_tokens, device=tokens.device)
        embeddings = self.embed(self.code_table(), tokens, everywhere)
        return DecoderFeatures(prompt=self.read_prompts(prompts), embeddings=embeddings, **stored)

    def training_features(
        self, batch: Mapping[str, Any], last_step: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        if "features" in batch:
            return self.features_from_cache(batch["prompt"], batch["tokens"], **batch["features"])
        return self.features(batch["prompt"], batch["tokens"])
