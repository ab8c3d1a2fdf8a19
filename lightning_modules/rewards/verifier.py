"""What says how good an image is: verifiers walk beside the decoder, rewards judge finished images."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lightning_modules.backbone.evidence import Evidence
from lightning_modules.identity import Keyed, class_name


class VerifierState(Protocol):
    """What a verifier remembers of B half-decoded images."""

    def select(self, rows: Tensor) -> Self:
        """A state of rows `rows` [B'], in that order and as often as they occur."""
        ...


S = TypeVar("S", bound=VerifierState)


class Verifier(Keyed, Generic[S]):
    """Values half-made images in token space, as log-values: higher is better, 0 is best for probabilities.

    Of a next-token decoder these are prefixes, of a mask-token decoder grids, whose evidence says what is decided.
    """

    @abstractmethod
    def values(self, evidence: Evidence, lengths: Sequence[int]) -> Tensor:
        """Log-value of the prefixes of these lengths (1..T) of images, [B, len(lengths)]; of grids, [B, 1]."""

    @abstractmethod
    def begin(self, prompt: Tensor, capacity: int) -> S:
        """Start beside a decoder: the `prompt` of `Evidence`, [B, L, 2 dim], for images of `capacity` tokens."""

    @abstractmethod
    def follow(self, state: S, evidence: Evidence | None, position: Tensor) -> None:
        """Go to where the decoder is: past tokens that it read without a choice, because they are kept.

        Args:
            state: of the images.
            evidence: about all tokens of them that are decided; None of grids before their first step.
            position: the prefix of row b is to end before position[b], [B], on the CPU; it may have been longer.
        """

    @abstractmethod
    def score(self, state: S, evidence: Evidence) -> Tensor:
        """Log-value of the image extended by each of k candidates, [B, k]."""

    @abstractmethod
    def commit(self, state: S, choice: Tensor) -> None:
        """Candidate `choice` [B] of the last `score` becomes part of the prefix."""


class Reward(Keyed):
    """Judges finished images."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        """GenEval metadata of B prompts and pixels [B, 3, H, W] in [0, 1] -> rewards [B]."""


class Critic(Reward):
    """Says in words what is wrong with finished images."""

    @abstractmethod
    def critique(self, prompts: Sequence[str], pixels: Tensor) -> list[str]:
        """What images [B, 3, H, W], in [0, 1], do not show as their prompts say."""


class StepJudge(Reward):
    """Judges unfinished images as well."""

    @abstractmethod
    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of unfinished images [B, 3, H, W] in [0, 1]: P(clear enough to be judged), P(can still fulfil the prompt)."""


@dataclass
class LikelihoodState:
    """Log-probability of the prefix [B], with each candidate of the last `score` [B, k], and its length [B]."""

    total: Tensor
    candidates: Tensor
    lengths: Tensor

    def select(self, rows: Tensor) -> "LikelihoodState":
        return LikelihoodState(self.total[rows], self.candidates[rows], self.lengths[rows.cpu()])


class Likelihood(Verifier[LikelihoodState]):
    """The decoder's own log p(tokens | prompt): costs nothing, and is what every other verifier has to beat."""

    def cache_key(self) -> dict[str, Any]:
        """Its class: it has no settings, and the decoder is somebody else's."""
        return {"class": class_name(self)}

    def values(self, evidence: Evidence, lengths: Sequence[int]) -> Tensor:
        if evidence.undecided is not None:
            return self._of_grids(evidence)
        return evidence.log_probs.cumsum(-1)[:, torch.as_tensor(lengths, device=evidence.log_probs.device) - 1]

    @staticmethod
    def _of_grids(evidence: Evidence) -> Tensor:
        """Log-probability of all that was decided, each token when it was drawn, [B, k]."""
        assert evidence.undecided is not None
        decided = evidence.log_probs.masked_fill(evidence.undecided, 0)
        return decided.unflatten(1, (evidence.candidates, -1)).sum(-1)

    def begin(self, prompt: Tensor, capacity: int) -> LikelihoodState:
        total = prompt.new_zeros(len(prompt))
        return LikelihoodState(total, total[:, None], torch.zeros(len(prompt), dtype=torch.int64))

    def follow(self, state: LikelihoodState, evidence: Evidence | None, position: Tensor) -> None:
        if evidence is None or evidence.undecided is not None:  # a grid's evidence tells of all that was decided
            return
        if (position != state.lengths).any():
            before = torch.arange(evidence.log_probs.shape[1]) < position[:, None]
            state.total = (evidence.log_probs * before.to(evidence.log_probs.device)).sum(1)
            state.lengths = position

    def score(self, state: LikelihoodState, evidence: Evidence) -> Tensor:
        if evidence.undecided is not None:
            state.candidates = self._of_grids(evidence)
        else:
            state.candidates = state.total[:, None] + evidence.log_probs
        return state.candidates

    def commit(self, state: LikelihoodState, choice: Tensor) -> None:
        state.total = state.candidates.gather(1, choice[:, None]).squeeze(1)
        state.lengths = state.lengths + 1
