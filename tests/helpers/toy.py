"""A decoder of three codes and four tokens whose every probability is known, and judges that know the truth about it.

Written against the contracts of decoders, strategies and judges alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Decoder, DecodingState, Proposal, Request
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.sampling import Noise, invert, uniform_noise
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy
from lightning_modules.rewards.verifier import Nothing, StepJudge, Verifier

CODES, TOKENS = 3, 4
IMAGES = torch.tensor(list(product(range(CODES), repeat=TOKENS)))  # all 81


class Identity(ImageTokenizer):
    """Tokens are grey levels."""

    codebook_size, grid, image_size = CODES, 2, 2

    def decode(self, tokens: Tensor) -> Tensor:
        return (tokens.float() / CODES).view(-1, 1, 2, 2).expand(-1, 3, -1, -1)


@dataclass
class ToyState(DecodingState):
    fixed: Tensor

    steps = TOKENS

    @property
    def decided(self) -> Tensor:
        return self.position

    def select(self, rows: Tensor) -> "ToyState":
        return replace(super().select(rows), fixed=self.fixed[rows])


@dataclass(frozen=True)
class ToyProposal(Proposal):
    tokens: Tensor
    log_probs: Tensor
    features: DecoderFeatures | None = None


class ToyDecoder(Decoder):
    """Each token depends on the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tokenizer = Identity()
        logits = torch.randn(TOKENS, CODES, CODES, generator=torch.Generator().manual_seed(1))
        self.table = logits.log_softmax(-1)  # [position, code before, code]; before the first token it is code 0

    def cache_key(self) -> Any:
        return "toy"

    def noise(self, seeds: Sequence[int], k: int, sampling: Any) -> Noise:
        uniform = uniform_noise(seeds, k, TOKENS)
        return Noise(candidates=uniform[:, 1:], choice=uniform[:, 0])

    def begin(self, request: Request, sampling: Any, k: int = 1) -> ToyState:
        rows = len(request.rows)
        fixed = torch.zeros(rows, TOKENS, dtype=torch.bool) if request.fixed_mask is None else request.fixed_mask
        tokens = torch.zeros(rows, TOKENS, dtype=torch.int64) if request.tokens is None else request.tokens.clone()
        empty, log_probs = torch.zeros(rows, 0, 0), torch.zeros(rows, TOKENS)
        noise = self.noise(request.seeds, k, sampling)
        return ToyState(tokens, 0, noise, empty, None, log_probs, Cost(), fixed)

    def propose(self, state: ToyState, k: int, distinct: bool = False) -> ToyProposal:
        step = state.step
        before = state.tokens[:, step - 1] if step else torch.zeros_like(state.tokens[:, 0])
        log_p = self.table[step, before]
        drawn = invert(log_p.exp(), state.noise.candidates[:, :k, step])
        drawn = torch.where(state.fixed[:, step, None], state.tokens[:, step, None], drawn)
        state.cost.count_pass(len(drawn), 1)
        return ToyProposal(drawn[..., None], log_p.gather(1, drawn))

    def commit(self, state: ToyState, proposal: ToyProposal, choice: Tensor) -> None:
        rows = torch.arange(len(choice))
        state.tokens[:, state.step] = proposal.tokens[rows, choice, 0]
        state.log_probs[:, state.step] = proposal.log_probs[rows, choice]
        state.step += 1

    def preview(self, state: ToyState, proposal: ToyProposal | None = None) -> Tensor:
        tokens = state.tokens
        if proposal is not None:
            tokens = tokens.repeat_interleave(proposal.tokens.shape[1], 0)
            tokens[:, state.step] = proposal.tokens.flatten()
        return self.image_tokenizer.decode(tokens)

    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        return self.table[torch.arange(TOKENS), before, tokens]


class Truth(Verifier[Nothing]):
    """P(the code of the finished image's tokens adds up to a multiple of 3 | its first tokens), by enumeration."""

    def __init__(self, decoder: ToyDecoder) -> None:
        log_p = decoder.confidence([], IMAGES, None, Cost()).sum(1)
        self.probs, self.right = log_p.exp(), IMAGES.sum(1) % 3 == 0
        self.success = float((self.probs * self.right).sum())

    def cache_key(self) -> Any:
        return "truth"

    def chance(self, prefixes: Tensor) -> Tensor:
        """P(success | prefix) of prefixes [N, S], [N]."""
        fits = (IMAGES[:, : prefixes.shape[1]] == prefixes[:, None]).all(2).float()  # [N, 81]
        return (fits @ (self.probs * self.right)) / (fits @ self.probs)

    def value(
        self,
        memory: Nothing,
        rows: Sequence[Mapping[str, Any]],
        state: DecodingState,
        proposal: Proposal,
        previews: Callable[[], Tensor],
    ) -> Tensor:
        k = proposal.tokens.shape[1]
        before = state.tokens[:, : state.step].repeat_interleave(k, 0)
        chance = self.chance(torch.cat([before, proposal.tokens.flatten(0, 1)], 1))
        return chance.log().view(-1, k)

    def of_finished(
        self, rows: Sequence[Mapping[str, Any]], features: DecoderFeatures | None, pixels: Callable[[], Tensor]
    ) -> Tensor:
        tokens = (pixels()[:, 0].flatten(1) * CODES).round().long()
        return (tokens.sum(1) % 3 == 0).float().log()


class Glance(StepJudge):
    """Says of every preview that it is clear, and of its brightness that it is its potential."""

    def cache_key(self) -> Any:
        return "glance"

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(len(pixels)), pixels.mean((1, 2, 3))

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3))


@dataclass(frozen=True)
class Greedy(Strategy):
    """Takes the likeliest of k candidates at each step."""

    k: int

    @property
    def judge_names(self) -> list[str]:
        return []

    @property
    def images_at_once(self) -> int:
        return self.k

    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, None, self.k)
        while not paths.is_done:
            proposal = paths.propose(self.k)
            paths.commit(proposal, proposal.log_probs.argmax(1))
        return paths.finish()
