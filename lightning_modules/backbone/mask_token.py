"""Mask-token decoding (Show-o, arXiv 2408.12528): a prompt, then all image tokens at once, some of them masked.

A sequence is `t2i sot text eot soi image eoi`. Text is causal and does not see the image, so its keys and values are
computed once per prompt; soi, image and eoi see everything.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.decoder import Cost, Decoder
from lightning_modules.backbone.evidence import STATISTICS, Evidence
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.mask_attention import Grid, Prefix, Rotary
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_sampling import MaskNoise, MaskSampling, SeededNoise, least_confident, masked_after
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.backbone.text import TextTokenizer
from lightning_modules.backbone.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the one table of embeddings: text, ten special tokens, image codes, the mask.

    Attributes:
        text: ids of the text tokenizer.
        end_of_text: one of them, which opens and closes a prompt.
        codes: size of the image codebook.
        max_text: a prompt's block has one place more than this; longer ones are cut.
    """

    text: int
    end_of_text: int
    codes: int
    max_text: int

    @property
    def soi(self) -> int:
        return self.text + 1

    @property
    def eoi(self) -> int:
        return self.text + 2

    @property
    def t2i(self) -> int:
        return self.text + 5

    @property
    def first_code(self) -> int:
        return self.text + 10

    @property
    def mask(self) -> int:
        return self.first_code + self.codes

    @property
    def total(self) -> int:
        return self.mask + 1

    def block(self, text: Sequence[int]) -> list[int]:
        """Text ids -> `t2i sot text eot`, at most max_text + 1 ids; what is too long loses its end, with a warning."""
        opened = list(text) if text and text[0] == self.end_of_text else [self.end_of_text, *text]
        if len(opened) >= self.max_text:
            warnings.warn(f"prompts of more than {self.max_text - 2} text tokens lose their end", stacklevel=2)
        return [*[self.t2i, *opened][: self.max_text], self.end_of_text]


@dataclass(frozen=True)
class MaskProposal:
    """k ways to go on from one forward pass.

    Attributes:
        tokens: whole grids of codes, [B, k, n]: a preview of the image.
        probs: of the codes that were drawn, [B, k, n], 1 for known ones.
        masked: what is masked for the next step, bool [B, k, n].
        evidence: what the decoder knows about each grid, for a verifier; None from decoders that do not say.
    """

    tokens: Tensor
    probs: Tensor
    masked: Tensor
    evidence: Evidence | None

    @property
    def sampling_log_probs(self) -> Tensor:
        """Log-probability of the codes that each candidate fixes, [B, k]."""
        return self.probs.log().masked_fill(self.masked, 0).sum(-1)

    def unfold(self) -> "MaskProposal":
        """k candidates of B rows as one candidate each of B * k rows."""
        tokens, probs, masked = (part.flatten(0, 1)[:, None] for part in (self.tokens, self.probs, self.masked))
        return MaskProposal(tokens, probs, masked, self.evidence and self.evidence.unfold())


