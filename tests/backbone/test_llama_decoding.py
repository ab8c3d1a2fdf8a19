"""Decoding with rotary embeddings and shared prefixes: against full passes, single images, and single paths."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.next_token_state import NextTokenState, decision_order
from lightning_modules.backbone.sampling import Sampling, guide, sampling_log_probs, uniform_noise
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.sample import Sample
from tests.helpers.llama import TinyLlama, make_llama
from tests.helpers.models import FEATURES

PROMPTS = ["a photo of a star", "a photo of two red stars", "a ring", "a photo of a star"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
SEEDS = [3, 4, 5, 6]
GUIDED = Sampling(temperature=0.9, guidance=2.0)


@pytest.fixture(scope="module", params=["halves", "interleaved", "features"])
def llama(request: pytest.FixtureRequest) -> TinyLlama:
    layers = [1, 3] if request.param == "features" else []
    return make_llama(interleaved=request.param == "interleaved", feature_layers=layers)


def sample(decoder: TinyLlama, sampling: Sampling = GUIDED, rows: Any = ROWS, seeds: Any = SEEDS) -> Any:
    return Sample(sampling).decode(decoder, {}, Request(rows, seeds))


def inverted(decoder: TinyLlama, tokens: Tensor, noise: Tensor, row: int, place: int, sampling: Sampling) -> Tensor:
    """The token of an image at a place, drawn from a full pass over those before it."""
    both = [decoder.token_logits(PROMPTS[row : row + 1], tokens[row : row + 1], kind)[:, place] for kind in (1, 0)]
    cumulative = sampling_log_probs(guide(both[0], both[1], sampling.guidance), sampling).exp().cumsum(-1)
    return (cumulative < noise * cumulative[:, -1:]).sum(-1)


@pytest.mark.parametrize("sampling", [GUIDED, Sampling(temperature=0.9), Sampling(top_k=5, top_p=0.9, guidance=1.0)])
def test_cached_decoding_draws_what_full_passes_draw(llama: TinyLlama, sampling: Sampling) -> None:
    decoded = sample(llama, sampling)
    noise, tokens = uniform_noise(SEEDS, 1, 16)[:, 1], torch.zeros(4, 16, dtype=torch.int64)
    for place in range(16):
        for row in range(4):
            tokens[row, place] = inverted(llama, tokens, noise[row, place], row, place, sampling)
    assert torch.equal(decoded.tokens, tokens)
    assert len(tokens.unique()) > 8
    recorded = llama.policy_log_probs(PROMPTS, tokens, sampling)
    assert (decoded.log_probs < -0.1).any()
    torch.testing.assert_close(decoded.log_probs, recorded, atol=1e-4, rtol=0)


def test_kept_tokens_are_read_and_the_others_drawn_given_them(llama: TinyLlama) -> None:
    tokens, keep = torch.randint(0, 32, (4, 16)), torch.rand(4, 16) < 0.6
    keep[0, :5], keep[1], keep[:, -1] = True, False, False
    decoded = Sample(GUIDED).decode(llama, {}, Request(ROWS, SEEDS, tokens, keep))
    assert torch.equal(decoded.tokens[keep], tokens[keep])
    noise, order = uniform_noise(SEEDS, 1, 16)[:, 1], decision_order(keep)
    for step in range(order.shape[1]):
        for row, place in enumerate(order[:, step].tolist()):
            if not keep[row, place]:
                keep[row, place] = True
                tokens[row, place] = inverted(llama, tokens, noise[row, step], row, place, GUIDED)
    assert torch.equal(decoded.tokens, tokens)


def test_a_batch_of_prompts_of_several_lengths_is_made_of_single_images(llama: TinyLlama) -> None:
    together = sample(llama)
    for row in range(4):
        alone = sample(llama, rows=ROWS[row : row + 1], seeds=SEEDS[row : row + 1])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_paths_that_share_a_prompt_are_made_of_single_images(llama: TinyLlama, n: int) -> None:
    paths = Paths(llama, Request(ROWS, SEEDS), GUIDED, n=n)
    while not paths.is_done:
        paths.commit(paths.propose())
    seeds = Request(ROWS, SEEDS).repeat(n).seeds
    for row, seed in enumerate(seeds):
        alone = sample(llama, rows=[ROWS[row // n]], seeds=[seed])
        assert torch.equal(alone.tokens[0], paths.finish().tokens[row])


def decode(decoder: TinyLlama, state: NextTokenState, steps: int) -> NextTokenState:
    for _ in range(steps):
        decoder.commit(state, decoder.propose(state, 1), torch.zeros(len(state.tokens), dtype=torch.int64))
    return state


def test_selected_rows_continue_as_they_would_have(llama: TinyLlama) -> None:
    """Rows taken out of order, some twice, some not at all: prefixes have one, two and no rows."""
    rows = torch.tensor([1, 3, 0, 1, 1])
    half = decode(llama, llama.begin(Request(ROWS, SEEDS), GUIDED), 7)
    taken = decode(llama, half.select(rows), 9)
    assert torch.equal(taken.tokens, decode(llama, half, 9).tokens[rows])
    assert taken.cost is half.cost


def test_features_recorded_while_decoding_are_those_of_full_passes() -> None:
    llama = make_llama(feature_layers=[1, 3])
    decoded, full = sample(llama), None
    for found in (llama.features(PROMPTS, decoded.tokens), llama.features_from_cache(
        PROMPTS, decoded.tokens, **{name: getattr(decoded.features, name) for name in FEATURES[2:]}
    )):  # fmt: skip
        for name in FEATURES:
            torch.testing.assert_close(getattr(decoded.features, name), getattr(found, name), atol=1e-3, rtol=1e-3)
        full = found
    assert full is not None and full.prompt.shape == (4, 12, 64)
    words = [len(prompt.split()) for prompt in PROMPTS]
    assert [int(row.any(-1).sum()) for row in full.prompt] == words
    torch.testing.assert_close(full.prompt[0], full.prompt[3])


def test_without_guidance_and_features_only_conditional_rows_run() -> None:
    llama, plain = make_llama(feature_layers=[]), Sampling()
    state = decode(llama, llama.begin(Request(ROWS, SEEDS), plain), 16)
    assert state.features is None and state.cost.decoder_passes == 4 * 16
    guided = sample(llama)
    assert guided.cost.decoder_passes == 2 * 4 * 16
    read = sample(make_llama(feature_layers=[1, 3]), plain)
    assert read.cost.decoder_passes == 2 * 4 * 16 and torch.equal(read.tokens, state.tokens)


def test_confidence_comes_from_a_pass_where_nothing_was_recorded() -> None:
    bare, full = make_llama(), make_llama(feature_layers=[1, 3])
    decoded = sample(full)
    before = decoded.cost.decoder_passes
    kept = full.confidence(PROMPTS, decoded.tokens, decoded.features, decoded.cost)
    assert decoded.cost.decoder_passes == before
    found = bare.confidence(PROMPTS, decoded.tokens, None, decoded.cost)
    assert decoded.cost.decoder_passes == before + 4
    torch.testing.assert_close(found, kept, atol=1e-4, rtol=0)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(each.shape) for each in tree_leaves(out) if isinstance(each, Tensor)}
        return out


def test_no_tensor_holds_a_prefix_more_than_once() -> None:
    """Eight paths of two prompts of 12 words, forked and selected from: 14 positions, 8 dimensions of each head."""
    llama, rows = make_llama(), [{"prompt": " ".join(["a"] * 12)}, {"prompt": " ".join(["red"] * 12)}]
    with Shapes() as shapes:
        state = decode(llama, llama.begin(Request(rows, [1, 2]), GUIDED, 4), 3)
        state = decode(llama, state.fork(4).select(torch.tensor([7, 0, 1, 2, 3, 4, 5, 6])), 3)
        assert len(state.tokens) == 8
    held = {torch.Size(shape).numel() for shape in shapes.seen if {14, 8} <= set(shape[-2:])}
    assert 4 * 4 * 14 * 8 in held  # keys of two prompts and their twins
    assert max(held) < 16 * 4 * 14 * 8  # 16 rows; queries, keys and values of the four come out of one product


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_in_half_precision_it_decodes_and_its_policy_is_near(guidance: float) -> None:
    llama = make_llama(feature_layers=[] if guidance else [1, 3]).bfloat16()
    sampling = Sampling(guidance=guidance, temperature=2.0)
    decoded = sample(llama, sampling)
    assert torch.equal(decoded.tokens, sample(llama, sampling).tokens)
    assert decoded.log_probs.dtype == torch.float32
    found = llama.policy_log_probs(PROMPTS, decoded.tokens, sampling)
    assert (found - decoded.log_probs).abs().mean() < 0.1


def test_checkpointing_changes_no_gradient() -> None:
    tokens, gradients = torch.randint(0, 32, (4, 16)), []
    for checkpointing in (False, True):
        llama = make_llama(checkpointing=checkpointing)
        llama.log_probs(PROMPTS, tokens, SEEDS).sum().backward()
        gradients.append({name: weight.grad for name, weight in llama.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == {name for name, _ in llama.named_parameters() if "image_tokenizer" not in name}
    for name, plain in gradients[0].items():
        torch.testing.assert_close(plain, gradients[1][name])


@pytest.mark.slow
def test_compiled_steps_draw_the_same_tokens() -> None:
    eager, compiled = make_llama(depth=1), make_llama(depth=1, compiled=True)
    assert torch.equal(sample(eager).tokens, sample(compiled).tokens)
