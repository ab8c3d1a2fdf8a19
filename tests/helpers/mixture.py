"""Denoising whose every value is known: numbers of a mixture of two Gaussians, and judges that know their future."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from lightning_modules.backbone.decoder import Cost, DecodingState, Proposal
from lightning_modules.backbone.denoising import DenoisingDecoder
from lightning_modules.backbone.denoising_sampling import DenoisingSampling, FlowSampling, Levels
from lightning_modules.backbone.denoising_state import DenoisingProposal, DenoisingState, Prediction
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.rewards.verifier import Nothing, StepJudge, Verifier

WEIGHTS, MEANS, STDS = torch.tensor([0.3, 0.7]), torch.tensor([-2.0, 1.0]), torch.tensor([0.4, 0.6])
MIXTURE = MixtureSameFamily(Categorical(WEIGHTS), Normal(MEANS, STDS))


class Numbers(ImageTokenizer):
    """A token is a number, shown as the grey level of a pixel: .5 + x / 10."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = self.image_size = grid

    def encode(self, pixels: Tensor) -> Tensor:
        return (pixels[:, 0].flatten(1)[..., None] - 0.5) * 10

    def decode(self, tokens: Tensor) -> Tensor:
        return (0.5 + tokens / 10).view(-1, 1, self.grid, self.grid).expand(-1, 3, -1, -1)


@dataclass
class NoPrompt:
    prompt: Tensor

    def select(self, rows: Tensor) -> "NoPrompt":
        return NoPrompt(self.prompt[rows])


def posterior(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and standard deviations of the two Gaussians of x_0, [..., 2], given x = alpha x_0 + sigma noise.

    The latents x are [...].
    """
    x = x[..., None]
    variance = alpha**2 * STDS**2 + sigma**2
    log_w = WEIGHTS.log() + Normal(alpha * MEANS, variance.sqrt()).log_prob(x)
    means = MEANS + alpha * STDS**2 / variance * (x - alpha * MEANS)
    return log_w.softmax(-1), means, (STDS * sigma / variance.sqrt()).expand_as(means)


class MixtureFlow(DenoisingDecoder):
    """Draws grid x grid independent numbers of the mixture, by their exact velocity."""

    sampling_type: ClassVar[type] = FlowSampling

    def __init__(self, grid: int = 1) -> None:
        super().__init__()
        self.image_tokenizer = Numbers(grid)

    def cache_key(self) -> Any:
        return "mixture"

    def latent_shape(self, sampling: DenoisingSampling) -> tuple[int, int]:
        return self.num_tokens, 1

    def levels(self, sampling: Any) -> Levels:
        return Levels.of_flow(sampling.times)

    def encode(self, prompts: Sequence[str], sampling: DenoisingSampling) -> NoPrompt:
        return NoPrompt(torch.zeros(len(prompts), 0, 0))

    def predict(
        self, latents: Tensor, levels: Levels, step: int, condition: Any, sampling: Any, cost: Cost
    ) -> Prediction:
        cost.count_pass(len(latents), self.num_tokens)
        weights, means, _ = posterior(latents, levels.alphas[step], levels.sigmas[step])
        clean = (weights * means).sum(-1)
        t = levels.times[step]
        return Prediction.of_velocity(latents, (latents - clean) / t, t)


class MixtureDiffusion(MixtureFlow):
    """The same by diffusion, alpha² + sigma² = 1, and the exact prediction of the noise."""

    sampling_type = DenoisingSampling

    def levels(self, sampling: DenoisingSampling) -> Levels:
        angles = [0.5 * math.pi * min(1 - i / sampling.steps, 0.999) for i in range(sampling.steps + 1)]
        return Levels(angles, [math.cos(a) for a in angles], [math.sin(a) for a in angles])

    def predict(
        self, latents: Tensor, levels: Levels, step: int, condition: Any, sampling: Any, cost: Cost
    ) -> Prediction:
        cost.count_pass(len(latents), self.num_tokens)
        alpha, sigma = levels.alphas[step], levels.sigmas[step]
        weights, means, _ = posterior(latents, alpha, sigma)
        return Prediction.of_noise(latents, (latents - alpha * (weights * means).sum(-1)) / sigma, alpha, sigma)


class Above(Verifier[Nothing]):
    """log E exp(reward), exactly. The reward is 0 if the first number is above a threshold, else -`scale`."""

    def __init__(self, threshold: float, scale: float) -> None:
        self.threshold, self.scale = threshold, scale

    def cache_key(self) -> Any:
        return "above", self.threshold, self.scale

    def expected(self, probability: Tensor) -> Tensor:
        """log E exp(reward) where the number will be above with a probability."""
        return (probability + (1 - probability) * math.exp(-self.scale)).log()

    def value(
        self,
        memory: Nothing,
        rows: Sequence[Mapping[str, Any]],
        state: DecodingState,
        proposal: Proposal,
        previews: Callable[[], Tensor],
    ) -> Tensor:
        assert isinstance(proposal, DenoisingProposal)
        assert isinstance(state, DenoisingState)
        x, levels, step = proposal.latents[..., 0, 0], state.levels, state.step + 1
        if step == state.steps:
            return self.expected((x > self.threshold).float())
        weights, means, stds = posterior(x, levels.alphas[step], levels.sigmas[step])
        return self.expected((weights * (1 - Normal(means, stds).cdf(torch.tensor(self.threshold)))).sum(-1))

    def of_finished(
        self, rows: Sequence[Mapping[str, Any]], features: DecoderFeatures | None, pixels: Callable[[], Tensor]
    ) -> Tensor:
        return self.expected((pixels()[:, 0, 0, 0] > 0.5 + self.threshold / 10).float())


class Near(StepJudge):
    """Likes images whose first number is near some number; finds all of them clear."""

    def __init__(self, target: float) -> None:
        self.target = target

    def cache_key(self) -> Any:
        return "near", self.target

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return -((pixels[:, 0, 0, 0] - 0.5) * 10 - self.target).abs()

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        distance = -self([], pixels)
        return torch.ones_like(distance), (-distance).exp()