@dataclass
class MaskState:
    """B half-decoded images.

    Attributes:
        tokens: codes [B, n]; where `unknown` they are a preview, drawn but not kept.
        unknown: bool [B, n].
        step: steps done, of `sampling.steps`.
        sampling: how the grid is filled.
        temperature: scales the noise on confidences, [B, 1]; 1 is the schedule as it is.
        noise: of the images.
        prefixes: of the prompts and, with guidance or evidence, of the empty one.
        prompt: what verifiers read of it, [B, L, 2 dim].
        evidence: about the grid, each token as it was when it was drawn; None before the first step, and always from
            decoders that do not say.
        grids: tokens and unknown after each step so far.
        cost: shared by all states that come from one `begin`.
    """

    tokens: Tensor
    unknown: Tensor
    step: int
    sampling: MaskSampling
    temperature: Tensor
    noise: MaskNoise
    prefixes: list[Prefix]
    prompt: Tensor
    evidence: Evidence | None = None
    grids: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    @property
    def steps(self) -> int:
        return self.sampling.steps

    @property
    def done(self) -> bool:
        return self.step == self.steps

    @property
    def position(self) -> Tensor:
        """Steps done, [B], on the CPU."""
        return torch.full((len(self.tokens),), self.step)

    @property
    def choice_noise(self) -> Tensor:
        """Uniform noise [B] for choosing among the candidates of this step."""
        return self.noise.choice(self.step)

    @property
    def decided(self) -> Tensor:
        """`STATISTICS` of each token when it was drawn, [3, B, n]."""
        if self.evidence is None:
            return torch.zeros(3, *self.tokens.shape, device=self.tokens.device)
        return torch.stack([getattr(self.evidence, name) for name in STATISTICS])

    @property
    def trajectory(self) -> "Trajectory":
        """How the grids were filled so far."""
        return Trajectory.of(self.grids)

    def fork(self, k: int) -> "MaskState":
        """k paths per row, neighbours in the batch; path j draws with the noise of candidate j."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return replace(self.select(rows.repeat_interleave(k)), noise=self.noise.fork(k))

    def select(self, rows: Tensor) -> "MaskState":
        """A state of rows `rows` [B'], in that order and as often as they occur."""
        return replace(
            self,
            tokens=self.tokens[rows],
            unknown=self.unknown[rows],
            temperature=self.temperature[rows],
            noise=self.noise.select(rows),
            prefixes=[self.prefixes[0].select(rows), *self.prefixes[1:]],
            prompt=self.prompt[rows],
            evidence=self.evidence and self.evidence.select(rows),
            grids=[(tokens[rows], unknown[rows]) for tokens, unknown in self.grids],
        )


def guided(logits: Sequence[Tensor], scale: float) -> Tensor:
    """Classifier-free guidance: (1 + scale) conditional - scale unconditional, of logits [B, n, C]."""
    return (1 + scale) * logits[0] - scale * logits[1] if scale else logits[0]


@dataclass(frozen=True)
class Trajectory:
    """How B grids were filled, in S steps.

    Attributes:
        previews: the grid after each step, codes [B, S, n]; after the last it is the image.
        fixed_at: the step after which a token did not change any more, [B, n].
    """

    previews: Tensor
    fixed_at: Tensor

    @staticmethod
    def of(states: Sequence[tuple[Tensor, Tensor]]) -> "Trajectory":
        """From the tokens and what was unknown, [B, n] each, after each step."""
        previews, unknown = (torch.stack(part, 1) for part in zip(*states, strict=True))
        return Trajectory(previews, unknown.sum(1))

    @staticmethod
    def in_random_order(tokens: Tensor, steps: int) -> "Trajectory":
        """As if images [B, n] had been decoded in any order, each preview being what came of it."""
        unknown = torch.ones_like(tokens, dtype=torch.bool)
        rank = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)
        states = []
        for step in range(steps):
            unknown = rank < masked_after(step, steps, unknown)[:, None] * (step + 1 < steps)
            states.append((tokens, unknown))
        return Trajectory.of(states)

    def at(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The grids after steps [B], what was unknown before, and what is undecided after; S is the finished image."""
        rows = torch.arange(len(step), device=step.device)
        shown = self.previews[rows, step.clamp(max=self.previews.shape[1] - 1)]
        return shown, self.fixed_at >= step[:, None], self.fixed_at > step[:, None]

    def select(self, rows: Tensor) -> "Trajectory":
        """Keep some rows."""
        return Trajectory(self.previews[rows], self.fixed_at[rows])


class MaskTokenDecoder(Decoder):
    """Prompts in, image tokens out, a set of positions a step.

    Args:
        image_tokenizer: fixes the number of tokens and the codebook; turns tokens into pixels.
        text_tokenizer: turns prompts into ids.
        max_text: a prompt's block has one place more than this; longer prompts lose their end.
        transformer: sizes of the decoder.
        rotary_dims: dimensions of each head that carry the position.
        evidence_depths: after which layers (1 = first) hidden states are read by verifiers; without any the decoder
            gives no evidence.
        estimate: of log p of whole images; the default is `MaskEstimate()`.
        visual: codes are embedded (and predicted) by what they look like as well, and tokens by their row and column.
            Show-o has neither; small decoders learn much faster with both.
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        max_text: int,
        transformer: TransformerConfig,
        rotary_dims: int,
        evidence_depths: Sequence[int] = (),
        estimate: MaskEstimate | None = None,
        visual: bool = False,
    ) -> None:
        super().__init__()
        if not all(1 <= depth <= transformer.depth for depth in evidence_depths):
            raise ValueError(f"evidence_depths={list(evidence_depths)} must lie in 1..{transformer.depth}")
        if not 0 < rotary_dims <= transformer.head_dim or rotary_dims % 2:
            raise ValueError(f"rotary_dims={rotary_dims} must be even and within the head's {transformer.head_dim}")
        self.image_tokenizer = image_tokenizer.eval().requires_grad_(False)
        self.text_tokenizer = text_tokenizer
        vocabulary = Vocabulary(
            text_tokenizer.size, text_tokenizer.end_of_text, image_tokenizer.codebook_size, max_text
        )
        self.vocabulary = vocabulary
        self.rotary_dims = rotary_dims
        self.evidence_depths = tuple(evidence_depths)
        self.estimate = estimate or MaskEstimate()
        if (n_masks := self.estimate.n_masks) > self.num_tokens:
            raise ValueError(f"decoder.estimate.n_masks={n_masks}, but an image has only {self.num_tokens} tokens")
        self.embed = nn.Embedding(vocabulary.total, transformer.dim)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(transformer.dim)
        self.head = nn.Linear(transformer.dim, vocabulary.total)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.visual = visual
        self.largest_share = 1.0
        if visual:
            self.code_proj = nn.Linear(image_tokenizer.code_vectors.shape[1], transformer.dim, bias=False)
            nn.init.normal_(self.code_proj.weight, std=0.05 * self.code_proj.in_features**-0.5)
            self.rows = nn.Parameter(torch.randn(image_tokenizer.grid, 1, transformer.dim) * 0.02)
            self.columns = nn.Parameter(torch.randn(1, image_tokenizer.grid, transformer.dim) * 0.02)

    @property
    def dim(self) -> int:
        return self.transformer.config.dim

    @property
    def max_words(self) -> int:
        """Text tokens of the longest prompt; see `Decoder`."""
        return self.vocabulary.max_text - 2

    def _rotary(self, start: int, length: int) -> Rotary:
        positions = torch.arange(start, start + length, device=self.embed.weight.device)
        return Rotary.at(positions, self.rotary_dims)

    def _sequence(self, tokens: Tensor, unknown: Tensor) -> Tensor:
        """Codes [R, n] and which are masked -> ids of soi, image and eoi, [R, n + 2]."""
        words = self.vocabulary
        ids = torch.where(unknown, words.mask, tokens + words.first_code)
        return F.pad(F.pad(ids, (1, 0), value=words.soi), (0, 1), value=words.eoi)

    def _blocks(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.vocabulary.block(text) for text in self.text_tokenizer.encode(prompts)]

    def encode(self, prompts: Sequence[str]) -> Prefix:
        """The keys and values of G prompts; the empty one is the unconditional one."""
        return self.prompt_pass(self._blocks(prompts))[0]

    def _read(self, blocks: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
        """What verifiers read of G prompts: each text token by itself, and in the prompt, [G, L, 2 dim].

        Aligned on the left, zeros after the end: what is read does not depend on the other prompts.
        """
        layer = hidden[max(self.evidence_depths, default=1) - 1]
        read = layer.new_zeros(len(blocks), self.max_words, 2 * self.dim)
        for row, block in enumerate(blocks):
            words = self.embed(torch.tensor(block[2:-1], dtype=torch.int64, device=layer.device))
            places = slice(layer.shape[1] - len(block) + 2, layer.shape[1] - 1)
            both = [F.layer_norm(x, x.shape[-1:]) for x in (words, layer[row, places])]
            read[row, : len(words)] = torch.cat(both, -1)
        return read

    def prompt_pass(self, blocks: Sequence[Sequence[int]]) -> tuple[Prefix, list[Tensor]]:
        """Prompts `t2i sot text eot` -> their keys and values, and hidden states [G, P, dim] after every layer."""
        length = max(map(len, blocks))
        device = self.embed.weight.device
        real = torch.tensor([[False] * (length - len(block)) + [True] * len(block) for block in blocks], device=device)
        ids = torch.tensor([[self.vocabulary.text] * (length - len(block)) + list(block) for block in blocks])
        prefix = Prefix(self._rotary(self.vocabulary.max_text + 1 - length, length), real)
        return prefix, self.transformer.run(self.embed(ids.to(device)), prefix)

    def grid_pass(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> list[Tensor]:
        """Hidden states of soi, image and eoi, [R, n + 2, dim], after every layer.

        Args:
            tokens: codes [R, n].
            unknown: which of them are masked, bool [R, n].
            prefixes: each has the prompts of an equal share of the rows.
        """
        ids = self._sequence(tokens, unknown)
        rotary = self._rotary(self.vocabulary.max_text + 1, ids.shape[1])
        x = self.embed(ids)
        if self.visual:
            looks = self._looks()[tokens].masked_fill(unknown[..., None], 0)
            x = x + F.pad(looks + (self.rows + self.columns).flatten(0, 1), (0, 0, 1, 1))
        return self.transformer.run(x, Grid(rotary, prefixes))

    def _looks(self) -> Tensor:
        """What each code looks like, [C, dim]."""
        return self.code_proj(self.image_tokenizer.code_vectors)

    def _code_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of soi, image and eoi [R, n + 2, dim] -> logits of the codes, single precision [R, n, C]."""
        codes = slice(self.vocabulary.first_code, self.vocabulary.mask)
        weight = self.head.weight[codes] + self._looks() if self.visual else self.head.weight[codes]
        return F.linear(self.norm(hidden[:, 1:-1]), weight, self.head.bias[codes]).float()

    def code_logits(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits of the image codes at every position, single precision [R, n, C]; see `grid_pass`."""
        return self._code_logits(self.grid_pass(tokens, unknown, prefixes)[-1])

    def log_probs(self, prefix: Prefix, tokens: Tensor, masked: Tensor, as_trained: bool = False) -> Tensor:
        """log p(token | prompt, tokens that are not masked) where `masked`, else 0, [B, n]. Differentiable.

        Args:
            prefix: of B prompts.
            tokens: codes [B, n].
            masked: bool [B, n].
            as_trained: among all ids instead of the image codes, and of soi and eoi as well, [B, n + 2]: Show-o's own
                training never excludes these.
        """
        if not as_trained:
            log_p = self.code_logits(tokens, masked, [prefix]).log_softmax(-1)
            return log_p.gather(-1, tokens[..., None]).squeeze(-1) * masked
        log_p = self.head(self.norm(self.grid_pass(tokens, masked, [prefix])[-1])).float().log_softmax(-1)
        ids = self._sequence(tokens, torch.zeros_like(masked))
        return log_p.gather(-1, ids[..., None]).squeeze(-1) * F.pad(masked, (1, 1), value=True)

    def pair_log_probs(
        self, prompts: Sequence[str], chosen: Tensor, rejected: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Estimates of log p of both images of B pairs, by `estimate`; see `Decoder`."""
        estimate, length = self.estimate, chosen.shape[1]
        other = seeds if estimate.shared else [image_seed(seed, 1) for seed in seeds]
        masked = torch.cat([estimate.masks(own, length) for own in (seeds, other)], 1).to(chosen.device)
        rows = torch.arange(len(seeds), device=chosen.device).repeat(2 * estimate.n_masks)
        tokens = torch.cat([chosen, rejected]).repeat(estimate.n_masks, 1)
        log_p = self.log_probs(self.encode(prompts).select(rows), tokens, masked.flatten(0, 1), estimate.as_trained)
        total = log_p.sum(1).view(masked.shape[:2])
        if not estimate.as_trained:
            total = total * length / masked.sum(2)
        first, second = total.mean(0).chunk(2)
        return first, second

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if the text tokenizer cannot read a prompt; see `Decoder`."""
        self.text_tokenizer.encode(prompts)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of masked tokens of images [B, n], nats each; see `Decoder`.

        Of each image a share cos(pi t / 2) is masked, t uniform in [0, 1], and one token at least; `largest_share`
        scales it (`MaskWarmup`).
        """
        batch, length = tokens.shape
        share = self.largest_share * torch.cos(torch.rand(batch, 1, device=tokens.device) * math.pi / 2)
        order = torch.rand(batch, length, device=tokens.device).argsort(1).argsort(1)
        masked = order < (share * length).round().clamp(min=1)
        return -self.log_probs(self.encode(prompts), tokens, masked).sum() / masked.sum()

    def noise(self, seeds: Sequence[int], k: int, sampling: MaskSampling) -> SeededNoise:
        """Noise of images with these seeds; see `Decoder`."""
        return SeededNoise.draw(seeds, k, sampling.steps, self.num_tokens)

    @torch.no_grad()
    def begin(
        self,
        prompts: Sequence[str],
        noise: MaskNoise,
        sampling: MaskSampling,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> MaskState:
        """Start decoding one image per prompt.

        Args:
            prompts: B prompts.
            noise: of the images.
            sampling: how the grid is filled.
            tokens, keep: codes [B, n] and which of them stay as they are, bool [B, n]; default: none.
        """
        shape = len(prompts), self.num_tokens
        device = self.embed.weight.device
        blocks = self._blocks(prompts)
        prefix, hidden = self.prompt_pass(blocks)
        unconditional = bool(sampling.guidance or self.evidence_depths)
        known = torch.zeros(shape, dtype=torch.bool) if keep is None else keep
        return MaskState(
            tokens=torch.zeros(shape, dtype=torch.int64, device=device) if tokens is None else tokens.to(device),
            unknown=~known.to(device),
            step=0,
            sampling=sampling,
            temperature=torch.ones(len(prompts), 1, device=device),
            noise=noise,
            prefixes=[prefix, *([self.encode([""])] if unconditional else [])],
            prompt=self._read(blocks, hidden),
        )

    def look(self, state: MaskState) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states [R, n + 2, dim] after every layer, and logits [B, n, C] given the prompt and given none.

        Prompts and empty prompts are one batch; without guidance and evidence there are no empty ones.
        """
        branches = len(state.prefixes)
        tokens, unknown = state.tokens.repeat(branches, 1), state.unknown.repeat(branches, 1)
        state.cost.decoder_passes += len(tokens)
        hidden = self.grid_pass(tokens, unknown, state.prefixes)
        return hidden, list(self._code_logits(hidden[-1]).chunk(branches))

    @torch.no_grad()
    def propose(self, state: MaskState, k: int, distinct: bool = False) -> MaskProposal:
        """k ways to go on, all from one forward pass.

        Raises:
            ValueError: `distinct`; what is drawn are whole grids.
        """
        if distinct:
            raise ValueError("distinct candidates are tokens; a mask-token decoder draws whole grids")
        hidden, logits = self.look(state)
        probs = guided(logits, state.sampling.guidance).softmax(-1)
        drawn = state.noise.codes(state.step, probs, k)
        unknown = state.unknown[:, None].expand_as(drawn)
        chosen = probs.gather(2, drawn.transpose(1, 2)).transpose(1, 2)
        count = masked_after(state.step, state.steps, state.unknown)
        temperature = state.temperature * state.sampling.temperature_at(state.step)
        masked = least_confident(
            chosen.flatten(0, 1),
            unknown.flatten(0, 1),
            count.repeat_interleave(k),
            temperature.repeat_interleave(k, 0),
            state.noise.confidence(state.step, k).to(chosen.device).flatten(0, 1),
        ).view_as(drawn)
        tokens = torch.where(unknown, drawn, state.tokens[:, None])
        evidence = None
        if self.evidence_depths:
            last = state.step + 1 == state.steps
            undecided = masked & (not last)
            evidence = self._evidence(state.prompt, hidden, logits, tokens, state.unknown, undecided, state.decided)
        return MaskProposal(tokens, chosen.where(unknown, 1.0), masked, evidence)

    def _evidence(
        self,
        prompt: Tensor,
        hidden: Sequence[Tensor],
        logits: Sequence[Tensor],
        tokens: Tensor,
        unknown: Tensor,
        undecided: Tensor,
        decided: Tensor,
    ) -> Evidence:
        """Evidence about k grids [B, k, n] that were drawn from a pass with `hidden` [2B, ...] and two `logits`."""
        log_p, unconditional = (branch.log_softmax(-1) for branch in logits)
        index = tokens.transpose(1, 2)
        now = torch.stack([log.gather(2, index).transpose(1, 2) for log in (log_p, unconditional)])
        own = torch.where(unknown[:, None], now, decided[:2, :, None])
        entropy = -(log_p.exp() * log_p).sum(-1)
        embeddings = self.embed(tokens + self.vocabulary.first_code)
        if self.visual:
            embeddings = embeddings + self._looks()[tokens]
        seen = torch.cat([hidden[depth - 1][:, 1:-1] for depth in self.evidence_depths], -1).chunk(2)
        return Evidence(
            prompt=prompt,
            embeddings=embeddings.flatten(1, 2),
            hidden=seen[0],
            unconditional_hidden=seen[1],
            log_probs=own[0].flatten(1, 2),
            unconditional_log_probs=own[1].flatten(1, 2),
            entropy=torch.where(unknown, entropy, decided[2]),
            undecided=undecided.flatten(1, 2),
        )

    @torch.no_grad()
    def evidence(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        unknown: Tensor | None = None,
        undecided: Tensor | None = None,
        decided: Tensor | None = None,
    ) -> Evidence:
        """Evidence about grids, from a pass with each prompt and one without any; by default about finished images.

        Args:
            prompts: B * c of them.
            tokens: codes [B, n], previews included; each grid stands for c prompts, which are neighbours.
            unknown: what was masked in the pass that the previews come from, bool [B, n].
            undecided: what is still a preview after it, bool [B, n].
            decided: as in `MaskState`, [3, B, n], of what was known before the pass.
        """
        copies = len(prompts) // len(tokens)
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        unknown = nothing if unknown is None else unknown
        undecided = nothing if undecided is None else undecided
        decided = torch.zeros(3, *tokens.shape, device=tokens.device) if decided is None else decided
        bare = self.grid_pass(tokens, unknown, [self.encode([""])])
        tokens, unknown, undecided = (x.repeat_interleave(copies, 0) for x in (tokens, unknown, undecided))
        blocks = self._blocks(prompts)
        prefix, read = self.prompt_pass(blocks)
        full = self.grid_pass(tokens, unknown, [prefix])
        hidden = [torch.cat([h, b.repeat_interleave(copies, 0)]) for h, b in zip(full, bare, strict=True)]
        return self._evidence(
            self._read(blocks, read),
            hidden,
            self._code_logits(hidden[-1]).chunk(2),
            tokens[:, None],
            unknown,
            undecided[:, None],
            decided.repeat_interleave(copies, 1),
        )

    def commit(self, state: MaskState, proposal: MaskProposal, choice: Tensor) -> None:
        """Go on with candidate `choice` [B] of each row; after the last step nothing is masked."""
        rows = torch.arange(len(choice), device=choice.device)
        state.tokens = proposal.tokens[rows, choice]
        state.step += 1
        state.evidence = proposal.evidence and proposal.evidence.pick(choice)
        state.unknown = torch.zeros_like(state.unknown) if state.done else proposal.masked[rows, choice]
        state.grids.append((state.tokens, state.unknown))
