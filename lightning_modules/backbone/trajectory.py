"""How grids of image tokens were filled, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.backbone.mask_sampling import masked_after


@dataclass(frozen=True)
class Trajectory:
    """How B grids were filled, in S steps."""

    policy_reads: ClassVar[Sequence[str]] = ("previews", "fixed_at", "cuts")  # to find the probabilities of the steps
    verifier_reads: ClassVar[Sequence[str]] = ("previews", "fixed_at")  # to learn from the grids on the way

    previews: Tensor  # the grid after each step, codes [B, S, n]; after the last it is the image
    fixed_at: Tensor  # the step after which a token did not change any more, [B, n]
    # The least confidence, with its noise, of the tokens that each step fixed, [B, S]; None where it is not known.
    cuts: Tensor | None = None

    @staticmethod
    def of(states: Sequence[tuple[Tensor, Tensor]]) -> "Trajectory":
        """Make it from the tokens, and which were unknown, [B, n] each, after each step."""
        previews, unknown = (torch.stack(part, 1) for part in zip(*states, strict=True))
        return Trajectory(previews, unknown.sum(1))

    @staticmethod
    def in_random_order(tokens: Tensor, steps: int, noise: Tensor) -> "Trajectory":
        """Pretend that images [B, n] were decoded in the order of `noise` [B, n]; each preview is the image."""
        unknown = torch.ones_like(tokens, dtype=torch.bool)
        rank = noise.argsort(1).argsort(1)
        states = []
        for step in range(steps):
            unknown = rank < masked_after(step, steps, unknown)[:, None] * (step + 1 < steps)
            states.append((tokens, unknown))
        return Trajectory.of(states)

    def at(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The grids after steps [B], the tokens unknown before, and those undecided after; step S: finished images."""
        rows = torch.arange(len(step), device=step.device)
        shown = self.previews[rows, step.clamp(max=self.previews.shape[1] - 1)]
        return shown, self.fixed_at >= step[:, None], self.fixed_at > step[:, None]

    def select(self, rows: Tensor) -> "Trajectory":
        cuts = None if self.cuts is None else self.cuts[rows]
        return Trajectory(self.previews[rows], self.fixed_at[rows], cuts)

    def put(self, rows: Tensor, other: "Trajectory") -> "Trajectory":
        """Replace the end of some rows, the image and which tokens came last, by that of `other`."""
        last = self.previews.shape[1] - 1
        previews = self.previews.clone()
        previews[rows, last] = other.previews[:, -1]
        fixed_at = last - (other.previews.shape[1] - 1 - other.fixed_at).clamp(max=last)
        return Trajectory(previews, self.fixed_at.index_put((rows,), fixed_at))
