"""Strategies: what they reduce to in the simplest case, what they choose, what they cost."""

import pytest
import torch

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling, image_seed
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles, effective_sample_size, redraw
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.pruning import Pruning
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Likelihood, Reward
from tests.helpers.models import make_decoder, make_masked
from tests.helpers.toy import ToyDecoder

SAMPLING = Sampling(guidance=0.5)
SEEDS = [image_seed(1, i) for i in range(12)]


class Darkness(Reward):
    """Likes dark images."""

    def cache_key(self):
        return type(self).__name__

    def __call__(self, prompts, pixels):
        return -pixels.mean((1, 2, 3))


@pytest.fixture
def judges(parm: PARM) -> dict:
    return {"parm": parm, "likelihood": Likelihood(), "darkness": Darkness()}


@pytest.mark.parametrize("stride", [1, 3, 16])
def test_one_candidate_is_plain_sampling(decoder: CompactDecoder, rows: list, judges: dict, stride: int) -> None:
    plain = Sample(SAMPLING).decode(decoder, judges, Request(rows, SEEDS))
    verified = Verified(SAMPLING, k=1, stride=stride).decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(verified.tokens, plain.tokens)
    torch.testing.assert_close(verified.features.log_probs, plain.features.log_probs, atol=1e-4, rtol=1e-4)


