"""PARM, the potential assessment reward model: a Transformer that values a prompt with the first tokens of an image.

The paper (arXiv 2501.13926, section 3) asks a vision-language model about half-made images; this is the compact
reading in token space: 6 layers and a head d -> d/2 -> GELU -> 1 on (prompt, tokens so far, candidate).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.next_token import Evidence
from lightning_modules.backbone.transformer import KVCache, Transformer, TransformerConfig
from lightning_modules.rewards.geneval import CLAUSES
from lightning_modules.rewards.verifier import Verifier

Features = Literal["hidden", "embeddings"]
# log p and log p without the prompt of the token, entropy, and running sums of log p, of the pointwise mutual
# information with the prompt, and of log p + entropy (how surprising the prefix is for this decoder).
_STATISTICS = 6
_SUM_SCALE = 0.1


@dataclass
class PARMState:
    """B half-decoded images as PARM knows them.

    Attributes:
        cache: keys and values of prompt and prefix (causal PARM).
        sums: running sums over the prefix, [B, 3].
        lengths: tokens in the prefix of each row, [B], on the CPU.
        inputs: projected inputs of the prefix, in room for all T, [B, T, dim]; used where PARM is not causal.
        prompt: projected prompt, [B, L, dim].
        candidate_sums: `sums` with each candidate of the last `score`, [B, k, 3].
        candidate_inputs: projected inputs of those candidates, [B, k, dim].
    """

    cache: KVCache
    sums: Tensor
    lengths: Tensor
    inputs: Tensor
    prompt: Tensor
    candidate_sums: Tensor
    candidate_inputs: Tensor

    def select(self, rows: Tensor) -> "PARMState":
        return replace(
            self,
            cache=self.cache.select(rows),
            sums=self.sums[rows],
            lengths=self.lengths[rows.cpu()],
            inputs=self.inputs[rows],
            prompt=self.prompt[rows],
            candidate_sums=self.candidate_sums[rows],
            candidate_inputs=self.candidate_inputs[rows],
        )


class Matching(nn.Module):
    """Lets tokens read the words that name what they show: attention by sigmoid, whose weights are supervised.

    To find the red star of a prompt in an image is what every value rests on. From one verdict an image a Transformer
    hardly learns it; from `grounding`, one verdict for each token and word, it does (cf. GLIP, arXiv 2112.03857).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(self, x: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, S, dim] and prompt [B, L, dim] -> what the tokens read [B, S, dim], match logits [B, S, L]."""
        logits = self.query(x) @ self.key(prompt).transpose(1, 2) * x.shape[-1] ** -0.5
        return logits.sigmoid().to(x.dtype) @ self.value(prompt), logits


class PARM(nn.Module, Verifier[PARMState]):
    """Log-probability that the finished image will fulfil the prompt, for every prefix of its tokens.

    Args:
        transformer: sizes; the method's are width 512, 6 layers, 8 heads.
        grid: codes along each side of an image, which then has T = grid * grid tokens.
        decoder_dim: width of the shared decoder.
        evidence_depths: the depths at which the shared decoder shows its hidden states in `Evidence`.
        features: `hidden` reads the decoder's hidden states (with and without the prompt) and log-probabilities
            beside its embeddings, `embeddings` reads the embeddings alone.
        causal: True values every prefix in one pass and decodes with a cache; False reads the whole grid with the
            undecided tokens masked, one pass a prefix.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        grid: int,
        decoder_dim: int,
        evidence_depths: Sequence[int],
        features: Features,
        causal: bool,
    ) -> None:
        super().__init__()
        if features not in ("hidden", "embeddings"):
            raise ValueError(f"parm.features must be 'hidden' or 'embeddings', not {features!r}")
        dim, num_tokens = transformer.dim, grid**2
        evidence_dim = decoder_dim * len(evidence_depths)
        self.features, self.causal, self.num_tokens = features, causal, num_tokens
        self.prompt_proj = nn.Linear(2 * decoder_dim, dim)
        self.token_proj = nn.Linear(decoder_dim, dim)
        self.token_norm = nn.LayerNorm(decoder_dim)
        self.matching = Matching(dim)
        if features == "hidden":
            self.image_norm = nn.LayerNorm(evidence_dim)
            self.image_proj = nn.Linear(evidence_dim, dim)
            self.hidden_norm = nn.LayerNorm(evidence_dim)
            self.hidden_proj = nn.Linear(evidence_dim, dim)
            self.statistics_proj = nn.Linear(_STATISTICS, dim)
            self.statistics_head = nn.Linear(_STATISTICS, 1, bias=False)
            nn.init.zeros_(self.statistics_head.weight)
        if not causal:
            self.mask = nn.Parameter(torch.randn(dim) * 0.02)
        # As large as what they are added to: where objects are is half of what prompts ask.
        self.rows = nn.Parameter(torch.randn(grid, 1, dim) * 0.5)
        self.columns = nn.Parameter(torch.randn(1, grid, dim) * 0.5)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, 1))
        self.clause_head = nn.Linear(dim, len(CLAUSES))

    @property
    def _positions(self) -> Tensor:
        """Position embeddings, [T, dim]."""
        return (self.rows + self.columns).flatten(0, 1)

    def _inputs(
        self, prompt: Tensor, evidence: Evidence, statistics: Tensor, trust: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Projected tokens, without positions, [B, S, dim], and which words of the projected prompt they match."""
        x = self.token_proj(self.token_norm(evidence.embeddings))
        if self.features == "hidden":
            x = x + self.image_proj(self.image_norm(evidence.unconditional_hidden))
        matched, match_logits = self.matching(x, prompt)
        x = x + matched
        if self.features == "hidden":
            x = x + trust * (self.hidden_proj(self.hidden_norm(evidence.hidden)) + self.statistics_proj(statistics))
        return x, match_logits

    def _logits(self, hidden: Tensor, statistics: Tensor, trust: Tensor | float = 1.0) -> Tensor:
        """Value logits [B, S] from hidden states [B, S, dim]; the statistics have a say of their own.

        The sum of log p ranks images by itself: PARM learns what to add to it.
        """
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would tie values that differ
            logits = self.head(hidden.float())
            if self.features == "hidden":
                logits = logits + trust * self.statistics_head(statistics.float())
        return logits.squeeze(-1)

    @staticmethod
    def _statistics(evidence: Evidence, sums: Tensor) -> Tensor:
        """Numbers about each token, [B, S, 6]; the running `sums` [B, S, 3] include the token itself."""
        entropy = evidence.entropy.expand_as(evidence.log_probs)
        own = torch.stack([evidence.log_probs, evidence.unconditional_log_probs, entropy], dim=-1)
        return torch.cat([own, _SUM_SCALE * sums], dim=-1)

    @staticmethod
    def _increments(evidence: Evidence) -> Tensor:
        """What each token adds to the running sums, [B, S, 3]."""
        log_p = evidence.log_probs
        return torch.stack([log_p, log_p - evidence.unconditional_log_probs, log_p + evidence.entropy], dim=-1)

    def forward(
        self, evidence: Evidence, lengths: Tensor | None = None, trusted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits that the image will be right, that each clause will hold, and that a token shows what a word names.

        Args:
            evidence: about all T tokens of finished images.
            lengths: for a PARM that is not causal, the prefix length (1..T) to value in each row, [B].
            trusted: bool [B]; in rows in which it is false, what the decoder thinks of the image given the prompt is
                not read: its hidden states with the prompt, and all log-probabilities. Default: all true.

        Returns:
            [B, T] and [B, T, clauses] if causal, else [B, 1] and [B, 1, clauses]; and [B, T, L] (see `grounding`).
        """
        statistics = self._statistics(evidence, self._increments(evidence).cumsum(1))
        trust = 1.0 if trusted is None else trusted[:, None, None].float()
        prompt = self.prompt_proj(evidence.prompt)
        x, match_logits = self._inputs(prompt, evidence, statistics, trust)
        if self.causal:
            x = torch.cat([prompt, x + self._positions], dim=1)
            hidden = self.norm(self.transformer(x, causal=True)[-1][:, -self.num_tokens :])
        else:
            assert lengths is not None
            hidden = self._read_masked(prompt, x, lengths)
            statistics = statistics[torch.arange(len(x), device=x.device), lengths - 1, None]
        return self._logits(hidden, statistics, trust), self.clause_head(hidden), match_logits

    def _read_masked(self, prompt: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Mean output over the grid whose tokens from `lengths` [B] on are masked, [B, 1, dim]."""
        known = torch.arange(self.num_tokens, device=inputs.device) < lengths[:, None]
        x = torch.where(known[..., None], inputs, self.mask) + self._positions
        hidden = self.transformer(torch.cat([prompt, x], dim=1), causal=False)[-1]
        return self.norm(hidden[:, -self.num_tokens :]).mean(1, keepdim=True)

    @torch.no_grad()
    def values(self, evidence: Evidence, lengths: Sequence[int]) -> Tensor:
        if self.causal:
            index = torch.as_tensor(lengths, device=evidence.log_probs.device) - 1
            return F.logsigmoid(self(evidence)[0][:, index])
        rows = torch.ones_like(evidence.log_probs[:, 0], dtype=torch.int64)
        return F.logsigmoid(torch.cat([self(evidence, rows * length)[0] for length in lengths], dim=1))

    @torch.no_grad()
    def begin(self, prompt: Tensor, capacity: int) -> PARMState:
        projected = self.prompt_proj(prompt)
        cache = KVCache(prompt.shape[1] + capacity)
        if self.causal:
            self.transformer(projected, causal=True, cache=cache)
        sums = projected.new_zeros(len(prompt), 3)
        inputs = projected.new_zeros(len(prompt), 0 if self.causal else capacity, projected.shape[2])
        lengths = torch.zeros(len(prompt), dtype=torch.int64)
        return PARMState(cache, sums, lengths, inputs, projected, sums[:, None], projected[:, :0])

    @torch.no_grad()
    def follow(self, state: PARMState, evidence: Evidence, position: Tensor) -> None:
        if (position == state.lengths).all():
            return
        counts = (position - state.lengths).clamp(min=0)
        rows = torch.arange(len(position))
        sums = F.pad(self._increments(evidence).cumsum(1), (0, 0, 1, 0))  # [B, T + 1, 3], by length of the prefix
        if self.causal:
            state.cache.lengths = state.cache.lengths - (state.lengths - position).clamp(min=0)
        if counts.any():
            offset = torch.arange(int(counts.max()))
            positions = (state.lengths[:, None] + offset).clamp(max=self.num_tokens - 1)
            passed = evidence.at(positions.to(sums.device))
            x, _ = self._inputs(state.prompt, passed, self._statistics(passed, sums[rows[:, None], positions + 1]))
            if self.causal:
                x = x + self._positions[positions.to(x.device)]
                self.transformer.extend(x, counts, state.cache)
            else:
                row, column = (offset < counts[:, None]).nonzero(as_tuple=True)
                state.inputs[row, positions[row, column]] = x[row, column]
        state.sums, state.lengths = sums[rows, position], position

    @torch.no_grad()
    def score(self, state: PARMState, evidence: Evidence) -> Tensor:
        state.candidate_sums = state.sums[:, None] + self._increments(evidence)
        statistics = self._statistics(evidence, state.candidate_sums)
        x, _ = self._inputs(state.prompt, evidence, statistics)
        state.candidate_inputs = x
        position = state.lengths.to(x.device)
        if self.causal:
            hidden = self.norm(self.transformer.step(x + self._positions[position, None], state.cache)[-1])
            return F.logsigmoid(self._logits(hidden, statistics))
        batch, k, dim = x.shape
        grid = state.inputs[:, None].repeat(1, k, 1, 1)
        grid[torch.arange(batch, device=x.device), :, position] = x
        lengths = (position + 1).repeat_interleave(k)
        hidden = self._read_masked(state.prompt.repeat_interleave(k, 0), grid.flatten(0, 1), lengths)
        return F.logsigmoid(self._logits(hidden.view(batch, k, dim), statistics))

    @torch.no_grad()
    def commit(self, state: PARMState, choice: Tensor) -> None:
        rows = torch.arange(len(choice), device=choice.device)
        state.sums = state.candidate_sums[rows, choice]
        if self.causal:
            state.cache.commit(choice)
        else:
            state.inputs[rows, state.lengths.to(rows.device)] = state.candidate_inputs[rows, choice]
        state.lengths = state.lengths + 1
