"""The contract of decoders: prompts in, images out, one step at a time.

A step decides one token (next-token decoders), a set of tokens (mask-token decoders) or takes noise off the whole image
(denoising decoders). A token is a code of the image tokenizer, or, of denoising decoders, a vector of D numbers: where
shapes say [B, T], theirs is [B, T, D].
Every strategy drives every decoder by the same loop:

    state = decoder.begin(request, sampling, k)
    while not state.is_done:
        proposal = decoder.propose(state, k)      # k candidates for the next step, from one forward pass
        decoder.commit(state, proposal, choice)   # one of them for each image

A new decoder is a `DecodingState`, a `Decoder` and, if `Proposal` lacks something, a subclass of that. What only some
decoders can do has a default here, which refuses in one sentence. `TokenDecoder` adds what training and verifiers in
token space need.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.hub import HubMixin
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.backbone.text import TextTokenizer
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.backbone.transformer import Transformer
from lightning_modules.cache_key import Keyed, class_name, key_of

Values = Callable[[DecoderFeatures, Sequence[int]], Tensor]  # of a verifier; see `TokenVerifier.values`


@dataclass(frozen=True)
class Request:
    """B images to decode."""

    rows: Sequence[Mapping[str, Any]]  # GenEval metadata, with the prompt
    seeds: Sequence[int]  # one an image; all noise of an image comes from its own
    tokens: Tensor | None = None  # images [B, T] to be decoded again in part
    fixed_mask: Tensor | None = None  # which of their tokens stay as they are, bool [B, T]

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    def initial(self, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] to begin with, and which of them stay, bool [B, T]; copies, all 0 where nothing stays."""
        if self.tokens is None or self.fixed_mask is None:
            tokens = torch.zeros(len(self.rows), num_tokens, dtype=torch.int64, device=device)
            return tokens, torch.zeros_like(tokens, dtype=torch.bool)
        return self.tokens.to(device, copy=True), self.fixed_mask.to(device, copy=True)

    def repeat(self, n: int) -> "Request":
        """Ask for n images of each, neighbours; the first has the image's own seed."""
        seeds = [seed if j == 0 else image_seed(seed, j) for seed in self.seeds for j in range(n)]
        return replace(self.select(torch.arange(len(self.rows)).repeat_interleave(n)), seeds=seeds)

    def select(self, rows: Tensor) -> "Request":
        """Ask for some of the images."""
        picked = rows.tolist()
        tokens, fixed_mask = (part if part is None else part[rows] for part in (self.tokens, self.fixed_mask))
        return Request([self.rows[i] for i in picked], [self.seeds[i] for i in picked], tokens, fixed_mask)


@dataclass
class Cost:
    """Work that decoding took, summed over its rows."""

    decoder_passes: int = 0  # forward passes of one row; conditional and unconditional rows count alike
    verifier_calls: int = 0  # values asked of a judge
    tokens: int = 0  # image tokens that went through these passes
    image_decodes: int = 0  # images made of tokens, finished or not, for judges to see
    seconds: float = 0.0  # of that work, what was done before, for another strategy

    def count_pass(self, rows: int, tokens: int) -> None:
        """Count a forward pass of some rows with this many image tokens each."""
        self.decoder_passes += rows
        self.tokens += rows * tokens

    def add(self, other: "Cost") -> None:
        self.decoder_passes += other.decoder_passes
        self.verifier_calls += other.verifier_calls
        self.tokens += other.tokens
        self.image_decodes += other.image_decodes
        self.seconds += other.seconds


