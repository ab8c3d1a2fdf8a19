"""Judges: rewards judge finished images, verifiers half-made ones, in token space or by what can be seen already."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import DecodingState, Proposal
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.cache_key import Keyed, class_name, fields_key


class VerifierState(Protocol):
    """What a verifier remembers of B half-decoded images."""

    def select(self, rows: Tensor) -> Self:
        """A state of rows `rows` [B'], in that order and as often as they occur."""
        ...


class Judge(Keyed):
    """Anything that scores images: higher is better."""

    @abstractmethod
    def of_finished(
        self, rows: Sequence[Mapping[str, Any]], features: DecoderFeatures | None, pixels: Callable[[], Tensor]
    ) -> Tensor:
        """Scores [B] of finished images, from their prompts and from the features about them or their pixels.

        Raises:
            ValueError: it needs features, and there is none.
        """

    def as_probability(self, scores: Tensor) -> Tensor:
        """Scores as people read them: log-values as probabilities, rewards as they are."""
        return scores


S = TypeVar("S", bound=VerifierState)


class Verifier(Judge, Generic[S]):
    """Values half-made images while they are decoded, as log-values: 0 is best for probabilities."""

    @abstractmethod
    def begin(self, prompt: Tensor, capacity: int) -> S:
        """Start beside a decoder: the `prompt` of its state, [B, L, 2 dim], for images of `capacity` tokens."""

    @abstractmethod
    def value(
        self,
        memory: S,
        rows: Sequence[Mapping[str, Any]],
        state: DecodingState,
        proposal: Proposal,
        previews: Callable[[], Tensor],
    ) -> Tensor:
        """Log-value of B images extended by each of k candidates, [B, k].

        Args:
            memory: what it knows of them.
            rows: their prompts.
            state, proposal: the images, and the candidates for the next step.
            previews: gives the best guess at each candidate's finished image, pixels [B k, 3, H, W].
        """

    @abstractmethod
    def commit(self, memory: S, choice: Tensor) -> None:
        """Candidate `choice` [B] of the last `value` becomes part of the images."""


class TokenVerifier(Verifier[S]):
    """Values half-made images in token space, by what the decoder knows of them.

    Of a next-token decoder these are prefixes, of a mask-token decoder grids, whose features says what is decided.
    """

    @abstractmethod
    def values(self, features: DecoderFeatures, lengths: Sequence[int]) -> Tensor:
        """Log-value of the prefixes of these lengths (1..T) of images, [B, len(lengths)]; of grids, [B, 1]."""

    @abstractmethod
    def sync(self, state: S, features: DecoderFeatures | None, position: Tensor) -> None:
        """Go to where the decoder is: past tokens that it read without a choice, because they stay as they are.

        Args:
            state: of the images.
            features: about all tokens of them that are decided; None of grids before their first step.
            position: the prefix of row b is to end before position[b], [B], on the CPU; it may have been longer.
        """

    @abstractmethod
    def score(self, state: S, features: DecoderFeatures) -> Tensor:
        """Log-value of the image extended by each of k candidates, [B, k]."""

    def value(
        self,
        memory: S,
        rows: Sequence[Mapping[str, Any]],
        state: DecodingState,
        proposal: Proposal,
        previews: Callable[[], Tensor],
    ) -> Tensor:
        if proposal.features is None:
            raise ValueError(
                f"{type(self).__name__} needs features, which this decoder does not give: no feature_layers"
            )
        self.sync(memory, state.features, state.position)
        return self.score(memory, proposal.features)

    def of_finished(
        self, rows: Sequence[Mapping[str, Any]], features: DecoderFeatures | None, pixels: Callable[[], Tensor]
    ) -> Tensor:
        if features is None:
            raise ValueError(f"{type(self).__name__} reads what the decoder does not tell; name a reward")
        return self.values(features, [features.hidden.shape[1]])[:, 0]

    def as_probability(self, scores: Tensor) -> Tensor:
        return scores.exp()


class Reward(Judge):
    """Judges finished images by their pixels."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        """GenEval metadata of B prompts and pixels [B, 3, H, W] in [0, 1] -> rewards [B]."""

    def of_finished(
        self, rows: Sequence[Mapping[str, Any]], features: DecoderFeatures | None, pixels: Callable[[], Tensor]
    ) -> Tensor:
        return self(rows, pixels())


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


class Nothing:
    """The memory of a verifier that looks at each step anew."""

    def select(self, rows: Tensor) -> "Nothing":
        return self


@dataclass(frozen=True)
class PreviewVerifier(Verifier[Nothing]):
    """Makes a verifier of a reward: it judges the best guess at the finished image.

    Attributes:
        reward: a `StepJudge` is asked for the potential of what is unfinished, any other reward judges it as if it were
            finished.
    """

    reward: Reward

    def cache_key(self) -> Any:
        """That of the reward."""
        return fields_key(self)

    def begin(self, prompt: Tensor, capacity: int) -> Nothing:
        return Nothing()

    def value(
        self,
        memory: Nothing,
        rows: Sequence[Mapping[str, Any]],
        state: DecodingState,
        proposal: Proposal,
        previews: Callable[[], Tensor],
    ) -> Tensor:
        k = proposal.tokens.shape[1]
        repeated, pixels = [row for row in rows for _ in range(k)], previews()
        if isinstance(self.reward, StepJudge):
            scores = self.reward.clear_and_potential([row["prompt"] for row in repeated], pixels)[1].log()
        else:
            scores = self.reward(repeated, pixels)
        return scores.view(-1, k).to(state.tokens.device)

    def commit(self, memory: Nothing, choice: Tensor) -> None:
        """Nothing is remembered."""

    def of_finished(
        self, rows: Sequence[Mapping[str, Any]], features: DecoderFeatures | None, pixels: Callable[[], Tensor]
    ) -> Tensor:
        return self.reward(rows, pixels())

    def as_probability(self, scores: Tensor) -> Tensor:
        return scores.exp() if isinstance(self.reward, StepJudge) else scores


@dataclass
class LikelihoodState:
    """Log-probability of the prefix [B], with each candidate of the last `score` [B, k], and its length [B]."""

    total: Tensor
    candidates: Tensor
    lengths: Tensor

    def select(self, rows: Tensor) -> "LikelihoodState":
        return LikelihoodState(self.total[rows], self.candidates[rows], self.lengths[rows.cpu()])


class Likelihood(TokenVerifier[LikelihoodState]):
    """The decoder's own log p(tokens | prompt): costs nothing, and is what every other verifier has to beat."""

    def cache_key(self) -> dict[str, Any]:
        """Its class: it has no settings, and the decoder is somebody else's."""
        return {"class": class_name(self)}

    def as_probability(self, scores: Tensor) -> Tensor:
        return scores  # of whole images' tokens: as probabilities they would all be 0

    def values(self, features: DecoderFeatures, lengths: Sequence[int]) -> Tensor:
        if features.undecided is not None:
            return self._of_grids(features)
        return features.log_probs.cumsum(-1)[:, torch.as_tensor(lengths, device=features.log_probs.device) - 1]

    @staticmethod
    def _of_grids(features: DecoderFeatures) -> Tensor:
        """Log-probability of all that was decided, each token when it was drawn, [B, k]."""
        assert features.undecided is not None
        decided = features.log_probs.masked_fill(features.undecided, 0)
        return decided.unflatten(1, (features.candidates, -1)).sum(-1)

    def begin(self, prompt: Tensor, capacity: int) -> LikelihoodState:
        total = prompt.new_zeros(len(prompt))
        return LikelihoodState(total, total[:, None], torch.zeros(len(prompt), dtype=torch.int64))

    def sync(self, state: LikelihoodState, features: DecoderFeatures | None, position: Tensor) -> None:
        if features is None or features.undecided is not None:  # a grid's features tells of all that was decided
            return
        if (position != state.lengths).any():
            before = torch.arange(features.log_probs.shape[1]) < position[:, None]
            state.total = (features.log_probs * before.to(features.log_probs.device)).sum(1)
            state.lengths = position

    def score(self, state: LikelihoodState, features: DecoderFeatures) -> Tensor:
        if features.undecided is not None:
            state.candidates = self._of_grids(features)
        else:
            state.candidates = state.total[:, None] + features.log_probs
        return state.candidates

    def commit(self, state: LikelihoodState, choice: Tensor) -> None:
        state.total = state.candidates.gather(1, choice[:, None]).squeeze(1)
        state.lengths = state.lengths + 1
