"""Features of image tokens from their decoder: all that a verifier in token space reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

STATISTICS = ("log_probs", "unconditional_log_probs", "entropy")  # numbers about each token
_SHARED = ("hidden", "unconditional_hidden", "entropy")  # one for all candidates
_OWN = ("embeddings", "log_probs", "unconditional_log_probs", "undecided")  # of each candidate
_OF_TOKENS = (*_SHARED, *_OWN)


@dataclass(frozen=True)
class DecoderFeatures:
    """Features of S tokens of each row: those of an image, or of k candidates, one after the other.

    Candidates have S / k tokens each: one for the next position (next-token decoders), or a whole grid (mask-token
    decoders, denoising). They share the pass that they were drawn from, so its hidden states and entropy are there
    once. In denoising each candidate has had a pass of its own (`passes` is k), and has its own.
    """

    prompt: Tensor  # its words, by themselves and in the prompt, [B, L, 2 dim]
    embeddings: Tensor  # of the tokens, [B, S, dim]
    hidden: Tensor  # hidden states, at a few depths, of the position that predicts the token, [B, S / k, F]
    unconditional_hidden: Tensor  # the same without the prompt: the image by itself, as the decoder sees it
    log_probs: Tensor  # log p(token | prompt, tokens decided before), [B, S], at temperature 1, without guidance
    unconditional_log_probs: Tensor  # the same without the prompt, [B, S]
    entropy: Tensor  # of the distribution that the log-probability is taken from, nats, [B, S / k]
    undecided: Tensor | None = None  # tokens that will be drawn again, bool [B, S]; None where there are no previews
    passes: int = 1  # that its candidates come from, of each row

    @property
    def candidates(self) -> int:
        return self.passes * (self.log_probs.shape[1] // self.hidden.shape[1])

    @property
    def _own(self) -> Sequence[str]:
        """What each candidate has of its own."""
        return _OWN if self.passes == 1 else _OF_TOKENS

    @property
    def _shared(self) -> Sequence[str]:
        return ("prompt", *_SHARED) if self.passes == 1 else ("prompt",)

    @property
    def own_entropy(self) -> Tensor:
        """The entropy beside each candidate's tokens, [B, S]."""
        return self.entropy.repeat(1, self.candidates // self.passes)

    @property
    def statistics(self) -> Tensor:
        """The `STATISTICS` of each token, stacked, [3, B, S]; for one candidate (k = 1)."""
        return torch.stack([getattr(self, name) for name in STATISTICS])

    def _present(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _map(self, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> "DecoderFeatures":
        changed: dict[str, Any] = {name: change(value) for name, value in self._present(names).items()}
        return replace(self, **changed)

    def pick(self, choice: Tensor) -> "DecoderFeatures":
        """The features of candidate `choice` [B] of each row."""
        k, rows = self.candidates, torch.arange(len(choice), device=choice.device)
        picked = self._map(self._own, lambda value: value.unflatten(1, (k, -1))[rows, choice])
        return replace(picked, passes=1)

    def unfold(self) -> "DecoderFeatures":
        """Turn features of k candidates of B rows into features of one candidate each of B * k rows."""
        k = self.candidates
        shared = self._map(self._shared, lambda value: value.repeat_interleave(k, 0))
        own = shared._map(self._own, lambda value: value.unflatten(1, (k, -1)).flatten(0, 1))
        return replace(own, passes=1)

    def fold(self, k: int) -> "DecoderFeatures":
        """Turn features of one candidate each of B * k rows, from a pass each, into those of k candidates of B rows."""
        shared = self._map(("prompt",), lambda value: value[::k])
        folded = shared._map(_OF_TOKENS, lambda value: value.unflatten(0, (-1, k)).flatten(1, 2))
        return replace(folded, passes=k)

    def select(self, rows: Tensor) -> "DecoderFeatures":
        return self._map(("prompt", *_OF_TOKENS), lambda value: value[rows])

    def put(self, rows: Tensor, other: "DecoderFeatures") -> "DecoderFeatures":
        """Put the features of `other` in the place of some rows."""
        own = self._present(("prompt", *_OF_TOKENS))
        put: dict[str, Any] = {name: value.index_put((rows,), getattr(other, name)) for name, value in own.items()}
        return DecoderFeatures(**put)

    def at(self, positions: Tensor) -> "DecoderFeatures":
        """The features of the tokens at some positions [B, S] of an image."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        return self._map(_OF_TOKENS, lambda value: value[rows, positions])

    @staticmethod
    def empty(prompt: Tensor, length: int, dim: int, hidden_dim: int) -> "DecoderFeatures":
        """Room for features of `length` tokens of each row; numbers about tokens are in single precision."""
        embeddings, hidden, unconditional = (
            prompt.new_zeros(len(prompt), length, width) for width in (dim, hidden_dim, hidden_dim)
        )
        statistics = prompt.new_zeros(len(STATISTICS), len(prompt), length, dtype=torch.float32)
        return DecoderFeatures(prompt, embeddings, hidden, unconditional, *(each.clone() for each in statistics))

    def write(self, rows: Tensor, positions: Tensor, other: "DecoderFeatures", columns: Tensor) -> None:
        """Copy the features of token (rows[i], columns[i]) of `other` to (rows[i], positions[i]), in place."""
        for name, value in self._present(_OF_TOKENS).items():
            value[rows, positions] = getattr(other, name)[rows, columns]
