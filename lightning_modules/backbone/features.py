"""What a decoder knows about image tokens: all that a verifier in token space reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

STATISTICS = ("log_probs", "unconditional_log_probs", "entropy")  # numbers about each token
_SHARED = ("hidden", "unconditional_hidden", "entropy")  # one for all candidates
_OWN = ("embeddings", "log_probs", "unconditional_log_probs", "undecided")  # of each candidate


@dataclass(frozen=True)
class DecoderFeatures:
    """What the decoder knows about S tokens of each row: those of an image, or of k candidates, one after the other.

    Candidates have S / k tokens each: one for the next position (next-token decoders), or a whole grid (mask-token
    decoders). They share the pass that they were drawn from, hence the hidden states and `entropy`, which are there
    once, for S / k tokens.

    Attributes:
        prompt: its words, by themselves and in the prompt, [B, L, 2 dim].
        embeddings: embeddings of the tokens, [B, S, dim].
        hidden: hidden states, at a few depths side by side, of the position that predicts the token, [B, S / k, F].
        unconditional_hidden: the same without the prompt: what the decoder sees in the image itself, [B, S / k, F].
        log_probs: log p(token | prompt, what was decided before), [B, S], at temperature 1, without guidance.
        unconditional_log_probs: the same without the prompt, [B, S].
        entropy: of the distribution the log-probability is taken from, nats, [B, S / k].
        undecided: tokens that are a preview, drawn but not kept, bool [B, S]; None where there are no previews.
    """

    prompt: Tensor
    embeddings: Tensor
    hidden: Tensor
    unconditional_hidden: Tensor
    log_probs: Tensor
    unconditional_log_probs: Tensor
    entropy: Tensor
    undecided: Tensor | None = None

    @property
    def candidates(self) -> int:
        """k."""
        return self.log_probs.shape[1] // self.hidden.shape[1]

    def _present(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def pick(self, choice: Tensor) -> "DecoderFeatures":
        """The features about candidate `choice` [B] of each row."""
        rows = torch.arange(len(choice), device=choice.device)
        own = self._present(_OWN)
        return replace(
            self, **{name: value.unflatten(1, (self.candidates, -1))[rows, choice] for name, value in own.items()}
        )

    def unfold(self) -> "DecoderFeatures":
        """Features of k candidates of B rows as features about one candidate each of B * k rows."""
        k = self.candidates
        own = {name: value.unflatten(1, (k, -1)).flatten(0, 1) for name, value in self._present(_OWN).items()}
        shared = self._present(("prompt", *_SHARED))
        return replace(self, **own, **{name: value.repeat_interleave(k, 0) for name, value in shared.items()})

    def select(self, rows: Tensor) -> "DecoderFeatures":
        """Keep some rows."""
        return DecoderFeatures(
            **{name: value[rows] for name, value in self._present(("prompt", *_SHARED, *_OWN)).items()}
        )

    def put(self, rows: Tensor, other: "DecoderFeatures") -> "DecoderFeatures":
        """With the features of `other` in the place of that about some rows."""
        own = self._present(("prompt", *_SHARED, *_OWN))
        return DecoderFeatures(**{name: value.index_put((rows,), getattr(other, name)) for name, value in own.items()})

    def at(self, positions: Tensor) -> "DecoderFeatures":
        """The features about the tokens at some positions [B, S] of an image."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        return replace(self, **{name: value[rows, positions] for name, value in self._about_tokens().items()})

    @staticmethod
    def empty(prompt: Tensor, length: int, dim: int, hidden_dim: int) -> "DecoderFeatures":
        """Room for features about `length` tokens of each row."""
        token = prompt.new_zeros(len(prompt), length)
        hidden = token[..., None].expand(-1, -1, hidden_dim)
        widths = token[..., None].expand(-1, -1, dim), hidden, hidden, token, token, token
        return DecoderFeatures(prompt, *(value.clone() for value in widths))

    def write(self, rows: Tensor, positions: Tensor, other: "DecoderFeatures", columns: Tensor) -> None:
        """Put what `other` says of its tokens (rows[i], columns[i]) at (rows[i], positions[i]), in place."""
        for name, value in self._about_tokens().items():
            value[rows, positions] = getattr(other, name)[rows, columns]

    def _about_tokens(self) -> dict[str, Tensor]:
        return self._present((*_SHARED, *_OWN))
