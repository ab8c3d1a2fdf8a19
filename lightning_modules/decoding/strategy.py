"""What every strategy is given and gives back."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Decoder, Request
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.cache_key import Keyed, fields_key
from lightning_modules.decoding.trace import Choice, ReflectionRound
from lightning_modules.rewards.verifier import Judge, PreviewVerifier, Reward, StepJudge, TokenVerifier, Verifier

Judges = Mapping[str, Judge]


@dataclass(frozen=True)
class Decoded:
    """B finished images.

    Attributes:
        tokens: [B, T].
        features: what the decoder knew about each token when it was chosen; None from decoders that do not say.
        cost: of the whole batch, candidates that were not kept included.
        first_unverified: the token (of mask-token decoders: the step) from which on the decoder alone decided, [B];
            0 in plain sampling.
        trajectory: of mask-token decoders: how each grid was filled.
        trace: what was chosen on the way, and what reflection did.
        stats: numbers about how each image was made, to be logged, [B] each.
        log_probs: of what was taken at each step, under the distribution that it was drawn from, [B, steps]; None of
            images that were decoded again in part.
    """

    tokens: Tensor
    features: DecoderFeatures | None
    cost: Cost
    first_unverified: Tensor
    trajectory: Trajectory | None = None
    trace: Sequence[Choice | ReflectionRound] = ()
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    log_probs: Tensor | None = None

    def select(self, rows: Tensor) -> "Decoded":
        """Some of the images; the cost stays that of all."""
        return Decoded(
            self.tokens[rows],
            self.features and self.features.select(rows),
            self.cost,
            self.first_unverified[rows.cpu()],
            self.trajectory and self.trajectory.select(rows),
            [event.select(rows) for event in self.trace],
            {name: note[rows] for name, note in self.stats.items()},
            None if self.log_probs is None else self.log_probs[rows],
        )

    def put(self, rows: Tensor, other: "Decoded") -> "Decoded":
        """With the images of `other` in the place of those at `rows`; the cost stays this one's.

        Of a trajectory it is the end that is replaced.
        """
        tokens, first_unverified = self.tokens.index_put((rows,), other.tokens), self.first_unverified.clone()
        first_unverified[rows.cpu()] = other.first_unverified.to(first_unverified.dtype)
        features = self.features and other.features and self.features.put(rows, other.features)
        trajectory = self.trajectory and other.trajectory and self.trajectory.put(rows, other.trajectory)
        return replace(
            self,
            tokens=tokens,
            features=features,
            first_unverified=first_unverified,
            trajectory=trajectory,
            log_probs=None,
        )

    def all_chosen(self, rows: Tensor) -> "Decoded":
        """With images of which nothing is left that the decoder drew without a judge's say, but the finished image."""
        last = self.tokens.shape[1] if self.trajectory is None else self.trajectory.previews.shape[1] - 1
        return replace(self, first_unverified=self.first_unverified.index_fill(0, rows.cpu(), last))


class Strategy(Keyed):
    """A way to decode; strategies know judges by name, so that a config can be read before anything is trained."""

    def cache_key(self) -> Any:
        """Its class and all its fields, of what it wraps as well; strategies that are no dataclasses say their own."""
        return fields_key(self)

    @property
    @abstractmethod
    def judge_names(self) -> Sequence[str]:
        """Names of all judges by which it, or what it wraps, chooses."""

    @property
    @abstractmethod
    def images_at_once(self) -> int:
        """Images, or candidates for one, that are decoded side by side for each image that is asked for."""

    @abstractmethod
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        """Decode the images of a request, each with the noise of its own seed."""


def judge_named(judges: Judges, name: str) -> Judge:
    """TokenScorer up a judge; raises ValueError with the names there are."""
    if name not in judges:
        raise ValueError(f"judge {name!r} does not exist here; there are: {', '.join(judges)}")
    return judges[name]


def judged(
    judge: Judge, decoder: Decoder, rows: Sequence[Mapping[str, Any]], tokens: Tensor, features: DecoderFeatures | None
) -> Tensor:
    """What a judge says of finished images [B, T]: a verifier's log-value, or a reward, [B]."""
    return judge.of_finished(rows, features, lambda: decoder.image_tokenizer.decode(tokens))


def step_judge_named(judges: Judges, name: str) -> StepJudge:
    """TokenScorer up a judge that must be one of unfinished images; raises ValueError with the names there are."""
    judge = judges.get(name)
    if not isinstance(judge, StepJudge):
        known = ", ".join(key for key, value in judges.items() if isinstance(value, StepJudge))
        raise ValueError(f"judge {name!r} cannot judge unfinished images; there are: {known or 'none'}")
    return judge


def verifier_named(judges: Judges, name: str, decoder: Decoder) -> Verifier[Any]:
    """TokenScorer up a verifier for a decoder; a reward becomes one that judges previews.

    Raises:
        ValueError: there is no judge of that name, or the decoder gives it nothing to read.
    """
    judge = judge_named(judges, name)
    if isinstance(judge, TokenVerifier):
        decoder.check_readable()
    if isinstance(judge, Reward):
        return PreviewVerifier(judge)
    assert isinstance(judge, Verifier)
    return judge
