"""Denoising on its way: latents, what a pass says of them, and candidates for the next latent."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import DecodingState, Proposal
from lightning_modules.backbone.denoising_sampling import DenoisingSampling, GaussianNoise, Levels
from lightning_modules.backbone.features import DecoderFeatures


class Condition(Protocol):
    """What passes read of B prompts, encoded once; with guidance also that of the prompts' unconditional twins."""

    prompt: Tensor  # features of the prompts for verifiers, [B, L, 2 dim]; [B, 0, 0] from decoders without features

    def select(self, rows: Tensor) -> Self:
        """Take rows `rows` [B'], in that order and as often as they occur."""


@dataclass(frozen=True)
class Prediction:
    """What a forward pass says of R latents; a latent is alpha `clean` + sigma `noise`."""

    clean: Tensor  # the best guess at the finished images (preview), [R, T, D]
    noise: Tensor  # [R, T, D]
    features: DecoderFeatures | None = None  # for verifiers, of one candidate each

    @staticmethod
    def of_velocity(latents: Tensor, velocity: Tensor, time: float) -> "Prediction":
        """Of flow matching, at a time: the velocity is noise - clean."""
        return Prediction(latents - time * velocity, latents + (1 - time) * velocity)

    @staticmethod
    def of_noise(latents: Tensor, noise: Tensor, alpha: float, sigma: float) -> "Prediction":
        """Of diffusion whose network predicts the noise, at a level."""
        return Prediction((latents - sigma * noise) / alpha, noise)


@dataclass(frozen=True)
class LatentTrajectory:
    """How B images were denoised, in S steps."""

    policy_reads: ClassVar[Sequence[str]] = ("latents",)
    verifier_reads: ClassVar[Sequence[str]] = ("times",)  # they learn from finished images, to which noise is added

    latents: Tensor  # before each step, and the finished image, [B, S + 1, T, D]
    previews: Tensor | None = None  # the best guess before each step, half precision [B, S, T, D]
    times: Tensor | None = None  # before each step and after the last, [B, S + 1]

    def select(self, rows: Tensor) -> "LatentTrajectory":
        previews, times = (part if part is None else part[rows] for part in (self.previews, self.times))
        return LatentTrajectory(self.latents[rows], previews, times)

    def put(self, rows: Tensor, other: "LatentTrajectory") -> "LatentTrajectory":
        """Replace the end of some rows, the image and the last guess, by that of `other`."""
        latents, previews = self.latents.clone(), self.previews
        latents[rows, -1] = other.latents[:, -1]
        if previews is not None and other.previews is not None:
            previews = previews.clone()
            previews[rows, -1] = other.previews[:, -1]
        return LatentTrajectory(latents, previews, self.times)


@dataclass(frozen=True)
class DenoisingProposal(Proposal):
    """k candidates for the next latents of B images, and what a pass says of each: `tokens` are previews [B, k, T, D].

    The pass of the candidate that is taken is that of its next step. The last step needs none: it adds no noise, so
    that its candidates are equal, and finished.
    """

    latents: Tensor  # [B, k, T, D]
    noise_estimate: Tensor  # [B, k, T, D]
    std: Tensor  # of the noise by which candidates differ, [B, k], all the same

    @property
    def repeats(self) -> Tensor:
        first = torch.arange(self.tokens.shape[1], device=self.tokens.device) == 0
        return (self.std == 0) & ~first


@dataclass
class DenoisingState(DecodingState):
    """B images that are denoised side by side; see `DecodingState`. `tokens` [B, T, D] are previews."""

    noise: GaussianNoise
    latents: Tensor  # at the level of this step, [B, T, D]
    noise_estimate: Tensor | None  # by the pass at these latents, [B, T, D]; None: no pass has been made
    given: Tensor | None  # images that are decoded again in part, [B, T, D]
    fixed: Tensor | None  # which of their tokens stay, bool [B, T]
    sampling: DenoisingSampling
    levels: Levels
    condition: Condition
    passed: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # latents and previews before each step so far

    starts_alike = False

    @property
    def steps(self) -> int:
        return self.levels.steps

    @property
    def trajectory(self) -> LatentTrajectory | None:
        if not self.passed:
            return None
        latents, previews = ([*parts] for parts in zip(*self.passed, strict=True))
        times = torch.tensor(self.levels.times, device=self.latents.device).expand(len(self.latents), -1)
        return LatentTrajectory(torch.stack([*latents, self.latents], 1), torch.stack(previews, 1), times)

    def begin(self) -> Self:
        """Put the latents at the level of the first step, with the noise that images begin with."""
        given = torch.zeros_like(self.noise.initial) if self.given is None else self.given
        return replace(self, latents=self.levels.noised(given, self.noise.initial, 0), noise_estimate=None)

    def held(self, latents: Tensor, step: int) -> Tensor:
        """Put tokens that stay into latents [B, ..., T, D], at the level after so many steps."""
        if self.fixed is None or self.given is None:
            return latents
        shape = len(latents), *[1] * (latents.ndim - 3), *latents.shape[-2:]
        kept = self.levels.noised(self.given, self.noise.initial, step).view(shape)
        return torch.where(self.fixed.view(*shape[:-1], 1), kept, latents)

    def select(self, rows: Tensor) -> Self:
        estimate, given, fixed = (
            part if part is None else part[rows] for part in (self.noise_estimate, self.given, self.fixed)
        )
        return replace(
            super().select(rows),
            latents=self.latents[rows],
            noise_estimate=estimate,
            given=given,
            fixed=fixed,
            condition=self.condition.select(rows),
            passed=[(latents[rows], previews[rows]) for latents, previews in self.passed],
        )

    def as_candidate(self, number: int) -> Self:
        return replace(self, noise=self.noise.candidate(number))

    def with_noise(self, noise: GaussianNoise) -> Self:
        """Continue the same images with other noise; before the first step that makes other images."""
        moved = super().with_noise(noise)
        return moved if self.step else moved.begin()


def normal_log_probs(value: Tensor, mean: Tensor, std: float, open_: Tensor | None) -> Tensor:
    """Log-density of values [..., T, D], summed over their elements in single precision, [...]; 0 where std is 0.

    With `open_`, bool [..., T], over those of open tokens alone.
    """
    if not std:
        return torch.zeros(value.shape[:-2], device=value.device)
    z = (value.float() - mean.float()) / std
    each = -0.5 * z.square() - torch.log(torch.tensor(std * (2 * torch.pi) ** 0.5, device=z.device))
    return (each if open_ is None else each * open_[..., None]).sum((-2, -1))
