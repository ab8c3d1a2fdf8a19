"""Denoising on a mixture of Gaussians whose exact velocity is known: steps, noise, densities, what stays."""

from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from torch.distributions import Normal

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.denoising_sampling import DenoisingSampling, FlowSampling
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded
from tests.helpers.mixture import MIXTURE, MixtureDiffusion, MixtureFlow

FLOW, DIFFUSION, PICTURES = MixtureFlow(), MixtureDiffusion(), MixtureFlow(grid=2)
ROW = {"prompt": "anything"}


def sampled(decoder: MixtureFlow, sampling: Any, n: int) -> Decoded:
    return Sample(sampling).decode(decoder, {}, Request([ROW] * n, range(n)))


def chance(numbers: Tensor) -> float:
    """P value that numbers are draws from the mixture (Kolmogorov-Smirnov)."""
    return float(kstest(numbers.flatten().numpy(), lambda x: MIXTURE.cdf(torch.tensor(x)).numpy()).pvalue)


@pytest.mark.parametrize(
    ("solver", "eta"),
    [("euler", 0), ("sde", 0.4), ("sde", 0.7), ("sde", 1), ("renoise", 0.1), ("renoise", 0.25), ("ddim", 1)],
)
def test_stochastic_steps_of_a_flow_keep_its_distribution(solver: Any, eta: float) -> None:
    assert chance(sampled(FLOW, FlowSampling(40, solver=solver, eta=eta), 1000).tokens) > 1e-3


@pytest.mark.parametrize(("solver", "eta"), [("euler", 0), ("ddim", 0.5), ("ddim", 1), ("renoise", 0.2)])
def test_stochastic_steps_of_diffusion_keep_its_distribution(solver: Any, eta: float) -> None:
    assert chance(sampled(DIFFUSION, DenoisingSampling(40, solver=solver, eta=eta), 1000).tokens) > 1e-3


def test_too_much_new_noise_a_step_loses_variance() -> None:
    images = sampled(FLOW, FlowSampling(30, solver="renoise", eta=1.0), 2000).tokens
    assert chance(images) < 1e-6 and images.std() < 0.98 * MIXTURE.stddev


@pytest.mark.parametrize("solver", ["sde", "renoise", "ddim"])
def test_without_noise_every_solver_is_the_deterministic_one(solver: Any) -> None:
    expected = sampled(FLOW, FlowSampling(7), 50)
    made = sampled(FLOW, FlowSampling(7, solver=solver), 50)
    assert torch.equal(made.tokens, expected.tokens) and torch.equal(
        made.trajectory.latents, expected.trajectory.latents
    )
    assert not made.log_probs.any()


def test_a_deterministic_step_follows_the_velocity() -> None:
    path = sampled(FLOW, FlowSampling(8, shift=3.0), 5).trajectory
    times = FlowSampling(8, shift=3.0).times
    assert times[0] == 1 and times[-1] == 0 and times[4] == pytest.approx(0.75)
    for i in range(8):
        velocity = (path.latents[:, i] - path.previews[:, i]) / times[i]
        expected = path.latents[:, i] + (times[i + 1] - times[i]) * velocity
        assert torch.allclose(path.latents[:, i + 1], expected, atol=2e-3)  # previews are stored in half precision


@pytest.mark.parametrize(("solver", "eta"), [("sde", 0.7), ("renoise", 0.5), ("ddim", 0.8)])
def test_log_probs_are_those_of_the_steps_that_were_drawn(solver: Any, eta: float) -> None:
    sampling = FlowSampling(6, solver=solver, eta=eta)
    made = sampled(PICTURES, sampling, 9)
    assert made.log_probs is not None
    found = PICTURES.policy_log_probs(["anything"] * 9, made.tokens, sampling, made.trajectory)
    assert torch.allclose(made.log_probs, found, atol=1e-4)
    assert made.log_probs[:, :-1].all() and not made.log_probs[:, -1].any()
    if solver == "renoise":  # t' (noise estimate sqrt(1 - eta²) + eta z)
        before, clean, after = sampling.times[0], made.trajectory.previews[:, 0].float(), sampling.times[1]
        noise = (made.trajectory.latents[:, 0] - (1 - before) * clean) / before
        mean = (1 - after) * clean + after * 0.75**0.5 * noise
        expected = Normal(mean, 0.5 * after).log_prob(made.trajectory.latents[:, 1]).sum((1, 2))
        assert torch.allclose(made.log_probs[:, 0], expected, atol=0.01)


