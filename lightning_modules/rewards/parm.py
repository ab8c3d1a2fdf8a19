"""PARM, the potential assessment reward model: a Transformer that values a prompt with a half-made image.

The paper (arXiv 2501.13926, section 3) asks a vision-language model; this is the compact reading in token space:
6 layers and a head d -> d/2 -> GELU -> 1 on (prompt, tokens so far, candidate).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.decoder import DecodingState, Proposal
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.hub import HubMixin
from lightning_modules.backbone.kv_cache import KVCache
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.loading import CheckpointReader, copy_from, fingerprint
from lightning_modules.backbone.transformer import Transformer, TransformerConfig
from lightning_modules.cache_key import class_name, key_of
from lightning_modules.rewards.geneval_rules import CLAUSES
from lightning_modules.rewards.verifier import Pixels, Rows, TokenVerifier

InputFeatures = Literal["hidden", "embeddings"]
# log p and log p without the prompt of the token, entropy, and running sums of log p, of the pointwise mutual
# information with the prompt, and of log p + entropy (how surprising the prefix is for this decoder).
_STATISTICS = 6
_SUM_SCALE = 0.1


@dataclass
class PARMState:
    """B half-decoded images as PARM knows them."""

    cache: KVCache | None  # of prompt and prefix; None where PARM is not causal
    sums: Tensor  # running sums over the prefix, [B, 3]
    lengths: Tensor  # tokens in the prefix of each row, [B], on the CPU
    prompt: Tensor  # projected, [B, L, dim]
    candidate_sums: Tensor  # `sums` with each candidate of the last `score`, [B, k, 3]

    def select(self, rows: Tensor) -> "PARMState":
        cache, lengths = self.cache and self.cache.select(rows), self.lengths[rows.cpu()]
        return PARMState(cache, self.sums[rows], lengths, self.prompt[rows], self.candidate_sums[rows])


class Matching(nn.Module):
    """Lets tokens read the words that name what they show: attention by sigmoid, whose weights are supervised.

    From one verdict an image a Transformer hardly learns it; from one for each token and word (`grounding`) it does
    (cf. GLIP, arXiv 2112.03857).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, dim))
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)

    def forward(self, x: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, S, dim] and prompt [B, L, dim] -> what the tokens read [B, S, dim], match logits [B, S, L]."""
        logits = self.query(x) @ self.key(prompt).transpose(1, 2) * x.shape[-1] ** -0.5
        return logits.sigmoid().to(x.dtype) @ self.value(prompt), logits


class PARM(HubMixin, nn.Module, TokenVerifier[PARMState]):
    """Log-probability that the finished image will fulfil the prompt, for every prefix of its tokens.

    Args:
        transformer: sizes; the method's are width 512, 6 layers, 8 heads.
        grid: codes along each side of an image, which then has T = grid * grid tokens.
        decoder_dim: width of the shared decoder.
        feature_layers: the depths at which the decoder shows its hidden states in `DecoderFeatures`.
        input_features: `embeddings` reads the decoder's embeddings alone, `hidden` its hidden states (with and without
            the prompt) and log-probabilities, too.
        causal: for next-token decoders: values every prefix in one pass and decodes with a cache. False is for
            mask-token decoders: reads whole grids with undecided tokens marked, one pass a grid.
    """

    remembers = True

    def __init__(
        self,
        transformer: TransformerConfig,
        grid: int,
        decoder_dim: int,
        feature_layers: Sequence[int],
        input_features: InputFeatures,
        causal: bool,
    ) -> None:
        super().__init__()
        if input_features not in ("hidden", "embeddings"):
            raise ValueError(f"parm.input_features must be 'hidden' or 'embeddings', not {input_features!r}")
        dim, feature_dim = transformer.dim, decoder_dim * len(feature_layers)
        self.input_features, self.causal, self.num_tokens = input_features, causal, grid**2
        self.prompt_proj = Linear(2 * decoder_dim, dim)
        self.token_proj = Linear(decoder_dim, dim)
        self.token_norm = nn.LayerNorm(decoder_dim)
        self.matching = Matching(dim)
        if input_features == "hidden":
            self.image_norm = nn.LayerNorm(feature_dim)
            self.image_proj = Linear(feature_dim, dim)
            self.hidden_norm = nn.LayerNorm(feature_dim)
            self.hidden_proj = Linear(feature_dim, dim)
            self.statistics_proj = Linear(_STATISTICS, dim)
            self.statistics_head = Linear(_STATISTICS, 1, bias=False)
            nn.init.zeros_(self.statistics_head.weight)
        if not causal:
            self.undecided = nn.Parameter(torch.randn(dim) * 0.5)
        # As large as what they are added to: where objects are is half of what prompts ask.
        self.rows = nn.Parameter(torch.randn(grid, 1, dim) * 0.5)
        self.columns = nn.Parameter(torch.randn(1, grid, dim) * 0.5)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(Linear(dim, dim // 2), nn.GELU(), Linear(dim // 2, 1))
        self.clause_head = Linear(dim, len(CLAUSES))

    def cache_key(self) -> dict[str, Any]:
        """Its weights and sizes; what it reads of the decoder shows in both."""
        sizes = key_of(self.transformer.config)
        return {"class": class_name(self), "weights": fingerprint(self), "transformer": sizes}

    def warm_start(self, name: str, stored: CheckpointReader) -> None:
        """Begin training with the weights of a causal PARM of the same sizes: all but the mark of undecided tokens.

        Raises:
            ValueError: a tensor of the weights, which errors call `name`, is missing or of another shape.
        """
        begin = {key: [weight] for key, weight in self.named_parameters() if key != "undecided"}
        copy_from(stored, begin, f"parm.start={name!r}")

    @property
    def _positions(self) -> Tensor:
        """Position embeddings, [T, dim]."""
        return (self.rows + self.columns).flatten(0, 1)

    def _inputs(
        self, prompt: Tensor, features: DecoderFeatures, statistics: Tensor, trust: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Projected tokens, without positions, [B, S, dim], and which words of the projected prompt they match."""
        x = self.token_proj(self.token_norm(features.embeddings))
        if self.input_features == "hidden":
            x = self._shared(x, self.image_proj(self.image_norm(features.unconditional_hidden)))
        matched, match_logits = self.matching(x, prompt)
        x = x + matched
        if self.input_features == "hidden":
            x = self._shared(x, trust * self.hidden_proj(self.hidden_norm(features.hidden)))
            x = x + trust * self.statistics_proj(statistics)
        return x, match_logits

    @staticmethod
    def _shared(x: Tensor, part: Tensor) -> Tensor:
        """Add what k candidates have in common [B, S / k, dim] to each of them, [B, S, dim]."""
        return (x.unflatten(1, (-1, part.shape[1])) + part[:, None]).flatten(1, 2)

    def _logits(self, hidden: Tensor, statistics: Tensor, trust: Tensor | float = 1.0) -> Tensor:
        """Value logits [B, S] from hidden states [B, S, dim], and directly from statistics: sums of log p rank well."""
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would tie values that differ
            logits = self.head(hidden.float())
            if self.input_features == "hidden":
                logits = logits + trust * self.statistics_head(statistics.float())
        return logits.squeeze(-1)

    @staticmethod
    def _statistics(features: DecoderFeatures, sums: Tensor) -> Tensor:
        """Numbers about each token, [B, S, 6]; the running `sums` [B, S, 3] include the token itself."""
        own = torch.stack([features.log_probs, features.unconditional_log_probs, features.own_entropy], dim=-1)
        return torch.cat([own, _SUM_SCALE * sums], dim=-1)

    @staticmethod
    def _increments(features: DecoderFeatures) -> Tensor:
        """The addition of each token to the running sums, [B, S, 3]."""
        log_p = features.log_probs
        return torch.stack([log_p, log_p - features.unconditional_log_probs, log_p + features.own_entropy], dim=-1)

    def forward(self, features: DecoderFeatures, trusted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits that the image will be right, that each clause will hold, and that a token shows what a word names.

        Args:
            features: about all T tokens of images; if not causal, at any step on the way.
            trusted: bool [B]; where it is false, hidden states with the prompt and log-probabilities are not read.

        Returns [B, T] and [B, T, clauses] if causal, else [B, 1] and [B, 1, clauses]; [B, T, L] (see `grounding`).
        """
        trust = 1.0 if trusted is None else trusted[:, None, None].float()
        prompt = self.prompt_proj(features.prompt)
        if not self.causal:
            return self._read_grids(prompt, features, trust)
        statistics = self._statistics(features, self._increments(features).cumsum(1))
        x, match_logits = self._inputs(prompt, features, statistics, trust)
        x = torch.cat([prompt, x + self._positions], dim=1)
        hidden = self.norm(self.transformer(x, causal=True)[-1][:, -self.num_tokens :])
        return self._logits(hidden, statistics, trust), self.clause_head(hidden), match_logits

    def _read_grids(
        self, prompt: Tensor, features: DecoderFeatures, trust: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` for k grids each: [B, k], [B, k, clauses] and [B, k T, L]. What was decided counts in the sums."""
        assert features.undecided is not None
        k = features.candidates
        undecided = features.undecided[..., None]
        sums = self._increments(features).masked_fill(undecided, 0).unflatten(1, (k, -1))
        sums = sums.sum(2, keepdim=True).expand_as(sums).flatten(1, 2)
        statistics = self._statistics(features, sums)
        x, match_logits = self._inputs(prompt, features, statistics, trust)
        grids = (x + undecided * self.undecided).unflatten(1, (k, -1)) + self._positions
        x = torch.cat([prompt[:, None].expand(-1, k, -1, -1), grids], dim=2).flatten(0, 1)
        hidden = self.transformer(x, causal=False)[-1][:, -self.num_tokens :]
        hidden = self.norm(hidden).mean(1).unflatten(0, (-1, k))
        statistics = statistics.unflatten(1, (k, -1)).mean(2)
        return self._logits(hidden, statistics, trust), self.clause_head(hidden), match_logits

    @torch.no_grad()
    def values(self, features: DecoderFeatures, lengths: Sequence[int]) -> Tensor:
        logits = self(features)[0]
        if self.causal:
            logits = logits[:, torch.as_tensor(lengths, device=logits.device) - 1]
        return F.logsigmoid(logits)

    @torch.no_grad()
    def begin(self, prompt: Tensor, capacity: int) -> PARMState:
        projected = self.prompt_proj(prompt)
        cache = None
        if self.causal:
            cache = KVCache(prompt.shape[1] + capacity)
            self.transformer(projected, causal=True, cache=cache)
        sums = projected.new_zeros(len(prompt), 3)
        return PARMState(cache, sums, torch.zeros(len(prompt), dtype=torch.int64), projected, sums[:, None])

    def value(
        self, memory: PARMState, rows: Rows, state: DecodingState, proposal: Proposal, previews: Pixels
    ) -> Tensor:
        assert proposal.features is not None  # `check_decoder`
        self.sync(memory, state.features, state.position)
        return self.score(memory, proposal.features)

    @torch.no_grad()
    def sync(self, state: PARMState, features: DecoderFeatures | None, position: Tensor) -> None:
        """Read the tokens that the decoder passed without a choice: the prefix of row b ends before position[b] then.

        The positions [B] are on the CPU; the prefix may have been longer.
        """
        if features is None or state.cache is None or (position == state.lengths).all():
            return
        counts = (position - state.lengths).clamp(min=0)
        rows = torch.arange(len(position))
        sums = F.pad(self._increments(features).cumsum(1), (0, 0, 1, 0))  # [B, T + 1, 3], by length of the prefix
        state.cache.lengths = state.cache.lengths - (state.lengths - position).clamp(min=0)
        if counts.any():
            offset = torch.arange(int(counts.max()))
            positions = (state.lengths[:, None] + offset).clamp(max=self.num_tokens - 1)
            passed = features.at(positions.to(sums.device))
            x, _ = self._inputs(state.prompt, passed, self._statistics(passed, sums[rows[:, None], positions + 1]))
            self.transformer.extend(x + self._positions[positions.to(x.device)], counts, state.cache)
        state.sums, state.lengths = sums[rows, position], position

    @torch.no_grad()
    def score(self, state: PARMState, features: DecoderFeatures) -> Tensor:
        """Log-value of the images extended by each of k candidates, [B, k]."""
        if state.cache is None:
            return F.logsigmoid(self._read_grids(state.prompt, features)[0])
        state.candidate_sums = state.sums[:, None] + self._increments(features)
        statistics = self._statistics(features, state.candidate_sums)
        x, _ = self._inputs(state.prompt, features, statistics)
        position = state.lengths.to(x.device)
        hidden = self.norm(self.transformer.step(x + self._positions[position, None], state.cache)[-1])
        return F.logsigmoid(self._logits(hidden, statistics))

    @torch.no_grad()
    def commit(self, state: PARMState, choice: Tensor) -> None:
        if state.cache is None:
            return
        rows = torch.arange(len(choice), device=choice.device)
        state.sums = state.candidate_sums[rows, choice]
        state.lengths = state.lengths + 1
        state.cache.commit(choice)
