"""The contract of decoders: prompts in, image tokens out, one step at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.hub import HubMixin
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.cache_key import Keyed

Values = Callable[[DecoderFeatures, Sequence[int]], Tensor]  # of a verifier; see `Verifier.values`


@dataclass
class Cost:
    """What decoding took, summed over its rows.

    Attributes:
        decoder_passes: forward passes of one row; conditional and unconditional rows count alike.
        verifier_calls: values asked of a judge.
        tokens: image tokens that went through these passes.
    """

    decoder_passes: int = 0
    verifier_calls: int = 0
    tokens: int = 0

    def count_pass(self, rows: int, tokens: int) -> None:
        """Count a forward pass of some rows, each with as many image tokens."""
        self.decoder_passes += rows
        self.tokens += rows * tokens

    def add(self, other: "Cost") -> None:
        """Count what something else took as well."""
        self.decoder_passes += other.decoder_passes
        self.verifier_calls += other.verifier_calls
        self.tokens += other.tokens


@dataclass(frozen=True)
class Request:
    """B images to decode.

    Attributes:
        rows: GenEval metadata, with the prompt.
        seeds: of the images; each image's noise comes from its own alone.
        tokens, fixed_mask: images [B, T] and which of their tokens stay as they are, bool [B, T]; None: none.
    """

    rows: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    tokens: Tensor | None = None
    fixed_mask: Tensor | None = None

    @property
    def prompts(self) -> list[str]:
        """The texts of the prompts."""
        return [row["prompt"] for row in self.rows]

    def repeat(self, n: int) -> "Request":
        """Ask for n images of each, neighbours; the first has the image's own seed."""
        tokens, fixed = (part if part is None else part.repeat_interleave(n, 0) for part in self._fixed)
        seeds = [seed if j == 0 else image_seed(seed, j) for seed in self.seeds for j in range(n)]
        return Request([row for row in self.rows for _ in range(n)], seeds, tokens, fixed)

    def select(self, rows: Tensor) -> "Request":
        """Ask for some of the images."""
        picked = rows.tolist()
        tokens, fixed = (part if part is None else part[rows] for part in self._fixed)
        return Request([self.rows[i] for i in picked], [self.seeds[i] for i in picked], tokens, fixed)

    @property
    def _fixed(self) -> tuple[Tensor | None, Tensor | None]:
        return self.tokens, self.fixed_mask


