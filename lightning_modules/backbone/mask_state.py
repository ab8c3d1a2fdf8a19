"""Mask-token decoding on its way: the ids of the table of embeddings, half-decoded grids, proposals, trajectories."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Cost
from lightning_modules.backbone.evidence import STATISTICS, Evidence
from lightning_modules.backbone.mask_attention import Prefix
from lightning_modules.backbone.mask_sampling import MaskNoise, MaskSampling, masked_after


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
    def repeats(self) -> Tensor:
        """Candidates that equal an earlier one of their row, bool [B, k]."""
        both = torch.cat([self.tokens, self.masked.long()], -1)
        return (both[:, :, None] == both[:, None]).all(-1).tril(-1).any(2)

    @property
    def sampling_log_probs(self) -> Tensor:
        """Log-probability of the codes that each candidate fixes, [B, k]."""
        return self.probs.log().masked_fill(self.masked, 0).sum(-1)

    def select(self, rows: Tensor) -> "MaskProposal":
        """A proposal of some rows."""
        evidence = self.evidence and self.evidence.select(rows)
        return MaskProposal(self.tokens[rows], self.probs[rows], self.masked[rows], evidence)

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
    def finished(self) -> Tensor:
        """Rows that wait for others, bool [B]."""
        return ~self.unknown.any(1)

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
    def in_random_order(tokens: Tensor, steps: int, noise: Tensor) -> "Trajectory":
        """As if images [B, n] had been decoded in the order of `noise` [B, n], each preview being what came of it."""
        unknown = torch.ones_like(tokens, dtype=torch.bool)
        rank = noise.argsort(1).argsort(1)
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

    def put(self, rows: Tensor, other: "Trajectory") -> "Trajectory":
        """With the end of `other`, the image and which tokens came last, in the place of that of some rows."""
        last = self.previews.shape[1] - 1
        previews = self.previews.clone()
        previews[rows, last] = other.previews[:, -1]
        fixed_at = last - (other.previews.shape[1] - 1 - other.fixed_at).clamp(max=last)
        return Trajectory(previews, self.fixed_at.index_put((rows,), fixed_at))
