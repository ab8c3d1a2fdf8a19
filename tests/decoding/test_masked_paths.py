"""Many paths of a mask-token decoder: the same strategies, over grids instead of tokens."""

import pytest
import torch

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.pruning import Pruning
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Strategy
from lightning_modules.decoding.verified import Verified
from tests.helpers.models import make_masked, make_parm

SAMPLING = MaskSampling(steps=6, guidance=0.5)
SEEDS = [image_seed(2, i) for i in range(12)]
PATHS = [
    Particles(SAMPLING, n=3, stride=2),
    Beam(SAMPLING, n=2, k=3),
    Pruning(SAMPLING, n=3, share=0.99, stride=2),
]


@pytest.fixture(scope="module")
def masked() -> MaskTokenDecoder:
    return make_masked()


@pytest.fixture(scope="module")
def judges(masked: MaskTokenDecoder) -> dict:
    return {"parm": make_parm(masked)}


@pytest.mark.parametrize(
    "paths",
    [Particles(SAMPLING, 3, stride=6), Pruning(SAMPLING, 3, share=0.0, stride=2)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_paths_that_are_left_alone_are_best_of_n(
    masked: MaskTokenDecoder, rows: list, judges: dict, paths: Strategy
) -> None:
    best = BestOfN(Sample(SAMPLING), 3, "parm").decode(masked, judges, Request(rows, SEEDS))
    made = paths.decode(masked, judges, Request(rows, SEEDS))
    assert torch.equal(made.tokens, best.tokens)
    assert made.cost.decoder_passes == best.cost.decoder_passes


def test_one_beam_is_verified_decoding(masked: MaskTokenDecoder, rows: list, judges: dict) -> None:
    beam = Beam(SAMPLING, n=1, k=4).decode(masked, judges, Request(rows, SEEDS))
    verified = Verified(SAMPLING, k=4).decode(masked, judges, Request(rows, SEEDS))
    assert torch.equal(beam.tokens, verified.tokens)
    for choice, other in zip(beam.trace, verified.trace, strict=True):
        assert torch.equal(choice.tokens, other.tokens) and choice.decided is None
        torch.testing.assert_close(choice.scores, other.scores)


def test_pruned_paths_cost_nothing_more(masked: MaskTokenDecoder, rows: list, judges: dict) -> None:
    pruned = Pruning(SAMPLING, 4, share=1.0, stride=2).decode(masked, judges, Request(rows, SEEDS))
    assert pruned.cost.decoder_passes == 2 * len(rows) * (2 * 4 + 4)
    assert pruned.cost.verifier_calls == len(rows) * (4 + 1 + 1)


@pytest.mark.parametrize("paths", PATHS, ids=lambda strategy: type(strategy).__name__)
def test_images_do_not_depend_on_the_batch(masked: MaskTokenDecoder, rows: list, judges: dict, paths: Strategy) -> None:
    together = paths.decode(masked, judges, Request(rows, SEEDS)).tokens
    apart = [paths.decode(masked, judges, Request([row], [seed])).tokens for row, seed in zip(rows, SEEDS, strict=True)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("paths", PATHS, ids=lambda strategy: type(strategy).__name__)
def test_kept_tokens_are_never_changed(masked: MaskTokenDecoder, rows: list, judges: dict, paths: Strategy) -> None:
    tokens, keep = torch.randint(0, 32, (len(rows), masked.num_tokens)), torch.rand(len(rows), masked.num_tokens) < 0.5
    made = paths.decode(masked, judges, Request(rows, SEEDS, tokens, keep))
    assert torch.equal(made.tokens[keep], tokens[keep])
    assert (made.tokens[~keep] != tokens[~keep]).any()


@pytest.mark.parametrize("paths", PATHS, ids=lambda strategy: type(strategy).__name__)
def test_what_was_kept_leads_to_the_image(masked: MaskTokenDecoder, rows: list, judges: dict, paths: Strategy) -> None:
    made = paths.decode(masked, judges, Request(rows, SEEDS))
    final = made.trace[-1]
    for row, (image, candidates, kept) in enumerate(zip(made.tokens, final.tokens, final.kept, strict=True)):
        assert any(torch.equal(image, each) for each in candidates[kept > 0]), f"image {row}"