class Proposal(ABC):
    """k candidates for the next step of B images, all from one forward pass.

    Attributes:
        tokens: what each decides: the next token, [B, k, 1], or a whole image, [B, k, T], previews included.
        features: what the decoder knows of each candidate, for verifiers; None from decoders that do not say.
    """

    tokens: Tensor
    features: DecoderFeatures | None

    @property
    @abstractmethod
    def log_probs(self) -> Tensor:
        """Log-probability of each candidate under the distribution that it was drawn from, [B, k]."""

    @property
    @abstractmethod
    def repeats(self) -> Tensor:
        """Candidates that equal an earlier one of their row, bool [B, k]."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """A proposal of rows `rows` [B'], in that order and as often as they occur."""

    @abstractmethod
    def unfold(self) -> Self:
        """k candidates of B rows as one candidate each of B * k rows."""


@dataclass
class DecodingState(ABC):
    """B half-decoded images, which are at the same step.

    Attributes:
        tokens: [B, T]; those that are not decided are previews, or anything.
        step: steps done.
        noise: of the images.
        prompt: what verifiers read of the prompt, [B, L, 2 dim]; empty from decoders without features.
        features: what the decoder knows of the tokens decided so far; None before there are any, or without features.
        log_probs: of the candidate that was taken at each step, under the distribution that it was drawn from,
            [B, steps]; 0 of steps to come.
        cost: shared by all states that come from one `begin`.
    """

    tokens: Tensor
    step: int
    noise: Any
    prompt: Tensor
    features: DecoderFeatures | None
    log_probs: Tensor
    cost: Cost

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps in all."""

    @property
    def is_done(self) -> bool:
        """All steps are done."""
        return self.step == self.steps

    @property
    @abstractmethod
    def is_complete(self) -> Tensor:
        """Rows whose tokens are all decided and that wait for others, bool [B]."""

    @property
    @abstractmethod
    def position(self) -> Tensor:
        """Where verifiers have to be before this step, [B], on the CPU: tokens before the next one, or steps done."""

    @property
    @abstractmethod
    def decided(self) -> Tensor | None:
        """Tokens decided so far, from the first on, [B], on the CPU; None where they are not decided in this order."""

    @property
    @abstractmethod
    def choice_noise(self) -> Tensor:
        """Uniform noise [B] for choosing among the candidates of this step."""

    @property
    def trajectory(self) -> Trajectory | None:
        """How whole images were filled, step by step; None where tokens are decided one after the other."""
        return None

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """A state of rows `rows` [B'], in that order and as often as they occur."""

    @abstractmethod
    def fork(self, k: int) -> Self:
        """k paths of each row, neighbours; path j draws with the noise of candidate j."""

    def with_noise(self, noise: Any) -> Self:
        """The same images, which continue with other noise."""
        return replace(self, noise=noise.to(self.tokens.device))

    def reassign(self, rows: Tensor) -> Self:
        """The images of rows `rows` [B] take the places of these; the noise of each place stays."""
        return self.select(rows).with_noise(self.noise)

    def without_order_noise(self, rows: Tensor) -> Self:
        """Rows `rows`, bool [B], decide their most likely tokens first, without noise; only sets have an order."""
        raise ValueError(f"{type(self).__name__} decides its tokens in a fixed order: there is no noise to leave out")


@dataclass(frozen=True)
class Frames:
    """Moments on the way to an image, to be drawn.

    Attributes:
        title: what is seen.
        tokens: the image at each moment, [F, T].
        shown: which tokens are decided, bool [F, T]; None: whole images.
        captions: of the moments.
    """

    title: str
    tokens: Tensor
    shown: Tensor | None
    captions: list[str]


class Decoder(nn.Module, Keyed):
    """Turns prompts into image tokens; a step decides one token, a set of them, or the whole image.

    Attributes:
        feature_layers: the layers after which verifiers look at it; without any, those in token space cannot read it.
    """

    frozen_parts = ("image_tokenizer",)
    image_tokenizer: ImageTokenizer
    feature_layers: tuple[int, ...] = ()
    has_likelihood: ClassVar[bool] = False

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, T."""
        return self.image_tokenizer.num_tokens

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if a prompt cannot be read."""

    def check_readable(self) -> None:
        """Raise ValueError if it gives verifiers in token space nothing to read."""
        if not self.feature_layers:
            raise ValueError(f"verification needs features, and this {type(self).__name__} has no feature_layers")

    @abstractmethod
    def noise(self, seeds: Sequence[int], k: int, sampling: Any) -> Any:
        """The randomness of images with these seeds, for k candidates a step; each image's is its own seed's alone."""

    @abstractmethod
    def begin(self, request: Request, sampling: Any, k: int = 1) -> DecodingState:
        """The state before the first step, with noise for up to k candidates a step; prompts are encoded once."""

    @abstractmethod
    def propose(self, state: Any, k: int, distinct: bool = False) -> Proposal:
        """k candidates for the next step of each row, all from one forward pass; independent or `distinct` draws."""

    @abstractmethod
    def commit(self, state: Any, proposal: Any, choice: Tensor) -> None:
        """Candidate `choice` [B] of each row becomes part of the state."""

    def preview(self, state: Any, proposal: Any = None) -> Tensor:
        """The best guess at the finished images, pixels [B, 3, H, W]; with a proposal at each candidate's, [B k, ...].

        Raises:
            ValueError: there is none.
        """
        raise ValueError(f"{type(self).__name__} shows no image before it is finished")

    def frames(self, tokens: Tensor, trajectory: Trajectory | None, most: int) -> Frames | None:
        """At most so many moments on the way to an image [T]; None if there are none."""
        return None

    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """Log-probability of each token of finished images [B, T] given others of them, [B, T]; passes are counted."""
        raise ValueError(f"{type(self).__name__} gives tokens no probability")

    def value_gains(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        features: DecoderFeatures,
        values: Values,
        patches: int,
        cost: Cost,
    ) -> Tensor:
        """What each token of finished images [B, T], or its patch of M x M, adds to their value (a probability)."""
        raise ValueError(f"{type(self).__name__} has no values before an image is finished")


class TokenDecoder(HubMixin, Decoder):
    """A decoder of image tokens, which has a likelihood and can be trained.

    Attributes:
        causal: tokens are decided from the first to the last, one a step; else grids are filled.
    """

    causal: ClassVar[bool]
    has_likelihood = True

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of the embeddings."""

    @property
    @abstractmethod
    def max_words(self) -> int:
        """Words (text tokens) of the prompt in `DecoderFeatures`, L."""

    @abstractmethod
    def word_spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of a prompt that each of these words covers, start and end."""

    @abstractmethod
    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """What pre-training minimises: negative log-likelihood of images [B, T], nats a predicted token."""

    @abstractmethod
    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """log p(image | prompt) of images [B, T], nats, [B]. Differentiable.

        Decoders that can only estimate it draw what they need from each image's seed: equal seeds, equal estimates.
        """

    def pair_log_probs(
        self, prompts: Sequence[str], chosen: Tensor, rejected: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """`log_probs` of both images of B pairs, [B] each, from one pass; estimates draw alike for both."""
        both = self.log_probs([*prompts, *prompts], torch.cat([chosen, rejected]), [*seeds, *seeds])
        first, second = both.chunk(2)
        return first, second

    @property
    def likelihood_key(self) -> Any:
        """What decides `log_probs` beside the weights: how they are estimated; None where they are exact."""
        return None

    @abstractmethod
    def policy_log_probs(
        self, prompts: Sequence[str], tokens: Tensor, sampling: Any, trajectory: Trajectory | None = None
    ) -> Tensor:
        """Log-probability of the choices by which images [B, T] were decoded, under `sampling`, [B, steps].

        Differentiable, and equal to the `log_probs` of the decoding state but for rounding; for policy gradients.

        Args:
            prompts: of the images.
            tokens: the images.
            sampling: how they were drawn.
            trajectory: how grids were filled; None where tokens are decided one after the other.
        """

    @abstractmethod
    def features(self, prompts: Sequence[str], tokens: Tensor) -> DecoderFeatures:
        """What the decoder knows of finished images [B, T]; each stands for as many prompts, which are neighbours."""

    @abstractmethod
    def training_features(
        self, batch: Mapping[str, Any], finished: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        """What verifiers learn from.

        Args:
            batch: `prompt`, `tokens` [B, T] and, where stored, `features` and `trajectory`; see `PARMModule`.
            finished: fraction of grids that are read as they are after the last step, the others after any step.
            fraction: of the way at which grids are read; None draws a step for each. All prefixes are read at once.
        """
