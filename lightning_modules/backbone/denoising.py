"""Denoising as decoding: a step takes noise off the whole image (diffusion, flow matching).

A pass at the latents of a step says what the finished image may be (preview) and what is noise in them. From this k
candidates for the next latents follow, by a stochastic step. To preview a candidate takes a pass of its own, which is
that of its next step if it is taken. So plain sampling takes a pass a step, and k candidates a step take k.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Decoder, Frames, Request
from lightning_modules.backbone.denoising_sampling import DenoisingSampling, GaussianNoise, Levels
from lightning_modules.backbone.denoising_state import (
    Condition,
    DenoisingProposal,
    DenoisingState,
    LatentTrajectory,
    Prediction,
    normal_log_probs,
)


class DenoisingDecoder(Decoder):
    """Prompts in, images out, all tokens at once in some steps. Tokens are vectors, latents have their shape."""

    sampling_type = DenoisingSampling
    candidates_share_pass = False

    def steps(self, sampling: DenoisingSampling) -> int:
        return sampling.steps

    @abstractmethod
    def latent_shape(self, sampling: Any) -> tuple[int, int]:
        """Tokens of an image and numbers of each, T and D."""

    @abstractmethod
    def levels(self, sampling: Any) -> Levels:
        """The levels of noise of the steps."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], sampling: Any) -> Condition:
        """Encode B prompts for all passes; with guidance also what they are guided away from."""

    @abstractmethod
    def predict(
        self, latents: Tensor, levels: Levels, step: int, condition: Any, sampling: Any, cost: Cost
    ) -> Prediction:
        """A guided forward pass at latents [R, T, D] of a step, which is counted. Differentiable."""

    def check_sampling(self, sampling: DenoisingSampling) -> None:
        if sampling.solver == "sde" and not self.levels(sampling).is_flow:
            raise ValueError("sampling.solver: 'sde' is for flows; diffusion takes 'ddim' or 'renoise'")

    def check_candidates(self, k: int, sampling: DenoisingSampling) -> None:
        if k > 1 and not sampling.eta:
            raise ValueError(f"sampling.eta=0 adds no noise, so all {k} candidates of a step would be equal")

    def noise(self, seeds: Sequence[int], k: int, sampling: Any) -> GaussianNoise:
        return GaussianNoise.draw(seeds, sampling.steps, self.latent_shape(sampling))

    @torch.no_grad()
    def begin(self, request: Request, sampling: Any, k: int = 1) -> DenoisingState:
        """Encode each prompt once; no other pass is made. Images that are given begin at level `sampling.start`."""
        self.check_sampling(sampling)
        self.check_candidates(k, sampling)
        if sampling.start < 1 and request.tokens is None:
            raise ValueError(f"sampling.start={sampling.start} begins with an image, and there is none; 1 begins anew")
        condition, noise = self.encode(request.prompts, sampling), self.noise(request.seeds, k, sampling)
        device = condition.prompt.device
        noise = noise.to(device)
        given, fixed = (part if part is None else part.to(device) for part in (request.tokens, request.fixed_mask))
        return DenoisingState(
            tokens=torch.zeros_like(noise.initial),
            step=0,
            noise=noise,
            prompt=condition.prompt,
            features=None,
            log_probs=torch.zeros(len(request.rows), sampling.steps, device=device),
            cost=Cost(),
            latents=noise.initial,
            noise_estimate=None,
            given=given,
            fixed=fixed,
            sampling=sampling,
            levels=self.levels(sampling),
            condition=condition,
        ).begin()

    @torch.no_grad()
    def propose(self, state: DenoisingState, k: int, distinct: bool = False) -> DenoisingProposal:
        """k candidates, and a pass at each unless they are finished; draws of a density are `distinct` anyway."""
        self.check_candidates(k, state.sampling)
        if state.noise_estimate is None:
            found = self.predict(state.latents, state.levels, state.step, state.condition, state.sampling, state.cost)
            state.tokens, state.noise_estimate, state.features = found.clean, found.noise, found.features
        step, known = state.step + 1, Prediction(state.tokens, state.noise_estimate, state.features)
        mean, std = next_latents(known, state.levels, state.step, state.sampling)
        drawn = mean[:, None].repeat(1, k, 1, 1)
        if std:
            drawn = drawn + std * state.noise.candidates(state.step, k)
        log_probs = normal_log_probs(drawn, mean[:, None], std, None if state.fixed is None else ~state.fixed[:, None])
        drawn = state.held(drawn, step)
        rows = torch.arange(len(drawn), device=drawn.device).repeat_interleave(k)
        if step == state.steps:  # what the last pass said of images is now said of finished ones
            features = known.features and known.features.select(rows)
            found = Prediction(drawn.flatten(0, 1), torch.zeros_like(drawn.flatten(0, 1)), features)
        else:
            condition = state.condition.select(rows)
            found = self.predict(drawn.flatten(0, 1), state.levels, step, condition, state.sampling, state.cost)
        shape = drawn.shape[:2]
        return DenoisingProposal(
            tokens=state.held(found.clean.unflatten(0, shape), state.steps),
            log_probs=log_probs,
            features=found.features and found.features.fold(k),
            latents=drawn,
            noise_estimate=found.noise.unflatten(0, shape),
            std=torch.full(shape, std, device=drawn.device),
        )

    @torch.no_grad()
    def commit(self, state: DenoisingState, proposal: DenoisingProposal, choice: Tensor) -> None:
        """Take candidate `choice` [B] of each row, with the pass that was made at it."""
        rows = torch.arange(len(choice), device=choice.device)
        state.passed = [*state.passed, (state.latents, state.tokens.half())]
        state.tokens, state.latents = proposal.tokens[rows, choice], proposal.latents[rows, choice]
        state.noise_estimate = proposal.noise_estimate[rows, choice]
        state.features = proposal.features and proposal.features.pick(choice)
        state.log_probs[:, state.step] = proposal.log_probs[rows, choice]
        state.step += 1

    def policy_log_probs(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        sampling: Any,
        trajectory: LatentTrajectory | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Log-density of the steps by which images were denoised, summed over their elements; see `TokenDecoder`."""
        assert trajectory is not None
        condition, levels, latents = self.encode(prompts, sampling), self.levels(sampling), trajectory.latents
        every = []
        for step in range(levels.steps)[:steps]:
            if not levels.stochastic(step, sampling)[1]:
                every.append(torch.zeros(len(tokens), device=tokens.device))
                continue
            found = self.predict(latents[:, step], levels, step, condition, sampling, Cost())
            mean, std = next_latents(found, levels, step, sampling)
            every.append(normal_log_probs(latents[:, step + 1], mean, std, None))
        return torch.stack(every, 1)

    def preview(self, state: DenoisingState, proposal: DenoisingProposal | None = None) -> Tensor:
        """The best guesses of the passes that have been made; see `Decoder`. No further pass is made."""
        return self.pixels(state.tokens if proposal is None else proposal.tokens.flatten(0, 1), state.cost)

    def frames(self, tokens: Tensor, trajectory: Any, most: int) -> Frames | None:
        if trajectory is None:
            return None
        previews = trajectory.previews[0]
        steps = sorted({len(previews) * (i + 1) // most - 1 for i in range(most)} - {-1})
        return Frames("previews", previews[steps].to(tokens.dtype), None, [f"step {i + 1}" for i in steps])


def next_latents(known: Prediction, levels: Levels, step: int, sampling: DenoisingSampling) -> tuple[Tensor, float]:
    """Mean [R, T, D] and standard deviation of the latents after a step, from a pass at those before it."""
    shift, std = levels.stochastic(step, sampling)
    return levels.noised(known.clean, known.noise, step + 1) + shift * known.noise, std
