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
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.mask_attention import Grid, Prefix, Rotary
from lightning_modules.backbone.mask_sampling import MaskNoise, MaskSampling, SeededNoise, least_confident, masked_after
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
    """

    tokens: Tensor
    probs: Tensor
    masked: Tensor


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
        prefixes: of the prompts and, with guidance, of the empty one.
        cost: shared by all states that come from one `begin`.
    """

    tokens: Tensor
    unknown: Tensor
    step: int
    sampling: MaskSampling
    temperature: Tensor
    noise: MaskNoise
    prefixes: list[Prefix]
    cost: Cost = field(default_factory=Cost)

    @property
    def done(self) -> bool:
        return self.step == self.sampling.steps

    def select(self, rows: Tensor) -> "MaskState":
        """A state of rows `rows` [B'], in that order and as often as they occur."""
        return replace(
            self,
            tokens=self.tokens[rows],
            unknown=self.unknown[rows],
            temperature=self.temperature[rows],
            noise=self.noise.select(rows),
            prefixes=[self.prefixes[0].select(rows), *self.prefixes[1:]],
        )


class MaskTokenDecoder(Decoder):
    """Prompts in, image tokens out, a set of positions a step.

    Args:
        image_tokenizer: fixes the number of tokens and the codebook; turns tokens into pixels.
        text_tokenizer: turns prompts into ids.
        max_text: a prompt's block has one place more than this; longer prompts lose their end.
        transformer: sizes of the decoder.
        rotary_dims: dimensions of each head that carry the position.
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        max_text: int,
        transformer: TransformerConfig,
        rotary_dims: int,
    ) -> None:
        super().__init__()
        if not 0 < rotary_dims <= transformer.head_dim or rotary_dims % 2:
            raise ValueError(f"rotary_dims={rotary_dims} must be even and within the head's {transformer.head_dim}")
        self.image_tokenizer = image_tokenizer.eval().requires_grad_(False)
        self.text_tokenizer = text_tokenizer
        vocabulary = Vocabulary(
            text_tokenizer.size, text_tokenizer.end_of_text, image_tokenizer.codebook_size, max_text
        )
        self.vocabulary = vocabulary
        self.rotary_dims = rotary_dims
        self.embed = nn.Embedding(vocabulary.total, transformer.dim)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(transformer.dim)
        self.head = nn.Linear(transformer.dim, vocabulary.total)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _rotary(self, start: int, length: int) -> Rotary:
        positions = torch.arange(start, start + length, device=self.embed.weight.device)
        return Rotary.at(positions, self.rotary_dims)

    def _sequence(self, tokens: Tensor, unknown: Tensor) -> Tensor:
        """Codes [R, n] and which are masked -> ids of soi, image and eoi, [R, n + 2]."""
        words = self.vocabulary
        ids = torch.where(unknown, words.mask, tokens + words.first_code)
        return F.pad(F.pad(ids, (1, 0), value=words.soi), (0, 1), value=words.eoi)

    def encode(self, prompts: Sequence[str]) -> Prefix:
        """The keys and values of G prompts; the empty one is the unconditional one."""
        return self.prompt_pass([self.vocabulary.block(text) for text in self.text_tokenizer.encode(prompts)])[0]

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
        return self.transformer.run(self.embed(ids), Grid(rotary, prefixes))

    def code_logits(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits of the image codes at every position, single precision [R, n, C]; see `grid_pass`."""
        codes = slice(self.vocabulary.first_code, self.vocabulary.mask)
        hidden = self.norm(self.grid_pass(tokens, unknown, prefixes)[-1][:, 1:-1])
        return F.linear(hidden, self.head.weight[codes], self.head.bias[codes]).float()

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

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if the text tokenizer cannot read a prompt; see `Decoder`."""
        self.text_tokenizer.encode(prompts)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of masked tokens of images [B, n], nats each; see `Decoder`.

        Of each image a share cos(pi t / 2) is masked, t uniform in [0, 1], and one token at least.
        """
        batch, length = tokens.shape
        share = torch.cos(torch.rand(batch, 1, device=tokens.device) * math.pi / 2)
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
        known = torch.zeros(shape, dtype=torch.bool) if keep is None else keep
        return MaskState(
            tokens=torch.zeros(shape, dtype=torch.int64, device=device) if tokens is None else tokens.to(device),
            unknown=~known.to(device),
            step=0,
            sampling=sampling,
            temperature=torch.ones(len(prompts), 1, device=device),
            noise=noise,
            prefixes=[self.encode(prompts), *([self.encode([""])] if sampling.guidance else [])],
        )

    def guided_logits(self, state: MaskState) -> Tensor:
        """Logits [B, n, C] that this step draws from, after guidance; conditional and empty prompts in one batch."""
        branches = len(state.prefixes)
        tokens, unknown = state.tokens.repeat(branches, 1), state.unknown.repeat(branches, 1)
        state.cost.count_pass(*tokens.shape)
        logits = self.code_logits(tokens, unknown, state.prefixes).chunk(branches)
        scale = state.sampling.guidance
        return logits[0] if branches == 1 else (1 + scale) * logits[0] - scale * logits[1]

    @torch.no_grad()
    def propose(self, state: MaskState, k: int) -> MaskProposal:
        """k ways to go on, all from one forward pass."""
        probs = self.guided_logits(state).softmax(-1)
        drawn = state.noise.codes(state.step, probs, k)
        unknown = state.unknown[:, None].expand_as(drawn)
        chosen = probs.gather(2, drawn.transpose(1, 2)).transpose(1, 2)
        count = masked_after(state.step, state.sampling.steps, state.unknown)
        temperature = state.temperature * state.sampling.temperature_at(state.step)
        masked = least_confident(
            chosen.flatten(0, 1),
            unknown.flatten(0, 1),
            count.repeat_interleave(k),
            temperature.repeat_interleave(k, 0),
            state.noise.confidence(state.step, k).to(chosen.device).flatten(0, 1),
        )
        tokens = torch.where(unknown, drawn, state.tokens[:, None])
        return MaskProposal(tokens, chosen.where(unknown, 1.0), masked.view_as(drawn))

    def commit(self, state: MaskState, proposal: MaskProposal, choice: Tensor) -> None:
        """Go on with candidate `choice` [B] of each row; after the last step nothing is masked."""
        rows = torch.arange(len(choice), device=choice.device)
        state.tokens = proposal.tokens[rows, choice]
        state.step += 1
        state.unknown = torch.zeros_like(state.unknown) if state.done else proposal.masked[rows, choice]
