"""Temperature, top-k, top-p, guidance, and drawing from pre-drawn noise."""

import pytest
import torch

from lightning_modules.backbone.sampling import Sampling, draw, guide, image_seed, sampling_log_probs, uniform_noise


def logits(*probs: float) -> torch.Tensor:
    return torch.tensor([probs]).log()


def test_top_k_keeps_the_most_likely() -> None:
    p = sampling_log_probs(logits(0.5, 0.3, 0.2), Sampling(top_k=2)).exp()
    torch.testing.assert_close(p, torch.tensor([[0.625, 0.375, 0.0]]))


def test_top_p_keeps_the_nucleus() -> None:
    p = sampling_log_probs(logits(0.2, 0.5, 0.3), Sampling(top_p=0.7)).exp()
    torch.testing.assert_close(p, torch.tensor([[0.0, 0.625, 0.375]]))


def test_guidance_extrapolates_from_unconditional_to_conditional() -> None:
    p = guide(logits(0.6, 0.4), logits(0.4, 0.6), 1.0).softmax(-1)
    expected = torch.tensor([[0.6**2 / 0.4, 0.4**2 / 0.6]])
    torch.testing.assert_close(p, expected / expected.sum())


def test_temperature_sharpens() -> None:
    p = sampling_log_probs(logits(0.8, 0.2), Sampling(temperature=0.5)).exp()
    torch.testing.assert_close(p, torch.tensor([[0.64, 0.04]]) / 0.68)


def test_draws_follow_the_distribution() -> None:
    noise = torch.linspace(0, 1, 10001)[:-1][None]
    tokens, log_p = draw(logits(0.5, 0.0, 0.3, 0.2), Sampling(), noise, distinct=False)
    share = tokens[0].bincount(minlength=4) / 10000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=2e-4, rtol=0)
    torch.testing.assert_close(log_p.exp()[0, 0], torch.tensor(0.5))


def test_distinct_draws_do_not_repeat_until_nothing_is_left() -> None:
    noise = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    wide = logits(0.5, 0.0, 0.3, 0.2).expand(200, -1)
    tokens, _ = draw(wide, Sampling(), noise, distinct=True)
    for row in tokens.tolist():
        assert len(set(row[:3])) == 3
        assert 1 not in row
        assert row[3] == row[2]


def test_noise_belongs_to_the_seed_and_more_candidates_only_add_to_it() -> None:
    few, many = uniform_noise([5, 6], 1, 4), uniform_noise([6], 9, 4)
    assert torch.equal(few[1], many[0, :2])


def test_seeds_differ_in_every_part() -> None:
    seeds = {image_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert image_seed(1, 2, 3) == image_seed(1, 2, 3) < 2**63


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": 0.0}, "sampling.temperature must be above 0, not 0.0"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"guidance": -0.5}, "sampling.guidance"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**wrong)
