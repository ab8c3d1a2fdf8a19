"""How images are denoised: levels of noise, stochastic steps between them, and the noise, which belongs to the image.

A latent is x = alpha x_0 + sigma noise, where x_0 is the finished image. Flow matching has alpha = 1 - t and sigma = t
at time t, diffusion alpha² + sigma² = 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from lightning_modules.backbone.sampling import image_seed, refuse_below

Solver = Literal["euler", "sde", "renoise", "ddim"]


@dataclass(frozen=True)
class DenoisingSampling:
    """How a latent is denoised.

    With `eta` 0 all solvers are `euler`, which is deterministic. Otherwise a step adds noise and takes as much off:

    - `sde`: the step of Flow-GRPO (arXiv 2505.05470, equation 9), flows only; `eta` is its noise level a.
    - `renoise`: `eta` is the fraction of new noise in what is left of it (arXiv 2010.02502, equation 12, with a fixed
      fraction). It adds the same in few steps and in many, so that in many steps images lose variance.
    - `ddim`: the standard deviation is `eta` times that of DDPM (arXiv 2010.02502, equation 16), at most 1.
    """

    steps: int  # forward passes
    guidance: float = 0.0  # scale s of classifier-free guidance, (1 + s) conditional - s unconditional
    solver: Solver = "euler"
    eta: float = 0.0  # how much noise a step adds
    start: float = 1.0  # level sigma at which images that are decoded again in part begin; 1 is pure noise

    def __post_init__(self) -> None:
        refuse_below(1, steps=self.steps)
        refuse_below(0, guidance=self.guidance, eta=self.eta)
        if self.solver not in get_args(Solver):
            raise ValueError(f"sampling.solver must be one of {', '.join(get_args(Solver))}, not {self.solver!r}")
        if self.solver in ("renoise", "ddim") and self.eta > 1:
            raise ValueError(f"sampling.eta must be at most 1 with solver {self.solver!r}, not {self.eta}")
        if self.solver == "euler" and self.eta:
            raise ValueError(f"sampling.eta={self.eta} has no effect with solver 'euler', which adds no noise")
        if not 0 < self.start <= 1:
            raise ValueError(f"sampling.start must lie in (0, 1], not {self.start}")


@dataclass(frozen=True)
class FlowSampling(DenoisingSampling):
    """How a latent is denoised by a flow, at times t from 1 (or `start`) to 0."""

    shift: float = 1.0  # t = shift u / (1 + (shift - 1) u), u evenly spaced: above 1 more steps are at high noise
    temperature: float = (
        1.0  # of the probabilities of codes that the network gives; below 1 it is surer than it should be
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shift", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"sampling.{name} must be above 0, not {getattr(self, name)}")

    @property
    def times(self) -> list[float]:
        """Times before each step and after the last, [steps + 1]."""
        first = self.start / (self.shift - (self.shift - 1) * self.start)
        even = [first * (1 - i / self.steps) for i in range(self.steps + 1)]
        return [self.shift * u / (1 + (self.shift - 1) * u) for u in even]


@dataclass(frozen=True)
class Levels:
    """The levels of noise before each of S steps and after the last, which is the finished image (sigma 0)."""

    times: Sequence[float]  # as the network reads them, S + 1
    alphas: Sequence[float]  # S + 1
    sigmas: Sequence[float]  # S + 1
    is_flow: bool = False  # alpha = 1 - t, sigma = t

    @staticmethod
    def of_flow(times: Sequence[float]) -> "Levels":
        return Levels(times, [1 - t for t in times], times, is_flow=True)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """The latent after so many steps of an image and its noise."""
        return self.alphas[step] * clean + self.sigmas[step] * noise

    def stochastic(self, step: int, sampling: DenoisingSampling) -> tuple[float, float]:
        """What a step differs in from the deterministic one: a factor of the noise estimate, which is added, and the
        standard deviation of new noise. Both are 0 in the last step and at `eta` 0.
        """
        alpha, sigma, after = self.alphas[step], self.sigmas[step], self.sigmas[step + 1]
        if not after or not sampling.eta:
            return 0.0, 0.0
        if sampling.solver == "sde":
            rate = sampling.eta**2 * sigma / (1 - (after if sigma == 1 else sigma))
            return -rate / (2 * sigma) * (sigma - after), math.sqrt(rate * (sigma - after))
        std = sampling.eta * after
        if sampling.solver == "ddim":
            std *= math.sqrt(max(0.0, 1 - (alpha * after / (self.alphas[step + 1] * sigma)) ** 2))
        return math.sqrt(after**2 - std**2) - after, std


@dataclass(frozen=True)
class GaussianNoise:
    """Noise of B images: each row comes from the seed of its image alone. It is drawn when it is asked for."""

    seeds: Tensor  # int64 [B], on the CPU
    first: Tensor  # number of the row's first candidate, [B], on the CPU
    initial: Tensor  # what its latent begins with, [B, T, D]
    choice: Tensor  # uniform noise for choosing among candidates at each step, [B, steps]

    @staticmethod
    def draw(seeds: Sequence[int], steps: int, shape: tuple[int, int]) -> "GaussianNoise":
        """The noise of images with these seeds."""
        generator, initial, choice = torch.Generator(), [], []
        for seed in seeds:
            generator.manual_seed(seed)
            initial.append(torch.randn(shape, generator=generator))
            choice.append(torch.rand(steps, generator=generator))
        first = torch.zeros(len(seeds), dtype=torch.int64)
        return GaussianNoise(torch.tensor(seeds), first, torch.stack(initial), torch.stack(choice))

    def candidates(self, step: int, k: int) -> Tensor:
        """Standard normal noise [B, k, T, D] of k candidates of a step."""
        generator, rows = torch.Generator(), []
        for seed, first in zip(self.seeds.tolist(), self.first.tolist(), strict=True):
            for candidate in range(first, first + k):
                generator.manual_seed(image_seed(seed, step, candidate, 1))  # three parts are other images' seeds
                rows.append(torch.randn(self.initial.shape[1:], generator=generator))
        return torch.stack(rows).unflatten(0, (-1, k)).to(self.initial.device)

    def __getitem__(self, rows: Tensor) -> Self:
        here = rows.cpu()
        seeds, first = self.seeds[here], self.first[here]
        return replace(self, seeds=seeds, first=first, initial=self.initial[rows], choice=self.choice[rows])

    def fork(self, k: int) -> Self:
        """The noise of k paths a row, neighbours; path j has that of candidate j."""
        own = self[torch.arange(len(self.seeds)).repeat_interleave(k).to(self.initial.device)]
        return replace(own, first=own.first + torch.arange(k).repeat(len(self.seeds)))

    def candidate(self, number: int) -> Self:
        """The noise of one candidate of each row, as that of its first."""
        return replace(self, first=self.first + number)

    def to(self, device: torch.device) -> Self:
        return replace(self, initial=self.initial.to(device), choice=self.choice.to(device))
