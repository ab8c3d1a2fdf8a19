"""The contract of judges: rewards read pixels, verifiers read what the decoder knows of half-made images."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, DecodingState, Proposal
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.cache_key import Keyed, class_name

Rows = Sequence[Mapping[str, Any]]  # GenEval metadata of prompts
Pixels = Callable[[], Tensor]  # decodes pixels [B, 3, H, W] in [0, 1]; not called by judges that read none


class Ability(Enum):
    """The abilities that only some judges have; the value says of the others that they cannot."""

    PATCHES = "does not score patches"
    CRITIQUE = "cannot say what is wrong"
    UNFINISHED = "cannot judge unfinished images"
    PREFIXES = "values no prefixes"


class VerifierState(Protocol):
    """The memory of a judge: what it knows of B half-made images; `select` keeps rows [B'], in order, with repeats."""

    def select(self, rows: Tensor) -> Self: ...


class Nothing:
    """The memory of a judge that sees each step anew."""

    def select(self, rows: Tensor) -> "Nothing":
        return self


S = TypeVar("S", bound=VerifierState)


class Judge(Keyed, Generic[S]):
    """Scores images, finished or half-made: higher is better."""

    abilities: ClassVar[frozenset[Ability]] = frozenset()  # methods of other abilities raise ValueError
    best_score: ClassVar[float] = math.inf  # no score is higher
    remembers: ClassVar[bool] = False  # its memory is of the steps that it has valued, so it has to value them all

    @abstractmethod
    def of_finished(self, rows: Rows, features: DecoderFeatures | None, pixels: Pixels) -> Tensor:
        """Score finished images [B], by features or pixels; raises ValueError if it needs features and gets none."""

    def begin(self, prompt: Tensor, capacity: int) -> Any:
        """Start beside a decoder: the `prompt` of its state, [B, L, 2 dim], for images of `capacity` tokens."""
        return Nothing()

    @abstractmethod
    def value(self, memory: S, rows: Rows, state: DecodingState, proposal: Proposal, previews: Pixels) -> Tensor:
        """Score B images extended by each of k candidates for the next step, `proposal`: [B, k].

        `memory` is what it knows of them; `previews` gives the best guesses at finished images, [B k, 3, H, W].
        """

    def commit(self, memory: S, choice: Tensor) -> None:
        """Add candidate `choice` [B] of the last `value` to the images that it remembers."""

    def check_decoder(self, decoder: Decoder) -> None:
        """Raise ValueError if it cannot read the half-made images of a decoder."""

    def as_probability(self, scores: Tensor) -> Tensor:
        """Turn scores into what people read: log-values into probabilities; rewards stay as they are."""
        return scores

    def values(self, features: DecoderFeatures, lengths: Sequence[int]) -> Tensor:
        """Log-value of the prefixes of these lengths (1..T) of images, [B, len(lengths)]; of grids, [B, 1]."""
        raise self._unable(Ability.PREFIXES)

    def patches(self, prompts: Sequence[str], pixels: Tensor, patches: int) -> Tensor:
        """Score each patch of images [B, 3, H, W] cut into an M x M grid, [B, M, M]."""
        raise self._unable(Ability.PATCHES)

    def critique(self, prompts: Sequence[str], pixels: Tensor) -> list[str]:
        """Say what finished images [B, 3, H, W], in [0, 1], do not show as their prompts say."""
        raise self._unable(Ability.CRITIQUE)

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of unfinished images [B, 3, H, W] in [0, 1]: P(clear enough to be judged), P(can still fulfil the prompt)."""
        raise self._unable(Ability.UNFINISHED)

    def _unable(self, ability: Ability) -> ValueError:
        return ValueError(f"{type(self).__name__} {ability.value}")


class Verifier(Judge[S]):
    """A judge whose scores are log-values: 0 is best."""

    best_score = 0.0

    def as_probability(self, scores: Tensor) -> Tensor:
        return scores.exp()


class TokenVerifier(Verifier[S]):
    """Values half-made images by the decoder's features: prefixes of next-token decoders, grids of mask-token ones."""

    abilities = frozenset({Ability.PREFIXES})

    def check_decoder(self, decoder: Decoder) -> None:
        decoder.check_readable()

    def of_finished(self, rows: Rows, features: DecoderFeatures | None, pixels: Pixels) -> Tensor:
        if features is None:
            raise ValueError(f"{type(self).__name__} needs features, which this decoder does not give; name a reward")
        return self.values(features, [features.hidden.shape[1]])[:, 0]


class Reward(Judge[Nothing]):
    """Judges finished images by their pixels, and half-made ones by previews, as if they were finished."""

    @abstractmethod
    def __call__(self, prompts: Rows, pixels: Tensor) -> Tensor:
        """GenEval metadata of B prompts and pixels [B, 3, H, W] in [0, 1] -> rewards [B]."""

    def of_preview(self, rows: Rows, pixels: Tensor) -> Tensor:
        """Score the best guesses at finished images, [B]."""
        return self(rows, pixels)

    def of_finished(self, rows: Rows, features: DecoderFeatures | None, pixels: Pixels) -> Tensor:
        return self(rows, pixels())

    def value(self, memory: Nothing, rows: Rows, state: DecodingState, proposal: Proposal, previews: Pixels) -> Tensor:
        k = proposal.tokens.shape[1]
        repeated = [row for row in rows for _ in range(k)]
        return self.of_preview(repeated, previews()).view(-1, k).to(state.tokens.device)


class Critic(Reward):
    """Says in words what is wrong with finished images."""

    abilities = frozenset({Ability.CRITIQUE})


class StepJudge(Reward):
    """Judges unfinished images by their potential: its score of a preview is log P(can still fulfil the prompt)."""

    abilities = frozenset({Ability.UNFINISHED})

    def of_preview(self, rows: Rows, pixels: Tensor) -> Tensor:
        return self.clear_and_potential([row["prompt"] for row in rows], pixels)[1].log()


class Likelihood(TokenVerifier[Nothing]):
    """The decoder's own log p(tokens | prompt): costs nothing, and is what every other verifier has to beat."""

    def cache_key(self) -> dict[str, Any]:
        """Its class: it has no settings, and the decoder has a key of its own."""
        return {"class": class_name(self)}

    def as_probability(self, scores: Tensor) -> Tensor:
        return scores  # of whole images' tokens: as probabilities they would all be 0

    def values(self, features: DecoderFeatures, lengths: Sequence[int]) -> Tensor:
        if features.undecided is not None:
            return self._of_grids(features, features.undecided)
        return features.log_probs.cumsum(-1)[:, torch.as_tensor(lengths, device=features.log_probs.device) - 1]

    def value(self, memory: Nothing, rows: Rows, state: DecodingState, proposal: Proposal, previews: Pixels) -> Tensor:
        assert proposal.features is not None  # `check_decoder`
        if proposal.features.undecided is not None:
            return self._of_grids(proposal.features, proposal.features.undecided)
        assert state.features is not None
        before = torch.arange(state.features.log_probs.shape[1]) < state.position[:, None]
        prefix = (state.features.log_probs * before.to(state.features.log_probs.device)).sum(1, keepdim=True)
        return prefix + proposal.features.log_probs

    @staticmethod
    def _of_grids(features: DecoderFeatures, undecided: Tensor) -> Tensor:
        """Log-probability of all that was decided, each token when it was drawn, [B, k]."""
        decided = features.log_probs.masked_fill(undecided, 0)
        return decided.unflatten(1, (features.candidates, -1)).sum(-1)
