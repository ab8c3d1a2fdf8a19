"""PARM: causality, candidates scored together, cached steps against full passes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.loading import export, pretrained
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.rewards.parm import PARM, InputFeatures
from lightning_modules.rewards.verifier import Likelihood
from tests.helpers.models import make_decoder, make_masked, make_parm


def features_of(decoder: CompactDecoder, tokens: torch.Tensor):
    return decoder.features(["a photo of a red star"] * len(tokens), tokens)


@pytest.fixture
def tokens(decoder: CompactDecoder) -> torch.Tensor:
    return torch.randint(0, 32, (4, decoder.num_tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("input_features", ["hidden", "embeddings"])
def test_the_value_of_a_prefix_does_not_change_when_later_tokens_do(
    decoder: CompactDecoder, tokens: torch.Tensor, input_features: InputFeatures
) -> None:
    parm = make_parm(decoder, input_features)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 5) % 32
    lengths = [1, 9, 10, decoder.num_tokens]
    before = parm.values(features_of(decoder, tokens), lengths)
    after = parm.values(features_of(decoder, changed), lengths)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2:] != after[:, 2:]).all()


def test_walking_beside_the_decoder_gives_the_values_of_the_full_pass(
    decoder: CompactDecoder, rows: list[dict], parm: PARM
) -> None:
    state = decoder.begin(Request(rows, range(len(rows))), Sampling(), 5)
    memory = parm.begin(state.prompt, decoder.num_tokens)
    walked = []
    while not state.is_done:
        proposal = decoder.propose(state, 5)
        values = parm.score(memory, proposal.features)
        choice = torch.full((len(rows),), state.step % 5)
        parm.commit(memory, choice)
        walked.append(values[:, state.step % 5])
        decoder.commit(state, proposal, choice)
    features = decoder.features([row["prompt"] for row in rows], state.tokens)
    full = parm.values(features, range(1, decoder.num_tokens + 1))
    torch.testing.assert_close(torch.stack(walked, 1), full, atol=2e-3, rtol=1e-3)


def test_verifiers_see_the_tokens_that_are_kept(decoder: CompactDecoder, parm: PARM, rows: list[dict]) -> None:
    tokens, keep = torch.randint(0, 32, (len(rows), 16)), torch.rand(len(rows), 16) < 0.7
    for verifier in (parm, Likelihood()):
        state = decoder.begin(Request(rows, range(len(rows)), tokens, keep), Sampling(), 5)
        memory = verifier.begin(state.prompt, decoder.num_tokens)
        walked, lengths = [], state.order + 1
        while not state.is_done:
            proposal = decoder.propose(state, 5)
            values = verifier.value(memory, rows, state, proposal, lambda: torch.empty(0))
            choice = torch.full((len(rows),), state.step % 5)
            verifier.commit(memory, choice)
            walked.append(values[:, state.step % 5])
            decoder.commit(state, proposal, choice)
        full = verifier.values(state.features, range(1, decoder.num_tokens + 1)).gather(1, lengths - 1)
        torch.testing.assert_close(torch.stack(walked, 1), full, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("input_features", ["hidden", "embeddings"])
def test_candidates_scored_together_equal_candidates_scored_apart(
    decoder: CompactDecoder, rows: list[dict], input_features: InputFeatures
) -> None:
    parm = make_parm(decoder, input_features)
    state = decoder.begin(Request(rows, range(len(rows))), Sampling(), 8)
    memory = parm.begin(state.prompt, decoder.num_tokens)
    for _ in range(5):
        proposal = decoder.propose(state, 1)
        parm.score(memory, proposal.features)
        parm.commit(memory, torch.zeros(len(rows), dtype=torch.int64))
        decoder.commit(state, proposal, torch.zeros(len(rows), dtype=torch.int64))
    proposal = decoder.propose(state, 8)
    together = parm.score(memory, proposal.features)
    everyone = torch.arange(len(rows))
    apart = [parm.score(memory.select(everyone), proposal.features.pick(torch.full((len(rows),), j))) for j in range(8)]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-5, rtol=1e-5)
    assert together.std() > 1e-3


def test_values_are_log_probabilities(decoder: CompactDecoder, parm: PARM, tokens: torch.Tensor) -> None:
    values = parm.values(features_of(decoder, tokens), [1, 16])
    assert (values < 0).all()
    logits, clauses, matches = parm(features_of(decoder, tokens))
    torch.testing.assert_close(values, logits[:, [0, 15]].sigmoid().log())
    assert clauses.shape == (4, 16, 6)
    assert matches.shape == (4, 16, 12)


@pytest.mark.parametrize("make", [make_decoder, make_masked])
def test_what_the_decoder_thinks_given_the_prompt_counts_only_in_trusted_rows(make, tokens: torch.Tensor) -> None:
    decoder = make()
    parm = make_parm(decoder)
    features = features_of(decoder, tokens)
    other = replace(features, hidden=features.hidden + 1, log_probs=features.log_probs - 1)
    trusted = torch.tensor([True, False, True, False])
    mixed, changed = (parm(e, trusted)[0] for e in (features, other))
    torch.testing.assert_close(mixed[trusted], parm(features)[0][trusted])
    torch.testing.assert_close(mixed[~trusted], changed[~trusted])
    assert (mixed[trusted] != changed[trusted]).all()


def test_the_compact_head_is_the_method_s(decoder: CompactDecoder) -> None:
    from lightning_modules.backbone.transformer import TransformerConfig

    compact = PARM(TransformerConfig(512, 6, 8), 4, decoder.dim, decoder.feature_layers, "hidden", True)
    assert [tuple(layer.weight.shape) for layer in (compact.head[0], compact.head[2])] == [
        (256, 512),
        (1, 256),
    ]
    assert len(compact.transformer.blocks) == 6


def test_parm_of_grids_begins_with_parm_of_prefixes(decoder: CompactDecoder, tmp_path: Path) -> None:
    causal, grids = make_parm(decoder), make_parm(make_masked())
    for weight in causal.parameters():
        torch.nn.init.normal_(weight)
    export(causal, tmp_path, {}, torch.float32)
    started = dict(pretrained(grids, start=str(tmp_path)).named_parameters())
    assert set(started) == {*dict(causal.named_parameters()), "undecided"}
    assert all(torch.equal(started[key], weight) for key, weight in causal.named_parameters())
    with pytest.raises(ValueError, match=r"parm.start=.* has no tensor 'rows' of shape \[2, 1, 32\]"):
        pretrained(make_parm(make_decoder(grid=2)), start=str(tmp_path))


def test_unknown_features_are_refused(decoder: CompactDecoder) -> None:
    with pytest.raises(ValueError, match=r"parm.input_features must be 'hidden' or 'embeddings', not 'pixels'"):
        make_parm(decoder, "pixels")  # type: ignore[arg-type]
