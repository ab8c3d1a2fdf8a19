"""Show-o's sampler against a straightforward one on the same random weights: pytest tests/benchmarks --benchmark-only

The straightforward one runs the whole padded sequence at every step with a dense mask, computes logits of the whole
vocabulary at every position, and decodes one image at a time.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_attention import Rotary
from lightning_modules.backbone.mask_sampling import MaskSampling, SeededNoise, least_confident, masked_after
from lightning_modules.backbone.showo import ShowO
from lightning_modules.backbone.transformer import attend
from lightning_modules.decoding.potential import Potential
from lightning_modules.rewards.verifier import StepJudge
from tests.helpers.measuring import peak_mebibytes, seconds
from tests.helpers.requests import asked

SAMPLING = MaskSampling(steps=18, guidance=1.75)
PROMPTS = ["a photo of a bench", "a photo of two clocks", "a photo of a red dog and a blue cat", "a photo of a cow"]


class Words:
    """Each word is an id; ids are as many as it is told."""

    end_of_text = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[1 + sum(map(ord, word)) % (self.size - 1) for word in prompt.split()] for prompt in prompts]


def build(text: int, codes: int, dim: int = 256, depth: int = 8, heads: int = 8) -> ShowO:
    torch.manual_seed(0)
    tokenizer: Any = torch.nn.Module()
    tokenizer.codebook_size, tokenizer.num_tokens = codes, 256
    decoder = ShowO(tokenizer, Words(text), dim=dim, depth=depth, heads=heads, mlp_dim=4 * dim)
    for weight in decoder.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.05)  # far from uniform, so that codes are not decided by rounding
    return decoder.eval()


def ours(decoder: ShowO, prompts: Sequence[str]) -> Tensor:
    state = decoder.begin(asked(prompts), SAMPLING)
    only = torch.zeros(len(prompts), dtype=torch.int64, device=state.tokens.device)
    while not state.is_done:
        decoder.commit(state, decoder.propose(state, 1), only)
    return state.tokens


@torch.no_grad()
def straightforward(decoder: ShowO, prompt: str, seed: int) -> Tensor:
    device = decoder.embed.weight.device
    noise = SeededNoise.draw([seed], 1, SAMPLING.steps, 256).to(device)
    with device:  # all that follows is made there
        return _straightforward(decoder, prompt, noise)


def _straightforward(decoder: ShowO, prompt: str, noise: SeededNoise) -> Tensor:
    words = decoder.vocabulary
    blocks = [words.block(text) for text in decoder.text_tokenizer.encode([prompt, ""])]
    length = words.max_text + 1
    padded = torch.tensor([[words.text] * (length - len(block)) + block for block in blocks])
    total = length + 258
    real = torch.cat([padded != words.text, torch.ones(2, 258, dtype=torch.bool)], 1)
    allowed = torch.ones(total, total, dtype=torch.bool).tril()
    allowed[length:] = True
    mask = (allowed & real[:, None] | torch.eye(total, dtype=torch.bool))[:, None]
    rotary = Rotary.at(torch.arange(total), decoder.rotary_dims)
    ids = torch.full((1, 256), words.mask)
    for step in range(SAMPLING.steps):
        image = torch.cat([torch.tensor([[words.soi]]), ids, torch.tensor([[words.eoi]])], 1)
        x = decoder.embed(torch.cat([padded, image.repeat(2, 1)], 1))
        hidden = decoder.transformer.run(x, lambda _, q, k, v: attend(rotary(q), rotary(k), v, allowed=mask))[-1]
        conditional, unconditional = decoder.head(decoder.norm(hidden)).float().chunk(2)
        logits = (1 + SAMPLING.guidance) * conditional - SAMPLING.guidance * unconditional
        probs = logits[:, length + 1 : -1, words.first_code : words.mask].softmax(-1)
        unknown = ids == words.mask
        drawn = noise.codes(step, torch.arange(256), probs[0], 1).T
        chosen = probs.gather(2, drawn[..., None]).squeeze(2)
        codes = torch.where(unknown, drawn, ids - words.first_code)
        count = masked_after(step, SAMPLING.steps, unknown)
        temperature = SAMPLING.temperature_at(step)
        masked = least_confident(chosen, unknown, count, temperature, noise.confidence(step, 1)[:, 0])
        ids = torch.where(masked, words.mask, codes + words.first_code)
    return codes


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("text", "codes", "least"), [(4096, 1024, 1.7), (50295, 8192, 3.5)], ids=["small vocabulary", "real vocabulary"]
)
def test_sampling_against_a_straightforward_version(
    benchmark: BenchmarkFixture, text: int, codes: int, least: float, batch: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoder, prompts = build(text, codes), PROMPTS[:batch]
        slow = lambda: torch.cat([straightforward(decoder, prompt, i) for i, prompt in enumerate(prompts)])  # noqa: E731
        if batch == 1:  # in double precision; in single rounding decides a token now and then, and all drawn after it
            assert torch.equal(ours(decoder.double(), prompts), straightforward(decoder, prompts[0], 0))
            decoder.float()
        slow_one = partial(straightforward, decoder, prompts[0], 0)
        slow_times: list[float] = []  # one before each of ours, since other work on the machine comes and goes
        benchmark.pedantic(
            ours,
            setup=lambda: slow_times.append(seconds(slow, rounds=1)) or ((decoder, prompts), {}),
            rounds=2,
            warmup_rounds=0,
        )
        slow_seconds, fast_seconds = statistics.median(slow_times), statistics.median(benchmark.stats.stats.data)
        peaks = SimpleNamespace(fast=peak_mebibytes(lambda: ours(decoder, prompts)), slow=peak_mebibytes(slow_one))
    finally:
        torch.set_num_threads(threads)
    ratio = slow_seconds / fast_seconds
    benchmark.extra_info |= {"times_faster": ratio, "images_per_second": batch / fast_seconds, **vars(peaks)}
    print(
        f"\nvocabulary {decoder.vocabulary.total}, batch {batch}: {batch / fast_seconds:.2f} images/s, {ratio:.2f} x"
        f" the straightforward {batch / slow_seconds:.2f}; peak {peaks.fast:.0f} against {peaks.slow:.0f} MiB"
    )
    assert ratio >= least


class Coins(StepJudge):
    """Finds a fifth of what it sees clear, and half of that without potential."""

    def cache_key(self):
        return type(self).__name__

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        clear, potential = torch.rand(2, len(pixels), generator=self.generator)
        return clear - 0.3, potential

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return torch.rand(len(pixels), generator=self.generator)


def test_pruning_saves_a_fifth_of_the_decoders_steps(benchmark: BenchmarkFixture) -> None:
    decoder = build(64, 64, dim=64, depth=2)
    decoder.image_tokenizer.decode = lambda tokens: tokens.float()[:, None, None]  # type: ignore[method-assign]
    rows, passes = [{"prompt": prompt} for prompt in PROMPTS[:2]], []

    def decode(prune: bool) -> None:
        strategy = Potential(SAMPLING, 8, "judge", prune)
        decoded = strategy.decode(decoder, {"judge": Coins()}, Request(rows, range(len(rows))))
        passes.append(decoded.cost.decoder_passes)

    decode(False)
    benchmark.pedantic(decode, (True,), rounds=1, warmup_rounds=0)
    saved = 1 - passes[1] / passes[0]
    benchmark.extra_info["steps_saved"] = saved
    print(f"\npruning saves {saved:.0%} of the decoder's steps")
    assert saved >= 0.2
