"""The shared decoder: cached decoding against full passes, and images that depend on their seed alone."""

import pytest
import torch

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.next_token_state import decision_order
from lightning_modules.backbone.sampling import Sampling, guide, image_seed, sampling_log_probs, uniform_noise
from lightning_modules.decoding.sample import Sample
from tests.helpers.asked import asked
from tests.helpers.models import FEATURES, make_decoder

SAMPLING = Sampling(temperature=0.8, guidance=0.5)


def test_log_probs_are_those_of_a_distribution(decoder: CompactDecoder) -> None:
    tokens = torch.randint(0, 32, (32, decoder.num_tokens))
    tokens[:, :3] = tokens[:1, :3]
    tokens[:, 3] = torch.arange(32)
    total = decoder.token_log_probs(["a photo of a star"] * 32, tokens)[:, 3].exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_log_probs_do_not_depend_on_later_tokens(decoder: CompactDecoder) -> None:
    prompts, tokens = ["a photo of a star"], torch.randint(0, 32, (1, decoder.num_tokens))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 32
    before, after = decoder.token_log_probs(prompts, tokens), decoder.token_log_probs(prompts, changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_cached_decoding_draws_the_tokens_of_uncached_decoding(decoder: CompactDecoder, rows: list[dict]) -> None:
    seeds = list(range(len(rows)))
    decoded = Sample(SAMPLING).decode(decoder, {}, Request(rows, seeds))
    noise = uniform_noise(seeds, 1, decoder.num_tokens)[:, 1]
    prompts = [row["prompt"] for row in rows]
    tokens = torch.zeros(len(rows), decoder.num_tokens, dtype=torch.int64)
    for t in range(decoder.num_tokens):
        logits = [decoder.token_logits(prompts, tokens, conditional)[:, t] for conditional in (True, False)]
        cumulative = sampling_log_probs(guide(*logits, SAMPLING.guidance), SAMPLING).exp().cumsum(-1)
        tokens[:, t] = (cumulative < noise[:, t : t + 1] * cumulative[:, -1:]).sum(-1)
    assert torch.equal(decoded.tokens, tokens)
    assert len(decoded.tokens.unique()) > 5


def test_features_collected_while_decoding_equals_that_of_a_full_pass(
    decoder: CompactDecoder, rows: list[dict]
) -> None:
    decoded = Sample(SAMPLING).decode(decoder, {}, Request(rows, list(range(len(rows)))))
    full = decoder.features([row["prompt"] for row in rows], decoded.tokens)
    for name in FEATURES:
        torch.testing.assert_close(getattr(decoded.features, name), getattr(full, name), atol=2e-4, rtol=1e-3)
    log_probs = decoder.token_log_probs([row["prompt"] for row in rows], decoded.tokens)
    torch.testing.assert_close(full.log_probs, log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_redecoding_keeps_what_it_should_and_passes_over_it(
    decoder: CompactDecoder, rows: list[dict], share: float
) -> None:
    tokens, keep = torch.randint(0, 32, (len(rows), 16)), torch.rand(len(rows), 16) < share
    seeds = list(range(len(rows)))
    decoded = Sample(SAMPLING).decode(decoder, {}, Request(rows, seeds, tokens, keep))
    assert torch.equal(decoded.tokens[keep], tokens[keep])
    full = decoder.features([row["prompt"] for row in rows], decoded.tokens)
    for name in FEATURES:
        torch.testing.assert_close(getattr(decoded.features, name), getattr(full, name), atol=2e-4, rtol=1e-3)
    open_tokens = (~keep).sum(1).max().item()
    passes = decoded.cost.decoder_passes / (2 * len(rows))
    assert open_tokens <= passes <= max(open_tokens, 1) + 1
    if share == 0.0:
        assert torch.equal(decoded.tokens, Sample(SAMPLING).decode(decoder, {}, Request(rows, seeds)).tokens)


def test_redecoding_draws_what_uncached_decoding_draws(decoder: CompactDecoder, rows: list[dict]) -> None:
    """Every open token comes from the distribution given all tokens before it, whatever other rows keep."""
    tokens, keep = torch.randint(0, 32, (len(rows), 16)), torch.rand(len(rows), 16) < 0.6
    keep[:, -1] = False
    seeds = list(range(len(rows)))
    decoded = Sample(SAMPLING).decode(decoder, {}, Request(rows, seeds, tokens, keep)).tokens
    noise = uniform_noise(seeds, 1, 16)[:, 1]
    prompts, order = [row["prompt"] for row in rows], decision_order(keep)
    for step in range(order.shape[1]):
        both = [decoder.token_logits(prompts, tokens, conditional) for conditional in (True, False)]
        for row, t in enumerate(order[:, step].tolist()):
            if not keep[row, t]:
                keep[row, t] = True
                guided = guide(*(logits[row, t][None] for logits in both), SAMPLING.guidance)
                cumulative = sampling_log_probs(guided, SAMPLING).exp().cumsum(-1)
                tokens[row, t] = (cumulative < noise[row, step] * cumulative[:, -1:]).sum(-1)
    assert torch.equal(decoded, tokens)


def test_the_order_of_decisions() -> None:
    keep = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert decision_order(keep).tolist() == [[1, 4, 5, 5], [0, 1, 3, 5], [5, 5, 5, 5]]


def test_features_about_images_shared_by_several_prompts(decoder: CompactDecoder) -> None:
    prompts = ["a photo of a star", "a photo of a ring", "a photo of two stars", "a photo of a cross"]
    tokens = torch.randint(0, 32, (2, decoder.num_tokens))
    shared, repeated = decoder.features(prompts, tokens), decoder.features(prompts, tokens.repeat_interleave(2, 0))
    for name in FEATURES:
        torch.testing.assert_close(getattr(shared, name), getattr(repeated, name))


def test_codes_that_look_alike_start_with_like_embeddings() -> None:
    decoder = make_decoder()
    decoder.image_tokenizer.codebook[1] = decoder.image_tokenizer.codebook[0] + 1e-3
    with torch.no_grad():
        decoder.codes.zero_()
        embeddings = decoder.code_table()
    assert torch.dist(embeddings[0], embeddings[1]) < 0.02 * torch.dist(embeddings[0], embeddings[2])


def test_an_image_depends_on_its_seed_and_not_on_its_batch() -> None:
    decoder = make_decoder()
    strategy = Sample(Sampling())
    rows = [{"prompt": "a photo of a star"}, {"prompt": "a photo of two circles"}] * 32
    seeds = [image_seed(7, i) for i in range(64)]
    together = strategy.decode(decoder, {}, Request(rows, seeds)).tokens
    apart = torch.cat(
        [strategy.decode(decoder, {}, Request([r], [s])).tokens for r, s in zip(rows, seeds, strict=True)]
    )
    flipped = (together != apart).any(1).sum().item()
    assert flipped == 0, f"{flipped} of 64 images changed with the batch size"
    assert len(together.unique(dim=0)) == 64


def test_fork_continues_each_path_with_its_own_noise(decoder: CompactDecoder) -> None:
    state = decoder.begin(asked(["a photo of a star", "a photo of a ring"], [3, 4]), SAMPLING, 3)
    expected = decoder.propose(state, 3).tokens
    paths = state.fork(3)
    assert torch.equal(decoder.propose(paths, 1).tokens.view(2, 3, 1), expected)


def test_unknown_words_are_named(decoder: CompactDecoder) -> None:
    with pytest.raises(ValueError, match=r"'a photo of a dog' has words outside the vocabulary: 'dog'"):
        decoder.word_ids(["a photo of a star", "a photo of a dog"])


def test_prompts_that_are_too_long_are_refused(decoder: CompactDecoder) -> None:
    with pytest.raises(ValueError, match="has 13 words, at most 12"):
        decoder.word_ids([" ".join(["a"] * 13)])


def test_verifiers_read_each_word_by_itself_and_in_its_prompt(decoder: CompactDecoder) -> None:
    ids = decoder.word_ids(["a photo of a red star", "a photo of a blue star"])
    read = decoder.prompt_encoder.read(ids, decoder.prompt_encoder(ids))
    alone, within = read.chunk(2, -1)
    star = 5
    torch.testing.assert_close(alone[0, star], alone[1, star])
    assert not torch.allclose(within[0, star], within[1, star], atol=1e-3)
    assert not torch.allclose(alone[0, 4], alone[1, 4], atol=1e-3)  # red, blue