def test_a_pass_is_made_once() -> None:
    sampling = FlowSampling(5, solver="sde", eta=0.7)
    state = FLOW.begin(Request([ROW] * 3, range(3)), sampling, 4)
    first = FLOW.propose(state, 4)
    assert state.cost.decoder_passes == 3 + 3 * 4  # at the noise, and at each candidate
    assert torch.equal(FLOW.propose(state, 2).latents, first.latents[:, :2]) and state.cost.decoder_passes == 15 + 6
    FLOW.commit(state, first, torch.tensor([1, 0, 3]))
    assert torch.equal(state.tokens[0], first.tokens[0, 1])
    FLOW.propose(state, 1)
    assert state.cost.decoder_passes == 21 + 3
    assert sampled(FLOW, sampling, 3).cost.decoder_passes == 3 * 5


def test_the_candidates_of_the_last_step_are_one_finished_image() -> None:
    state = FLOW.begin(Request([ROW] * 2, range(2)), FlowSampling(2, solver="sde", eta=0.7), 3)
    FLOW.commit(state, FLOW.propose(state, 3), torch.tensor([0, 2]))
    passes, last = state.cost.decoder_passes, FLOW.propose(state, 3)
    assert last.repeats.tolist() == [[False, True, True]] * 2 and state.cost.decoder_passes == passes
    assert torch.equal(last.tokens, state.tokens[:, None].expand(-1, 3, -1, -1))


def test_tokens_that_stay_are_held_and_the_others_fit_a_lower_start() -> None:
    old = torch.tensor([[[3.0], [-2.0], [1.0], [0.5]]]).expand(200, -1, -1)
    fixed = torch.tensor([True, False, False, True]).expand(200, -1)
    for sampling in (FlowSampling(6), FlowSampling(6, solver="sde", eta=0.7, start=0.3)):
        request = Request([ROW] * 200, range(200), old, fixed)
        made = Sample(sampling).decode(PICTURES, {}, request)
        assert torch.equal(made.tokens[:, [0, 3]], old[:, [0, 3]])
        assert made.trajectory.latents[:, 1, 0].std() > 0.05  # noised like the others on the way
        moved = (made.tokens[:, 1] - old[:, 1]).abs().mean()
        assert moved > 1.5 if sampling.start == 1 else 0.1 < moved < 1
        assert made.log_probs is not None and bool(made.log_probs[:, 0].any()) == bool(sampling.eta)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solver": "heun"}, "sampling.solver must be one of euler, sde, renoise, ddim, not 'heun'"),
        ({"eta": 0.1}, "sampling.eta=0.1 has no effect with solver 'euler'"),
        ({"solver": "ddim", "eta": 1.1}, "sampling.eta must be at most 1 with solver 'ddim', not 1.1"),
        ({"start": 0}, r"sampling.start must lie in \(0, 1\], not 0"),
        ({"shift": 0}, "sampling.shift must be above 0, not 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FlowSampling(4, **settings)


def test_what_a_decoder_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.eta=0 adds no noise, so all 2 candidates"):
        FLOW.begin(Request([ROW], [0]), FlowSampling(4), 2)
    with pytest.raises(ValueError, match=r"sampling\.start=0.5 begins with an image, and there is none"):
        FLOW.begin(Request([ROW], [0]), FlowSampling(4, start=0.5))
    with pytest.raises(ValueError, match=r"sampling\.solver: 'sde' is for flows"):
        sampled(DIFFUSION, DenoisingSampling(4, solver="sde", eta=0.7), 1)
