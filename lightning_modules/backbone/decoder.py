"""What every decoder offers: prompts in, image tokens out, one step at a time."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_modules.backbone.evidence import Evidence
from lightning_modules.backbone.hub import Shared
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.identity import Keyed


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
        """A forward pass of some rows, each with as many image tokens."""
        self.decoder_passes += rows
        self.tokens += rows * tokens

    def add(self, other: "Cost") -> None:
        """Count what something else took as well."""
        self.decoder_passes += other.decoder_passes
        self.verifier_calls += other.verifier_calls
        self.tokens += other.tokens


class Decoder(nn.Module, Keyed):
    """A step decides one token (next-token decoders) or a set of them (mask-token decoders).

    States have `tokens` [B, T], `step`, `steps` (in all), `done`, `finished` [B], `noise`, `choice_noise` [B], `cost`,
    `evidence`, `select(rows)` and `fork(k)`; proposals have `tokens` [B, k, ...], `sampling_log_probs` [B, k],
    `repeats` [B, k], `evidence`, `select(rows)` and `unfold()`.
    """

    frozen_parts = ("image_tokenizer",)
    image_tokenizer: ImageTokenizer

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, T."""
        return self.image_tokenizer.num_tokens

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if a prompt cannot be read."""

    @abstractmethod
    def noise(self, seeds: Sequence[int], k: int, sampling: Any) -> Any:
        """The randomness of images with these seeds, for k candidates a step; each image's is its own seed's alone."""

    @abstractmethod
    def begin(
        self,
        prompts: Sequence[str],
        noise: Any,
        sampling: Any,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Any:
        """The state before the first step; prompts are encoded once.

        Args:
            prompts: B prompts.
            noise: of the images.
            sampling: how candidates are drawn.
            tokens, keep: images [B, T] and which of their tokens stay as they are, bool [B, T]; default: none.
        """

    @abstractmethod
    def propose(self, state: Any, k: int, distinct: bool = False) -> Any:
        """k candidates for the next step of each row, all from one forward pass; independent or `distinct` draws."""

    @abstractmethod
    def commit(self, state: Any, proposal: Any, choice: Tensor) -> None:
        """Candidate `choice` [B] of each row becomes part of the state."""


class TokenDecoder(Shared, Decoder):
    """A decoder of image tokens, which has a likelihood and can be trained.

    Attributes:
        evidence_depths: the layers after which verifiers look at it; without any, those in token space cannot read it.
    """

    evidence_depths: tuple[int, ...] = ()

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of the embeddings."""

    @property
    @abstractmethod
    def max_words(self) -> int:
        """Words (text tokens) of the prompt in `Evidence`, L."""

    @abstractmethod
    def word_spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of a prompt that each of these words covers, start and end."""

    @abstractmethod
    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """What pre-training minimises: negative log-likelihood of images [B, T], nats a predicted token."""

    @abstractmethod
    def pair_log_probs(
        self, prompts: Sequence[str], chosen: Tensor, rejected: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """log p(image | prompt), nats, of both images [B, T] of B pairs, [B] each. Differentiable.

        Decoders that can only estimate it draw what they need from each pair's seed: equal seeds, equal estimates.
        """

    @abstractmethod
    def evidence(self, prompts: Sequence[str], tokens: Tensor) -> Evidence:
        """What the decoder knows of finished images [B, T]; each stands for as many prompts, which are neighbours."""
