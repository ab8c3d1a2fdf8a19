"""Log-probabilities of what was chosen, and previews, alike for decoders of both kinds."""

import pytest
import torch

from lightning_modules.backbone.decoder import Request, TokenDecoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.verifier import Reward
from tests.helpers.models import make_decoder, make_masked

KINDS = {
    "next_token": (make_decoder(), Sampling(temperature=0.8, top_k=20, guidance=0.5)),
    "mask_token": (make_masked(), MaskSampling(steps=5, guidance=0.5)),
}


class Darkness(Reward):
    def cache_key(self) -> str:
        return "darkness"

    def __call__(self, prompts, pixels):
        return -pixels.mean((1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_policy_log_probs_are_those_that_decoding_recorded(kind: str, rows: list) -> None:
    decoder: TokenDecoder
    decoder, sampling = KINDS[kind]
    request = Request(rows, range(len(rows)))
    for strategy in (Sample(sampling), Verified(sampling, 3, verifier="darkness")):
        decoded = strategy.decode(decoder, {"darkness": Darkness()}, request)
        found = decoder.policy_log_probs(request.prompts, decoded.tokens, sampling, decoded.trajectory)
        assert decoded.log_probs is not None and (decoded.log_probs < -0.1).any()
        torch.testing.assert_close(found, decoded.log_probs, atol=1e-3, rtol=1e-3)
    first = decoder.policy_log_probs(request.prompts, decoded.tokens, sampling, decoded.trajectory, 3)
    torch.testing.assert_close(first, found[:, :3], atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in decoder.parameters())
    decoder.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_preview_is_the_image(kind: str, rows: list) -> None:
    decoder, sampling = KINDS[kind]
    state = decoder.begin(Request(rows, range(len(rows))), sampling, 2)
    first = torch.zeros(len(rows), dtype=torch.int64)
    while not state.is_done:
        proposal = decoder.propose(state, 2)
        candidates = decoder.preview(state, proposal).unflatten(0, (-1, 2))
        assert candidates.shape == (len(rows), 2, 3, 64, 64)
        decoder.commit(state, proposal, first)
        torch.testing.assert_close(decoder.preview(state), candidates[:, 0])
    assert torch.equal(decoder.preview(state), decoder.image_tokenizer.decode(state.tokens))


def test_what_is_not_decided_yet_is_grey(rows: list) -> None:
    decoder, sampling = KINDS["next_token"]
    state = decoder.begin(Request(rows, range(len(rows))), sampling)
    decoder.commit(state, decoder.propose(state, 1), torch.zeros(len(rows), dtype=torch.int64))
    pixels = decoder.preview(state)
    assert (pixels[:, :, 16:] == 0.5).all() and (pixels[:, :, :16, 16:] == 0.5).all()
    assert (pixels[:, :, :16, :16] != 0.5).any()


@pytest.mark.parametrize("kind", KINDS)
def test_any_reward_verifies_through_previews(kind: str, rows: list) -> None:
    """The darkest of many previews at every step makes a darker image than plain sampling."""
    decoder, sampling = KINDS[kind]
    request, judges = Request(rows, range(len(rows))), {"darkness": Darkness()}
    plain, dark = (
        strategy.decode(decoder, judges, request)
        for strategy in (Sample(sampling), Verified(sampling, 8, verifier="darkness"))
    )
    light = [decoder.image_tokenizer.decode(image.tokens).mean((1, 2, 3)) for image in (plain, dark)]
    assert (light[1] < light[0]).float().mean() > 0.9
    assert dark.cost.verifier_calls == 8 * len(rows) * dark.log_probs.shape[1]
