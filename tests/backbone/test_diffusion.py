"""Pipelines of diffusers as decoders, on a tiny random Stable Diffusion 3."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.diffusion import DiffusionDecoder, DiffusionSampling
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.backbone.tiny_pipeline import save_tiny_sd3
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.verifier import Reward
from tests.helpers.overrides import WITHOUT
from tests.helpers.pipelines import tiny_flux, tiny_unet

ROWS = [{"prompt": f"a photo of a {name}"} for name in ("dog", "red cup", "star")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_sd3(str(tmp_path_factory.mktemp("pipelines") / "sd3"))


@pytest.fixture(scope="module")
def decoder(checkpoint: str) -> DiffusionDecoder:
    return DiffusionDecoder(checkpoint, "float32", WITHOUT)


def test_an_image_depends_on_its_prompt_and_seed_alone(decoder: DiffusionDecoder) -> None:
    strategy = Sample(DiffusionSampling(steps=3, guidance=5.0, size=32))
    together = strategy.decode(decoder, {}, Request(ROWS, [1, 2, 3]))
    assert together.tokens.shape == (3, 3, 32, 32) and together.tokens.dtype == torch.uint8
    assert together.cost.decoder_passes == 3 * 3 * 2 and together.features is None
    alone = strategy.decode(decoder, {}, Request(ROWS[1:2], [2]))
    assert (together.tokens[1].int() - alone.tokens[0].int()).abs().max() <= 1
    other = strategy.decode(decoder, {}, Request(ROWS[1:2], [3]))
    assert (other.tokens[0].int() - alone.tokens[0].int()).abs().max() > 20
    plain = Sample(DiffusionSampling(steps=3, guidance=1.0, size=32)).decode(decoder, {}, Request(ROWS, [1, 2, 3]))
    assert plain.cost.decoder_passes == 3 * 3


class Brightness(Reward):
    def cache_key(self) -> str:
        return type(self).__name__

    def __call__(self, prompts: object, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((1, 2, 3))


def test_best_of_n_keeps_the_image_that_a_reward_likes_best(decoder: DiffusionDecoder) -> None:
    sample = Sample(DiffusionSampling(steps=2, guidance=1.0, size=32))
    best = BestOfN(sample, n=3, judge="brightness").decode(
        decoder, {"brightness": Brightness()}, Request(ROWS[:2], [5, 6])
    )
    for row, seed, chosen in zip(ROWS, (5, 6), best.tokens, strict=False):
        candidates = sample.decode(
            decoder, {}, Request([row] * 3, [seed, image_seed(seed, 1), image_seed(seed, 2)])
        ).tokens
        brightest = candidates.float().mean((1, 2, 3)).max()
        assert chosen.float().mean() == pytest.approx(float(brightest), abs=0.01)


def test_its_weights_tell_it_apart_and_move_with_it(decoder: DiffusionDecoder, checkpoint: str) -> None:
    other = DiffusionDecoder(checkpoint, "bfloat16", WITHOUT)
    assert fingerprint(other) != fingerprint(decoder)
    assert other.to(torch.float32).pipeline.transformer.dtype == torch.float32


def test_what_a_pipeline_cannot_do_is_refused(
    decoder: DiffusionDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"k must be 1, not 2"):
        decoder.noise([0], 2, None)
    with pytest.raises(FileNotFoundError, match=r"decoder.checkpoint: .*model_index.json"):
        DiffusionDecoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"decoder.checkpoint: 'no/where' is neither a folder nor to be had"):
        DiffusionDecoder("no/where")
    with pytest.raises(ValueError, match=r"sampling.steps must be at least 1, not 0"):
        DiffusionSampling(steps=0, guidance=1.0, size=32)


def passes(decoder: DiffusionDecoder, sampling: DiffusionSampling) -> tuple[int, int]:
    """Rows that its denoising network is given for two images, and those that are counted."""
    network = next(
        getattr(decoder.pipeline, name) for name in ("transformer", "unet") if hasattr(decoder.pipeline, name)
    )
    forward, made = network.forward, []

    def watched(*given: torch.Tensor, **named: torch.Tensor) -> object:
        made.append(len(given[0] if given else named["hidden_states"]))
        return forward(*given, **named)

    network.forward = watched
    try:
        decoded = Sample(sampling).decode(decoder, {}, Request(ROWS[:2], [1, 2]))
    finally:
        network.forward = forward
    return sum(made), decoded.cost.decoder_passes


def test_the_passes_that_are_made_are_counted(decoder: DiffusionDecoder, checkpoint: str, tmp_path: Path) -> None:
    guided, plain = (DiffusionSampling(4, guidance, 64) for guidance in (3.5, 1.0))
    assert passes(decoder, guided) == (16, 16) and passes(decoder, plain) == (8, 8)
    two_calls_a_step = DiffusionDecoder(checkpoint, "float32", WITHOUT)
    two_calls_a_step.pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    made, counted = passes(two_calls_a_step, guided)
    assert made == counted > 16
    for path in (tiny_flux(tmp_path / "flux"), tiny_unet(tmp_path / "lcm", distilled=True)):
        assert passes(DiffusionDecoder(path, "float32"), guided) == (8, 8)
    made, counted = passes(DiffusionDecoder(tiny_unet(tmp_path / "sd", distilled=False), "float32"), guided)
    assert made == counted == 2 * 2 * 5  # this scheduler looks twice at the second step


def test_a_negative_prompt_that_nothing_reads_is_refused(decoder: DiffusionDecoder, tmp_path: Path) -> None:
    negative = DiffusionSampling(2, 3.5, 64, "blurry")
    for path in (tiny_flux(tmp_path / "flux"), tiny_unet(tmp_path / "lcm", distilled=True)):
        with pytest.raises(
            ValueError, match=r"sampling.negative_prompt='blurry' has no effect: \w+Pipeline makes no pass"
        ):
            DiffusionDecoder(path, "float32").noise([1], 1, negative)
    with pytest.raises(ValueError, match=r"has no effect: guidance must be above 1"):
        decoder.noise([1], 1, DiffusionSampling(2, 1.0, 64, "blurry"))
    images = [Sample(DiffusionSampling(2, 3.5, 64, text)).decode(decoder, {}, Request(ROWS[:1], [1])).tokens.int()
              for text in ("", "blurry")]  # fmt: skip
    assert (images[0] - images[1]).abs().max() > 0
