"""Speed claims, measured side by side: pytest tests/benchmarks --benchmark-only -n 0

Each test times the fast way with pytest-benchmark, the naive way (or plain sampling) in the same run, and checks the
ratio. All at batch 64 with the bundled decoder and PARM.
"""

import copy
import statistics

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from datamodules.shapes.prompts import shapes_prompts
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.backbone.decoder import Request
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.dpo import dpo
from tests.helpers.measuring import peak_mebibytes, seconds
from tests.helpers.overrides import ROOT

BATCH = 64


@pytest.fixture(scope="module")
def parts():
    """The bundled decoder, PARM and sampling settings of the main job."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train")
    decoder, parm = instantiate(config.decoder, _convert_="all"), instantiate(config.parm, _convert_="all")
    return decoder.eval(), parm.eval(), instantiate(config.sampling)


def test_verified_decoding_costs_at_most_two_and_a_half_times_plain_sampling(
    benchmark: BenchmarkFixture, parts
) -> None:
    decoder, parm, sampling = parts
    rows = shapes_prompts("validation", 11)[:BATCH]
    seeds = list(range(BATCH))
    plain, verified = Sample(sampling), Verified(sampling, k=8)
    plain_seconds = seconds(lambda: plain.decode(decoder, {}, Request(rows, seeds)))
    benchmark.pedantic(verified.decode, (decoder, {"parm": parm}, Request(rows, seeds)), rounds=3, warmup_rounds=1)
    ratio = statistics.median(benchmark.stats.stats.data) / plain_seconds
    benchmark.extra_info |= {"plain_seconds": plain_seconds, "times_plain": ratio}
    print(f"\nverified k=8: {ratio:.2f} x plain sampling ({plain_seconds:.2f} s for {BATCH} images)")
    assert ratio <= 2.5


def test_decoding_a_region_again_costs_its_share(benchmark: BenchmarkFixture, parts) -> None:
    """Passes are exactly one a token of the region and one more; every token of the image is still read once."""
    decoder, _, sampling = parts
    rows = shapes_prompts("validation", 11)[:BATCH]
    plain, seeds = Sample(sampling), list(range(BATCH))
    image = plain.decode(decoder, {}, Request(rows, seeds))
    times = {}
    for side in (8, 4, 2):
        keep = torch.ones(8, 8, dtype=torch.bool)
        keep[4 - side // 2 : 4 + side // 2, 4 - side // 2 : 4 + side // 2] = False
        again = lambda keep=keep: plain.decode(  # noqa: E731
            decoder, {}, Request(rows, seeds, image.tokens, keep.flatten().expand(BATCH, -1))
        )
        passes = again().cost.decoder_passes / (2 * BATCH)
        assert passes == side**2 + (side < 8)
        if side == 4:
            benchmark.pedantic(again, rounds=3, warmup_rounds=1)
            times[side] = statistics.median(benchmark.stats.stats.data)
        else:
            times[side] = seconds(again)
    benchmark.extra_info |= {f"seconds_{side}x{side}": value for side, value in times.items()}
    shares = {side: value / times[8] for side, value in times.items()}
    print(f"\na region of 4x4 of 8x8 tokens takes {shares[4]:.2f} of the whole, one of 2x2 {shares[2]:.2f}")
    assert shares[4] <= 0.75
    assert shares[2] <= 0.6


def test_scoring_against_the_cached_prefix_is_ten_times_faster_than_encoding_anew(
    benchmark: BenchmarkFixture, parts
) -> None:
    decoder, parm, sampling = parts
    rows = shapes_prompts("validation", 11)[:BATCH]
    k, half = 8, decoder.num_tokens // 2
    prompts = [row["prompt"] for row in rows]
    state = decoder.begin(Request(rows, range(BATCH)), sampling, k)
    watch = parm.begin(state.prompt, decoder.num_tokens)
    first = torch.zeros(BATCH, dtype=torch.int64)
    for _ in range(half):
        proposal = decoder.propose(state, 1)
        parm.score(watch, proposal.features)
        parm.commit(watch, first)
        decoder.commit(state, proposal, first)
    proposal = decoder.propose(state, k)

    def anew() -> torch.Tensor:
        columns = []
        for j in range(k):
            tokens = state.tokens.clone()
            tokens[:, half] = proposal.tokens[:, j, 0]
            columns.append(parm.values(decoder.features(prompts, tokens), [half + 1]))
        return torch.cat(columns, 1)

    def cached() -> torch.Tensor:
        return parm.score(watch, proposal.features)

    torch.testing.assert_close(cached(), anew(), atol=2e-3, rtol=1e-3)
    anew_seconds = seconds(anew)
    benchmark.pedantic(cached, rounds=10, warmup_rounds=2)
    ratio = anew_seconds / statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info |= {"anew_seconds": anew_seconds, "times_faster": ratio}
    print(f"\ncached prefix: {ratio:.1f} x faster than encoding {k} candidates anew")
    assert ratio >= 10


def test_a_dpo_step_with_a_stored_reference_costs_less_than_with_a_live_one(benchmark: BenchmarkFixture, parts) -> None:
    decoder = copy.deepcopy(parts[0])
    reference = copy.deepcopy(decoder).requires_grad_(False)
    weights = sum(weight.nbytes for weight in (*reference.parameters(), *reference.buffers())) / 2**20
    words = [row["prompt"] for row in shapes_prompts("train", 6)[:32]] * 2
    tokens = torch.randint(0, decoder.image_tokenizer.codebook_size, (64, decoder.num_tokens))
    with torch.no_grad():
        stored = decoder.token_log_probs(words, tokens).sum(1)

    def step(ref: Tensor) -> None:
        chosen, rejected = decoder.token_log_probs(words, tokens).sum(1).chunk(2)
        dpo(chosen, rejected, *ref.chunk(2), beta=0.1).mean().backward()
        decoder.zero_grad()

    def live() -> None:
        with torch.no_grad():
            ref = reference.token_log_probs(words, tokens).sum(1)
        step(ref)

    live_seconds = seconds(live)
    benchmark.pedantic(lambda: step(stored), rounds=3, warmup_rounds=1)
    stored_seconds = statistics.median(benchmark.stats.stats.data)
    stored_peak, live_peak = peak_mebibytes(lambda: step(stored)), peak_mebibytes(live) + weights
    ratio = live_seconds / stored_seconds
    benchmark.extra_info |= {
        "live_seconds": live_seconds,
        "times_live": ratio,
        "stored_peak_mebibytes": stored_peak,
        "live_peak_mebibytes": live_peak,
    }
    print(
        f"\nDPO step, 32 pairs: {stored_seconds:.2f} s, with a live reference {ratio:.2f} times that; beside the "
        f"decoder {stored_peak:.0f} and {live_peak:.0f} MiB at the peak"
    )
    assert ratio >= 1.1
    assert live_peak > stored_peak


def test_rendering(benchmark: BenchmarkFixture) -> None:
    stream = ShapesStream()
    images = 500
    benchmark.pedantic(lambda: np.stack([stream[i].image for i in range(images)]), rounds=5, warmup_rounds=1)
    rate = images / statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info |= {"images_per_second": rate}
    print(f"\nrendering: {rate:.0f} images/s")
    assert rate >= 1500