def test_a_stride_of_the_whole_image_is_best_of_k(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    verified = Verified(SAMPLING, k=4, stride=16, verifier="likelihood").decode(decoder, judges, Request(rows, SEEDS))
    lanes = [Verified(SAMPLING, k=4, stride=16, verifier="likelihood", value_weight=w) for w in (1.0, -1.0)]
    best, worst = (lane.decode(decoder, judges, Request(rows, SEEDS)).features.log_probs.sum(1) for lane in lanes)
    torch.testing.assert_close(verified.features.log_probs.sum(1), best)
    assert (best > worst).all()


def test_greedy_likelihood_takes_the_likeliest_of_the_candidates(
    decoder: CompactDecoder, rows: list, judges: dict
) -> None:
    wide = Verified(SAMPLING, k=32, distinct=True, verifier="likelihood").decode(decoder, judges, Request(rows, SEEDS))
    top = decoder.token_logits([row["prompt"] for row in rows], wide.tokens).argmax(-1)
    assert torch.equal(wide.tokens, top)  # all 32 codes are candidates, so the greedy image comes out


def test_best_of_n_contains_the_plain_sample_and_takes_the_best(
    decoder: CompactDecoder, rows: list, judges: dict
) -> None:
    plain = Sample(SAMPLING)
    one = BestOfN(plain, 1, "darkness").decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(one.tokens, plain.decode(decoder, judges, Request(rows, SEEDS)).tokens)
    five = BestOfN(plain, 5, "darkness").decode(decoder, judges, Request(rows, SEEDS))
    candidates = [
        plain.decode(decoder, judges, Request(rows, [s if j == 0 else image_seed(s, j) for s in SEEDS])).tokens
        for j in range(5)
    ]
    pixels = [decoder.image_tokenizer.decode(tokens).mean((1, 2, 3)) for tokens in candidates]
    torch.testing.assert_close(
        decoder.image_tokenizer.decode(five.tokens).mean((1, 2, 3)), torch.stack(pixels).min(0).values
    )


@pytest.mark.parametrize("n", [1, 4])
def test_particles_that_are_never_redrawn_are_best_of_n(
    decoder: CompactDecoder, rows: list, judges: dict, n: int
) -> None:
    best = BestOfN(Sample(SAMPLING), n, "parm").decode(decoder, judges, Request(rows, SEEDS))
    particles = Particles(SAMPLING, n, stride=16).decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(particles.tokens, best.tokens)
    torch.testing.assert_close(particles.features.log_probs, best.features.log_probs, atol=1e-4, rtol=1e-4)


def test_redrawn_particles_stay_prefixes_the_decoder_drew(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    """The features that travels with the paths is that of the tokens they ended with."""
    decoded = Particles(SAMPLING, 4, stride=2, value_weight=5.0).decode(decoder, judges, Request(rows, SEEDS))
    full = decoder.features([row["prompt"] for row in rows], decoded.tokens)
    torch.testing.assert_close(decoded.features.log_probs, full.log_probs, atol=2e-4, rtol=1e-3)


def test_the_effective_sample_size_is_noted(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(effective_sample_size(weights.log()), torch.tensor([4.0, 1.0, 2.0]))
    noted = [
        Particles(SAMPLING, 4, stride=4, value_weight=weight).decode(decoder, judges, Request(rows, SEEDS)).stats
        for weight in (0.0, 1.0)
    ]
    even, uneven = (note["effective_sample_size"] for note in noted)
    torch.testing.assert_close(even, torch.full((len(rows),), 4.0))
    assert ((uneven >= 1) & (uneven < 4)).all()


def test_redrawing_follows_the_weights() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert redraw(weights.log(), torch.tensor([0.3, 0.9])).tolist() == [[0, 0, 1, 2], [2, 2, 2, 2]]
    shares = torch.stack([redraw(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([u]))[0] for u in torch.rand(2000)])
    assert (shares == 0).float().mean().item() == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("n", [1, 3])
def test_pruning_nothing_is_best_of_n(decoder: CompactDecoder, rows: list, judges: dict, n: int) -> None:
    best = BestOfN(Sample(SAMPLING), n, "parm").decode(decoder, judges, Request(rows, SEEDS))
    kept = Pruning(SAMPLING, n, share=0.0, stride=5).decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(kept.tokens, best.tokens)


def test_pruned_paths_cost_nothing_more(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    """With share 1 one path is left after the first look, the best until then."""
    pruned = Pruning(SAMPLING, 4, share=1.0, stride=4).decode(decoder, judges, Request(rows, SEEDS))
    assert pruned.cost.decoder_passes == 2 * len(rows) * (1 + 4 * 4 + 11)
    assert pruned.cost.verifier_calls == len(rows) * (4 + 3)
    paths = [
        Sample(SAMPLING).decode(decoder, judges, Request(rows, [s if j == 0 else image_seed(s, j) for s in SEEDS]))
        for j in range(4)
    ]
    values = torch.stack([judges["parm"].values(path.features, [4])[:, 0] for path in paths])
    expected = torch.stack([path.tokens for path in paths])[values.argmax(0), torch.arange(len(rows))]
    assert torch.equal(pruned.tokens, expected)


def test_one_beam_is_verified_decoding(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    beam = Beam(SAMPLING, n=1, k=4).decode(decoder, judges, Request(rows, SEEDS))
    verified = Verified(SAMPLING, k=4).decode(decoder, judges, Request(rows, SEEDS))
    assert torch.equal(beam.tokens, verified.tokens)
    for choice, other in zip(beam.trace, verified.trace, strict=True):
        torch.testing.assert_close(choice.scores, other.scores)


def test_the_widest_beam_finds_the_best_of_all_images(judges: dict) -> None:
    """Two codes and two tokens left to decide: with every candidate on the beam nothing is missed."""
    small = make_decoder(grid=2, depth=2)
    prompts, tokens = [{"prompt": "a photo of a star"}] * 3, torch.randint(0, 32, (3, 4))
    keep = torch.tensor([True, True, False, False]).expand(3, -1)
    wide = Beam(Sampling(top_k=2), n=4, k=16, verifier="likelihood")
    found = wide.decode(small, judges, Request(prompts, [0, 1, 2], tokens, keep))
    texts = [row["prompt"] for row in prompts]
    top = small.token_logits(texts, tokens)[:, 2].topk(2)
    best = torch.full((3,), -torch.inf)
    for second in top.indices.unbind(1):
        grid = tokens.clone()
        grid[:, 2] = second
        grid[:, 3] = small.token_logits(texts, grid)[:, 3].argmax(-1)
        best = torch.maximum(best, small.token_log_probs(texts, grid).sum(1))
    torch.testing.assert_close(found.features.log_probs.sum(1), best)


@pytest.mark.parametrize(
    "strategy",
    [
        Verified(SAMPLING, k=3),
        Verified(SAMPLING, k=3, distinct=True, choose="sample", prior_weight=1.0),
        Verified(SAMPLING, k=3, stride=4),
        Verified(SAMPLING, k=3, random_stop=True),
        BestOfN(Verified(SAMPLING, k=3, choose="sample"), 2, "parm"),
        Particles(SAMPLING, n=3, stride=4),
        Beam(SAMPLING, n=2, k=3),
        Pruning(SAMPLING, n=3, share=0.9, stride=4),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_images_do_not_depend_on_the_batch(decoder: CompactDecoder, rows: list, judges: dict, strategy) -> None:
    together = strategy.decode(decoder, judges, Request(rows, SEEDS)).tokens
    apart = [strategy.decode(decoder, judges, Request([r], [s])).tokens for r, s in zip(rows, SEEDS, strict=True)]
    flipped = (together != torch.cat(apart)).any(1).sum().item()
    assert flipped == 0, f"{flipped} of {len(rows)} images changed with the batch size"


@pytest.mark.parametrize(
    "strategy",
    [
        Verified(SAMPLING, k=3),
        Verified(SAMPLING, k=3, stride=4),
        BestOfN(Verified(SAMPLING, k=3, choose="sample"), 2, "parm"),
        Particles(SAMPLING, n=3, stride=4),
        Beam(SAMPLING, n=2, k=3),
        Pruning(SAMPLING, n=3, share=0.9, stride=4),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_kept_tokens_are_never_changed(decoder: CompactDecoder, rows: list, judges: dict, strategy) -> None:
    tokens, keep = torch.randint(0, 32, (len(rows), 16)), torch.rand(len(rows), 16) < torch.rand(len(rows), 1)
    decoded = strategy.decode(decoder, judges, Request(rows, SEEDS, tokens, keep))
    assert torch.equal(decoded.tokens[keep], tokens[keep])
    assert (decoded.tokens[~keep] != tokens[~keep]).any()
    full = decoder.features([row["prompt"] for row in rows], decoded.tokens)
    torch.testing.assert_close(decoded.features.log_probs, full.log_probs, atol=2e-4, rtol=1e-3)


def test_value_weighted_sampling_prefers_valuable_candidates(decoder: CompactDecoder, judges: dict) -> None:
    """The choice follows softmax(value_weight * value + prior_weight * log p)."""
    values = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(2000, -1)
    log_probs = torch.tensor([[0.2, 0.2, 0.6]]).log().expand(2000, -1)
    noise = torch.linspace(0, 1, 2001)[:-1]
    drawn = Verified(SAMPLING, k=3, choose="sample", value_weight=2.0, prior_weight=1.0)._choose(
        values, log_probs, noise
    )
    weights = torch.tensor([0.25 * 0.2, 0.0625 * 0.2, 0.0625 * 0.6])
    torch.testing.assert_close(drawn.bincount() / 2000, weights / weights.sum(), atol=2e-3, rtol=0)
    best = Verified(SAMPLING, k=3)._choose(values, log_probs, noise)
    assert (best == 0).all()


def test_random_stop_verifies_a_prefix_only(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    literal = Verified(SAMPLING, k=8).decode(decoder, judges, Request(rows, SEEDS))
    stopped = Verified(SAMPLING, k=8, random_stop=True).decode(decoder, judges, Request(rows, SEEDS))
    for i, stop in enumerate(stopped.first_unverified.tolist()):
        assert torch.equal(stopped.tokens[i, :stop], literal.tokens[i, :stop])
    assert len(set(stopped.first_unverified.tolist())) > 4
    assert (stopped.tokens != literal.tokens).any()


def test_cost_counts_passes_and_values(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    steps, batch = decoder.num_tokens, len(rows)
    plain = Sample(SAMPLING).decode(decoder, judges, Request(rows, SEEDS)).cost
    assert plain.tokens == 2 * (steps - 1) * batch  # the last token is not read
    assert (plain.decoder_passes, plain.verifier_calls) == (2 * steps * batch, 0)
    token = Verified(SAMPLING, k=8).decode(decoder, judges, Request(rows, SEEDS)).cost
    assert (token.decoder_passes, token.verifier_calls) == (2 * steps * batch, 8 * steps * batch)
    block = Verified(SAMPLING, k=4, stride=4).decode(decoder, judges, Request(rows, SEEDS)).cost
    assert block.verifier_calls == 4 * batch * steps // 4
    best = BestOfN(Sample(SAMPLING), 3, "parm").decode(decoder, judges, Request(rows, SEEDS)).cost
    assert (best.decoder_passes, best.verifier_calls) == (3 * plain.decoder_passes, 3 * batch)
    seen = BestOfN(Sample(SAMPLING), 3, "darkness").decode(decoder, {"darkness": Darkness()}, Request(rows, SEEDS))
    assert (best.image_decodes, seen.cost.image_decodes) == (0, 3 * batch)  # PARM reads tokens
    # Particles encode the prompt once for all paths; redraws cost values, not passes.
    paths = Particles(SAMPLING, 3, stride=4).decode(decoder, judges, Request(rows, SEEDS)).cost
    assert (paths.decoder_passes, paths.verifier_calls) == (2 * batch * (3 * steps - 2), 3 * batch * steps // 4)


def test_unknown_judges_are_named(decoder: CompactDecoder, rows: list, judges: dict) -> None:
    with pytest.raises(ValueError, match="judge 'light' does not exist here; there are: parm, likelihood, darkness"):
        Verified(SAMPLING, k=2, verifier="light").decode(decoder, judges, Request(rows, SEEDS))
    with pytest.raises(ValueError, match="judge 'clip' does not exist here; there are: parm, likelihood, darkness"):
        BestOfN(Sample(SAMPLING), 2, "clip").decode(decoder, judges, Request(rows, SEEDS))


@pytest.mark.parametrize(
    "make",
    [
        Sample,
        lambda sampling: Verified(sampling, k=2),
        lambda sampling: Potential(sampling, 2, "judge"),
        lambda sampling: Beam(sampling, 2, 2),
    ],
)
def test_a_sampling_of_another_kind_of_decoder_is_refused(decoder: CompactDecoder, make) -> None:
    make(SAMPLING).check_decoder(decoder)
    make(MaskSampling()).check_decoder(make_masked())
    make("anything").check_decoder(ToyDecoder())  # which takes any
    with pytest.raises(ValueError, match=r"^sampling is a MaskSampling, and a CompactDecoder takes a Sampling$"):
        make(MaskSampling()).check_decoder(decoder)
    with pytest.raises(ValueError, match=r"^sampling is a Sampling, and a MaskTokenDecoder takes a MaskSampling$"):
        make(SAMPLING).check_decoder(make_masked())


@pytest.mark.parametrize("kind", [lambda *a: Verified(a[0], 2, a[1]), lambda *a: Particles(a[0], 2, a[1]),
                                  lambda *a: Pruning(a[0], 2, 0.5, a[1])])  # fmt: skip
def test_a_stride_beyond_the_image_is_refused(decoder: CompactDecoder, kind) -> None:
    masked, steps = MaskSampling(), decoder.num_tokens
    kind(SAMPLING, steps).check_decoder(decoder)
    kind(masked, masked.steps).check_decoder(make_masked())
    with pytest.raises(ValueError, match=f"^stride={steps + 1} is more than the {steps} steps of an image$"):
        kind(SAMPLING, steps + 1).check_decoder(decoder)
    with pytest.raises(ValueError, match=f"is more than the {masked.steps} steps of an image$"):
        kind(masked, masked.steps + 1).check_decoder(make_masked())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Verified(SAMPLING, k=0), "k of at least 1, not 0"),
        (lambda: Verified(SAMPLING, k=2, stride=0), "stride of at least 1, not 0"),
        (lambda: Verified(SAMPLING, k=2, choose="worst"), "choose must be"),  # type: ignore[arg-type]
        (lambda: Verified(SAMPLING, k=2, stride=2, random_stop=True), "random_stop needs stride 1, not 2"),
        (lambda: BestOfN(Sample(SAMPLING), 0, "parm"), "n of at least 1, not 0"),
        (lambda: Particles(SAMPLING, 0), "n of at least 1, not 0"),
        (lambda: Beam(SAMPLING, 0, 4), "n of at least 1, not 0"),
        (lambda: Pruning(SAMPLING, 4, 0.5, stride=0), "stride of at least 1, not 0"),
        (lambda: Pruning(SAMPLING, 4, 1.5), "share from 0 to 1, not 1.5"),
        (lambda: Particles(SAMPLING, 4, stride=0), "stride of at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
