"""The contract of strategies: what each is given and what it returns."""

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
from lightning_modules.rewards.verifier import Ability, Judge, Rows

Judges = Mapping[str, Judge[Any]]


@dataclass(frozen=True)
class Decoded:
    """B finished images.

    Attributes:
        tokens: [B, T].
        features: what the decoder knew about each token when it was chosen; None from decoders without features.
        cost: of the whole batch, candidates that were not kept included.
        first_unverified: the token (of mask-token decoders: the step) from which on the decoder alone decided, [B], on
            the CPU; 0 in plain sampling.
        trajectory: of mask-token decoders: how each grid was filled.
        trace: what was chosen on the way, and what reflection did.
        stats: numbers about how each image was made, to be logged, [B] each.
        log_probs: of what was taken at each step, under the distribution that it was drawn from, [B, steps]; None of
            images that were decoded anew in part.
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
        """Keep some of the images; the cost stays that of all."""
        return replace(
            self,
            tokens=self.tokens[rows],
            features=self.features and self.features.select(rows),
            first_unverified=self.first_unverified[rows.cpu()],
            trajectory=self.trajectory and self.trajectory.select(rows),
            trace=[event.select(rows) for event in self.trace],
            stats={name: values[rows] for name, values in self.stats.items()},
            log_probs=None if self.log_probs is None else self.log_probs[rows],
        )

    def put(self, rows: Tensor, other: "Decoded") -> "Decoded":
        """Put the images of `other` in the place of those at `rows`; the cost stays this one's.

        Of a trajectory it is the end that is replaced.
        """
        first_unverified = other.first_unverified.to(self.first_unverified)
        return replace(
            self,
            tokens=self.tokens.index_put((rows,), other.tokens),
            features=self.features and other.features and self.features.put(rows, other.features),
            first_unverified=self.first_unverified.index_put((rows.cpu(),), first_unverified),
            trajectory=self.trajectory and other.trajectory and self.trajectory.put(rows, other.trajectory),
            log_probs=None,
        )

    def all_chosen(self, rows: Tensor) -> "Decoded":
        """Mark images as chosen by a judge: of these the decoder alone has drawn nothing but the finished image."""
        last = self.tokens.shape[1] if self.trajectory is None else self.trajectory.previews.shape[1] - 1
        return replace(self, first_unverified=self.first_unverified.index_fill(0, rows.cpu(), last))


class Strategy(Keyed):
    """A way to decode; strategies know judges by name, so that a config can be read before anything is trained."""

    def cache_key(self) -> Any:
        """Its class and all its fields, of what it wraps as well; strategies that are no dataclasses say their own."""
        return fields_key(self)

    @property
    def reflection_rounds(self) -> int:
        """Rounds of reflection in it; a reflection around it continues their count, which decides its noise."""
        return 0

    @property
    @abstractmethod
    def judge_names(self) -> Sequence[str]:
        """Names of all judges by which it, or what it wraps, chooses."""

    @property
    @abstractmethod
    def images_at_once(self) -> int:
        """Images, or candidates for one, that are decoded side by side for each image that is asked for."""

    def check_judges(self, judges: Judges) -> None:
        """Raise ValueError if a judge cannot do what this strategy, or what it wraps, asks of it."""

    @abstractmethod
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        """Decode the images of a request, each with the noise of its own seed."""


class PathStrategy(Strategy):
    """A strategy that decodes n paths of each image side by side and moves them by the values of a verifier.

    Attributes:
        sampling: how candidates are drawn.
        n: paths of each image.
        verifier: name of the judge that values half-made images.
    """

    sampling: Any
    n: int
    verifier: str

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @property
    def images_at_once(self) -> int:
        return self.n


def require_positive(what: str, **settings: int) -> None:
    """Raise ValueError naming the first setting that is below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{what} needs {name} of at least 1, not {value}")


def judge_named(judges: Judges, name: str) -> Judge[Any]:
    """Look up a judge; raises ValueError with the names there are."""
    if name not in judges:
        raise ValueError(f"judge {name!r} does not exist here; there are: {', '.join(judges)}")
    return judges[name]


def judge_able(judges: Judges, name: str, ability: Ability) -> Judge[Any]:
    """Look up a judge with an ability; raises ValueError with the names of those that have it."""
    able = [key for key, judge in judges.items() if ability in judge.abilities]
    if name not in able:
        raise ValueError(f"judge {name!r} {ability.value}; there are: {', '.join(able) or 'none'}")
    return judges[name]


def judged(judge: Judge[Any], decoder: Decoder, rows: Rows, tokens: Tensor, features: DecoderFeatures | None) -> Tensor:
    """Score finished images [B, T] by a judge: a verifier's log-values, or rewards, [B]."""
    return judge.of_finished(rows, features, lambda: decoder.image_tokenizer.decode(tokens))
