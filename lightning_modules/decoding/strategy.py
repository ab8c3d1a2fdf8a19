"""The contract of strategies: what each is given and what it returns."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Decoder, Request
from lightning_modules.backbone.features import DecoderFeatures
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
        first_unverified: token (of grids: step) from which on the decoder alone decided, [B], on the CPU.
        trajectory: how each image came about; None where tokens are decided one after the other.
        trace: what was chosen on the way, and what reflection did.
        stats: numbers about how each image was made, to be logged, [B] each.
        log_probs: see `DecodingState`, [B, steps]; None of images that were decoded anew in part.
    """

    tokens: Tensor
    features: DecoderFeatures | None
    cost: Cost
    first_unverified: Tensor
    trajectory: Any = None
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
        """Put other images in the place of those at `rows`, of a trajectory its end; the cost stays this one's."""
        first_unverified = other.first_unverified.to(self.first_unverified)
        return replace(
            self,
            tokens=self.tokens.index_put((rows,), other.tokens),
            features=self.features and other.features and self.features.put(rows, other.features),
            first_unverified=self.first_unverified.index_put((rows.cpu(),), first_unverified),
            trajectory=self.trajectory and other.trajectory and self.trajectory.put(rows, other.trajectory),
            log_probs=None,
        )

    def judged_by(self, judge: Judge[Any], decoder: Decoder, rows: Rows) -> Tensor:
        """Score the images of these prompts by a judge, [B]; the cost counts it."""
        self.cost.verifier_calls += len(self.tokens)
        return judged(judge, decoder, rows, self.tokens, self.features, self.cost)


class Part(Keyed):
    """A part of decoding that a config sets; it knows judges by name, so it can be read before anything is trained."""

    ability: ClassVar[Ability | None] = None  # that every judge which it asks must have

    def cache_key(self) -> Any:
        """Its class and all its fields, of what it wraps as well; parts that are no dataclasses say their own."""
        return fields_key(self)

    @property
    def parts(self) -> Mapping[str, "Part"]:
        """The parts that it wraps, by their keys in the config."""
        return {}

    @property
    @abstractmethod
    def judge_names(self) -> Sequence[str]:
        """Names of all judges that it, or what it wraps, asks."""

    def check_judges(self, judges: Judges) -> None:
        """Raise ValueError if a judge cannot do what is asked of it here, or by what is wrapped."""
        for name in self.judge_names if self.ability else ():
            judge_named(judges, name, self.ability)
        for part in self.parts.values():
            part.check_judges(judges)

    def check_decoder(self, decoder: Decoder) -> None:
        """Raise ValueError, with the key first, if a setting, or one of what is wrapped, does not go with a decoder."""
        for key, part in self.parts.items():
            try:
                part.check_decoder(decoder)
            except ValueError as error:
                raise ValueError(f"{key}.{error}") from None


class Strategy(Part):
    """A way to decode."""

    @property
    def reflection_rounds(self) -> int:
        """Rounds of reflection in it; a reflection around it continues their count, which decides its noise."""
        return 0

    @property
    def start(self) -> "tuple[Strategy, int] | None":
        """Its field `strategy` if it starts from images of that, and how many of them an image; None: from nothing."""
        return None

    @property
    @abstractmethod
    def images_at_once(self) -> int:
        """Images, or candidates for one, that are decoded side by side for each image that is asked for."""

    @abstractmethod
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        """Decode the images of a request, each with the noise of its own seed."""


@dataclass(frozen=True)
class PathStrategy(Strategy):
    """A strategy that moves `Paths`, whose candidates are drawn by `sampling`."""

    sampling: Any

    def check_decoder(self, decoder: Decoder) -> None:
        super().check_decoder(decoder)
        if not isinstance(self.sampling, decoder.sampling_type):
            given, kind, wanted = (
                each.__name__ for each in (type(self.sampling), type(decoder), decoder.sampling_type)
            )
            raise ValueError(f"sampling is a {given}, and a {kind} takes a {wanted}")
        decoder.check_sampling(self.sampling)


class VerifierStrategy(PathStrategy):
    """A strategy that moves n paths of each image by the values of the judge that `verifier` names."""

    n: int
    verifier: str

    @property
    def judge_names(self) -> Sequence[str]:
        return [self.verifier]

    @property
    def images_at_once(self) -> int:
        return self.n


class StridedStrategy(VerifierStrategy):
    """One whose verifier is asked every `stride` steps."""

    stride: int

    def check_decoder(self, decoder: Decoder) -> None:
        super().check_decoder(decoder)
        if self.stride > (steps := decoder.steps(self.sampling)):
            raise ValueError(f"stride={self.stride} is more than the {steps} steps of an image")


def require_positive(what: str, **settings: int) -> None:
    """Raise ValueError naming the first setting that is below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{what} needs {name} of at least 1, not {value}")


def judge_named(judges: Judges, name: str, ability: Ability | None = None) -> Judge[Any]:
    """Look up a judge, with an ability; raises ValueError with the names of those there are."""
    able = [key for key, judge in judges.items() if ability is None or ability in judge.abilities]
    if name not in able:
        lacks = "does not exist here" if ability is None else ability.value
        raise ValueError(f"judge {name!r} {lacks}; there are: {', '.join(able) or 'none'}")
    return judges[name]


def judged(
    judge: Judge[Any],
    decoder: Decoder,
    rows: Rows,
    tokens: Tensor,
    features: DecoderFeatures | None,
    cost: Cost | None = None,
) -> Tensor:
    """Score finished images [B, T] by a judge: a verifier's log-values, or rewards, [B]; a cost counts the images."""
    return judge.of_finished(rows, features, lambda: decoder.pixels(tokens, cost or Cost()))