@dataclass
class DecodingState(ABC):
    """B half-decoded images, all at the same step."""

    starts_alike: ClassVar[bool] = True  # before the first step, all paths of an image are the same

    tokens: Tensor  # [B, T]; those that are not decided yet are a preview, or anything
    step: int  # steps done
    noise: Any  # the randomness of the images, as `Decoder.noise` draws it; the defaults below expect a `Noise`
    prompt: Tensor  # features of the prompt for verifiers, [B, L, 2 dim]; empty from decoders without features
    features: DecoderFeatures | None  # of the tokens decided so far; None before, and from decoders without features
    log_probs: Tensor  # of the candidate taken at each step, as it was drawn, [B, steps]; 0 for steps to come
    cost: Cost  # shared by all states that come from one `begin`

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of steps in all."""

    @property
    def is_done(self) -> bool:
        return self.step == self.steps

    @property
    def is_complete(self) -> Tensor:
        """Images whose tokens are all decided while others are still at work, bool [B]."""
        return torch.full((len(self.tokens),), self.is_done, device=self.tokens.device)

    @property
    def position(self) -> Tensor:
        """Position of verifiers before this step, [B], on the CPU: tokens before the next one, by default the step."""
        return torch.full((len(self.tokens),), self.step)

    @property
    def decided(self) -> Tensor | None:
        """Number of tokens decided so far, [B], on the CPU; None where they are not decided from the first on."""
        return None

    @property
    def trajectory(self) -> Any:
        """How images came about, step by step; None where tokens are decided one after the other.

        That is a `Trajectory` of grids, or a `LatentTrajectory` of images that are denoised.
        """
        return None

    @property
    def choice_noise(self) -> Tensor:
        """Uniform noise [B] for choosing among the candidates of this step."""
        return self.noise.choice[:, self.step]

    def select(self, rows: Tensor) -> Self:
        """Take rows `rows` [B'], in that order and as often as they occur; a subclass adds the fields of its own."""
        tokens, prompt, log_probs = self.tokens[rows], self.prompt[rows], self.log_probs[rows]
        features, noise = self.features and self.features.select(rows), self.noise[rows]
        return replace(self, tokens=tokens, noise=noise, prompt=prompt, features=features, log_probs=log_probs)

    def fork(self, k: int) -> Self:
        """Make k paths of each row, neighbours; path j draws with the noise of candidate j."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(k)
        return replace(self.select(rows), noise=self.noise.fork(k))

    def as_candidate(self, number: int) -> Self:
        """Draw with the noise of candidate `number` of each row from now on; ValueError if candidates share a pass."""
        raise ValueError(f"candidates of a {type(self).__name__} are not drawn one by one: they share a pass")

    def with_noise(self, noise: Any) -> Self:
        """Continue the same images with other noise."""
        return replace(self, noise=noise.to(self.tokens.device))

    def without_order_noise(self, rows: Tensor) -> Self:
        """Let rows `rows`, bool [B], decide their likeliest tokens first; ValueError if the order is fixed."""
        raise ValueError(f"{type(self).__name__} decides its tokens in a fixed order: there is no noise to leave out")


@dataclass(frozen=True)
class Proposal:
    """k candidates for the next step of B images, from one forward pass; tensors that a subclass adds are [B, k, ...].

    A candidate decides the next token, [B, k, 1], or a whole image, [B, k, T] or [B, k, T, D], previews included.
    """

    tokens: Tensor
    log_probs: Tensor  # of each candidate under the distribution that it was drawn from, [B, k]
    features: DecoderFeatures | None  # of each candidate, for verifiers; None from decoders without features

    @property
    def repeats(self) -> Tensor:
        """Candidates that equal an earlier one of their row, bool [B, k]."""
        return equal_to_earlier(self.tokens.flatten(2))

    def select(self, rows: Tensor) -> Self:
        """Take rows `rows` [B'], in that order and as often as they occur."""
        return self._map(lambda part: part[rows], self.features and self.features.select(rows))

    def put(self, rows: Tensor, other: Self) -> Self:
        """Put the candidates of `other` in the place of those of some rows."""
        features = self.features and other.features and self.features.put(rows, other.features)
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        changed = {name: part.index_put((rows,), getattr(other, name)) for name, part in tensors.items()}
        return replace(self, **changed, features=features)

    def unfold(self) -> Self:
        """Turn k candidates of B rows into one candidate each of B * k rows."""
        return self._map(lambda part: part.flatten(0, 1)[:, None], self.features and self.features.unfold())

    def _map(self, change: Callable[[Tensor], Tensor], features: DecoderFeatures | None) -> Self:
        tensors = {name: change(part) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **tensors, features=features)


def equal_to_earlier(candidates: Tensor) -> Tensor:
    """Which of k candidates [B, k, S] equal an earlier one of their row, bool [B, k]."""
    return (candidates[:, :, None] == candidates[:, None]).all(-1).tril(-1).any(2)


@dataclass(frozen=True)
class Frames:
    """F moments on the way to an image, to be drawn."""

    title: str
    tokens: Tensor  # the image at each moment, [F, T]
    shown: Tensor | None  # which tokens are decided, bool [F, T]; None: whole images
    captions: list[str]


class Decoder(nn.Module, Keyed):
    """Turns prompts into image tokens."""

    frozen_parts = ("image_tokenizer",)
    image_tokenizer: ImageTokenizer
    feature_layers: tuple[int, ...] = ()  # layers (1 = first) after which hidden states become features for verifiers
    has_likelihood: ClassVar[bool] = False
    candidates_share_pass: ClassVar[bool] = True  # more candidates of a step take no more passes
    sampling_type: ClassVar[type] = object  # of the settings that `begin` takes; any by default

    @property
    def num_tokens(self) -> int:
        return self.image_tokenizer.num_tokens

    def steps(self, sampling: Any) -> int:
        """Return how many steps make an image; by default each decides a token."""
        return self.num_tokens

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if a prompt cannot be read; by default any can."""

    def check_sampling(self, sampling: Any) -> None:
        """Raise ValueError for settings that it cannot draw by; by default any of its `sampling_type` will do."""

    def check_candidates(self, k: int, sampling: Any) -> None:
        """Raise ValueError if k candidates of a step would be equal; by default they are drawn."""

    def check_readable(self) -> None:
        """Raise ValueError if verifiers in token space have nothing to read."""
        if not self.feature_layers:
            raise ValueError(f"verification needs features, and this {type(self).__name__} has no feature_layers")

    @abstractmethod
    def noise(self, seeds: Sequence[int], k: int, sampling: Any) -> Any:
        """Draw the randomness of images with these seeds, for k candidates a step; each image's from its seed alone."""

    @abstractmethod
    def begin(self, request: Request, sampling: Any, k: int = 1) -> DecodingState:
        """Encode each prompt once and return the state before the first step, for up to k candidates a step."""

    @abstractmethod
    def propose(self, state: Any, k: int, distinct: bool = False) -> Proposal:
        """Draw k candidates for the next step of each row from one forward pass, independently or `distinct` ones."""

    @abstractmethod
    def commit(self, state: Any, proposal: Any, choice: Tensor) -> None:
        """Take candidate `choice` [B] of each row into the state, in place."""

    def pixels(self, tokens: Tensor, cost: Cost) -> Tensor:
        """Make images of tokens [B, T] or [B, T, D] for a judge to see, [B, 3, H, W]; they are counted."""
        cost.image_decodes += len(tokens)
        return self.image_tokenizer.decode(tokens)

    def preview(self, state: Any, proposal: Any = None) -> Tensor:
        """Guess the finished images, pixels [B, 3, H, W]; with a proposal, those of its candidates, [B k, 3, H, W]."""
        raise ValueError(f"{type(self).__name__} shows no image before it is finished")

    def frames(self, tokens: Tensor, trajectory: Any, most: int) -> Frames | None:
        """Up to `most` moments on the way to an image [T]; None if there are none."""
        return None

    @property
    def text_bytes(self) -> int:
        """Memory of a text encoder that is no part of the decoder."""
        return 0

    def training_bytes(self, images: int, size: int, weight: int) -> float:
        """Estimate what a training pass over some images keeps for the backward pass.

        A number of what layers compute takes `size` bytes, one of their weights `weight`: more in mixed precision.
        """
        return 0.0

    def decoding_bytes(self, images: int, size: int) -> float:
        """Estimate what decoding some images at a time takes beside the weights, `size` bytes a number."""
        return 0.0

    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """Log-probability of each token of finished images [B, T] given others of them, [B, T]; passes are counted."""
        raise ValueError(f"{type(self).__name__} gives tokens no probability")

    def value_gains(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures, value: Values, patches: int, cost: Cost
    ) -> Tensor:
        """What each token of finished images, or its patch of M x M, adds to their value (a probability), [B, T]."""
        raise ValueError(f"{type(self).__name__} has no values before an image is finished")


class TokenDecoder(HubMixin, Decoder):
    """A decoder of image tokens, which has a likelihood, can be trained, and has features for verifiers.

    Args:
        image_tokenizer: fixes the number of tokens and the codebook. It is frozen.
        depth: layers of the Transformer.
        feature_layers: see `Decoder`.
    """

    has_likelihood = True
    causal: ClassVar[bool]  # tokens are decided from the first to the last, one a step; otherwise whole images
    trajectory_type: ClassVar[type] = Trajectory  # of `DecodingState.trajectory`
    text_tokenizer: TextTokenizer  # of prompts
    transformer: Transformer  # the one that its tokens go through

    def __init__(self, image_tokenizer: ImageTokenizer, depth: int, feature_layers: Sequence[int]) -> None:
        super().__init__()
        if not all(1 <= layer <= depth for layer in feature_layers):
            raise ValueError(f"feature_layers={list(feature_layers)} must lie in 1..{depth}")
        self.image_tokenizer = image_tokenizer.eval().requires_grad_(False)
        self.feature_layers = tuple(feature_layers)

    def cache_key(self) -> dict[str, Any]:
        """Its weights, sizes, text and feature layers; subclasses add what else decides images."""
        return {
            "class": class_name(self),
            "weights": fingerprint(self),
            "transformer": key_of(self.transformer.config),
            "text": self.text_tokenizer.cache_key(),
            "feature_layers": list(self.feature_layers),
        }

    @property
    def dim(self) -> int:
        return self.transformer.config.dim

    @property
    @abstractmethod
    def max_words(self) -> int:
        """Words (text tokens) of the prompt in `DecoderFeatures`, L."""

    def word_spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of a prompt that each of these words covers, start and end."""
        return self.text_tokenizer.spans(prompt)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.text_tokenizer.encode(prompts)

    def cast_bytes(self, size: int, weight: int) -> float:
        """Estimate the copies of linear layers' weights that autocast keeps in training; see `training_bytes`.

        Those of layers that are computed again are kept only if they are trained.
        """
        layers = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        again = self.transformer.config.checkpointing
        cast = sum(each.numel() for each in layers if each.requires_grad or not again)
        return cast * size if weight > size else 0

    @abstractmethod
    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """The loss of pre-training: negative log-likelihood of images [B, T], nats a predicted token."""

    @abstractmethod
    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """log p(image | prompt) of images [B, T], nats, [B]. Differentiable; estimates draw noise from the seeds."""

    def pair_log_probs(
        self, prompts: Sequence[str], chosen: Tensor, rejected: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """`log_probs` of both images of B pairs, [B] each, from one pass; estimates draw alike for both."""
        both = self.log_probs([*prompts, *prompts], torch.cat([chosen, rejected]), [*seeds, *seeds])
        return both[: len(chosen)], both[len(chosen) :]

    @property
    def likelihood_key(self) -> Any:
        """All that decides `log_probs` beside the weights: how they are estimated; None where they are exact."""
        return None

    @abstractmethod
    def policy_log_probs(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        sampling: Any,
        trajectory: Any = None,
        steps: int | None = None,
    ) -> Tensor:
        """Log-probability of the choices by which images [B, T] were decoded, under `sampling`, [B, steps].

        Differentiable; equals `DecodingState.log_probs` but for rounding. A `trajectory` is needed where there is one.
        With `steps` only those of the first so many are computed.
        """

    @abstractmethod
    def features(self, prompts: Sequence[str], tokens: Tensor) -> DecoderFeatures:
        """Features of finished images [B, T], from passes over them; each has as many prompts, which are neighbours."""

    @abstractmethod
    def training_features(
        self, batch: Mapping[str, Any], last_step: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        """Features that verifiers learn from: of all prefixes at once, or of grids at a step each.

        The batch has `prompt`, `tokens` [B, T] and, where stored, `features` and `trajectory`; see `PARMModule`. Of the
        grids a fraction `last_step` is read after the last step, the others after any step, or all of them at a
        `fraction` of the way.
        """
