"""Pipelines of diffusers step by step: what the tiny random ones make equals what they make by themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, LCMScheduler
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.pipelines.decoder import PipelineDecoder, PipelineSampling
from lightning_modules.backbone.pipelines.family import pack, unpack
from lightning_modules.backbone.tiny_pipeline import save_tiny_sd3
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.verifier import StepJudge
from tests.helpers.overrides import WITHOUT
from tests.helpers.pipelines import tiny_flux, tiny_qwen_image, tiny_sana, tiny_sdxl, tiny_unet

ROWS = [{"prompt": f"a photo of a {name}"} for name in ("dog", "red cup", "star")]
SIZE = 32
Decoders = dict[str, PipelineDecoder]
MAKERS: dict[str, Callable[[Path], str]] = {
    "sd3": lambda folder: save_tiny_sd3(str(folder)),
    "sdxl": tiny_sdxl,
    "sdxl_v": lambda folder: tiny_sdxl(folder, "v_prediction"),
    "flux": tiny_flux,
    "sana": tiny_sana,
    "qwen": tiny_qwen_image,
    "schnell": lambda folder: tiny_flux(folder, distilled=False),
}


FAMILY_NAMES = ["sd3", "sdxl", "flux", "sana", "qwen"]
PACKED = ("FluxPipeline", "QwenImagePipeline")  # those that are given latents as tokens


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        name: PipelineDecoder(make(folder / name), SIZE, "float32", WITHOUT if name == "sd3" else ())
        for name, make in MAKERS.items()
    }


def pixels(decoder: PipelineDecoder, sampling: PipelineSampling, seeds: Sequence[int], rows: Any = ROWS) -> Tensor:
    return decoder.image_tokenizer.decode(Sample(sampling).decode(decoder, {}, Request(rows, seeds)).tokens)


@contextmanager
def rows_seen(decoder: PipelineDecoder) -> Iterator[list[int]]:
    """Rows that the network is given, pass by pass."""
    seen: list[int] = []

    def watch(network: Any, given: Any, named: Any) -> None:
        seen.append(len(given[0] if given else named["hidden_states"]))

    hook = decoder.family.network.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def guided(decoder: PipelineDecoder, scale: float) -> dict[str, Any]:
    """The arguments that guide a pipeline as here."""
    if decoder.family.is_distilled or type(decoder.pipeline).__name__ not in PACKED:
        return {"guidance_scale": scale}
    return {"true_cfg_scale": scale, "negative_prompt": "" if scale > 1 else None}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", MAKERS)
def test_an_image_is_what_the_pipeline_makes(decoders: Decoders, name: str, guidance: float) -> None:
    decoder, sampling = decoders[name], PipelineSampling(3, guidance)
    request = Request(ROWS, [1, 2, 3])
    with rows_seen(decoder) as seen:
        decoded = Sample(sampling).decode(decoder, {}, request)
    images, begun = decoder.image_tokenizer.decode(decoded.tokens), decoder.begin(request, sampling)
    for i, row in enumerate(ROWS):
        latents = begun.latents[i : i + 1]
        asked = {"prompt": row["prompt"], "num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "pt"}
        asked |= {"use_resolution_binning": False} if name == "sana" else {}  # its sizes are larger
        given = latents if type(decoder.pipeline).__name__ in PACKED else unpack(latents, decoder.family.patch)
        seed = torch.Generator().manual_seed(i + 1)
        for noise in ({"latents": given}, {"generator": seed}):
            expected = decoder.pipeline(**asked, **noise, **guided(decoder, guidance)).images
            assert expected.std() > 0.05
            assert torch.allclose(images[i : i + 1], expected, atol=1e-5)
    passes = 2 if guidance > 1 and name != "flux" else 1
    assert seen == [3 * passes] * 3 and decoded.cost.decoder_passes == sum(seen)
    assert decoded.cost.tokens == sum(seen) * decoder.num_tokens


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_equal_prompts_are_encoded_once(decoders: Decoders, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, sampling = decoders[name], PipelineSampling(1, 1.0)
    asked: list[list[str]] = []
    encode = decoder.family.encode
    monkeypatch.setattr(decoder.family, "encode", lambda texts, device: asked.append(texts) or encode(texts, device))
    several = decoder.encode(["a dog", "a star", "a dog"], sampling).read
    single = decoder.encode(["a star"], sampling).read
    assert asked == [["a dog", "a star"], ["a star"]]
    for part, value in several.items():
        assert torch.equal(value[0], value[2])
        assert name == "qwen" or torch.allclose(value[1].float(), single[part][0].float(), atol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_guidance_prompts_and_seeds_change_images(decoders: Decoders, name: str) -> None:
    decoder, row = decoders[name], ROWS[:1]
    images = [
        pixels(decoder, PipelineSampling(2, 1.0), [1], row),
        pixels(decoder, PipelineSampling(2, 5.0), [1], row),
        pixels(decoder, PipelineSampling(2, 1.0), [2], row),
        pixels(decoder, PipelineSampling(2, 1.0), [1], ROWS[1:2]),
    ]
    differences = [(images[i] - images[j]).abs().max() for i in range(4) for j in range(i)]
    assert min(differences) > 1e-4


@pytest.mark.parametrize(("solver", "eta"), [("euler", 0.0), ("ddim", 0.8)])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_image_is_the_same_alone_in_a_batch_and_beside_rows_that_stop(
    decoders: Decoders, name: str, solver: Any, eta: float
) -> None:
    decoder, sampling = decoders[name], PipelineSampling(4, 3.0, solver, eta)
    alone = torch.cat([pixels(decoder, sampling, [seed], [row]) for seed, row in enumerate(ROWS)])
    assert torch.allclose(pixels(decoder, sampling, range(3)), alone, atol=1e-5)
    paths = Paths(decoder, Request(ROWS, range(3)), sampling)
    for rows in ([0, 1, 2], [0, 2], [1]):  # places among those that are left
        paths = paths.select(torch.tensor(rows))
        paths.commit(paths.propose())
    paths.commit(paths.propose())
    assert torch.allclose(decoder.image_tokenizer.decode(paths.finish().tokens), alone[2:], atol=1e-5)


class Picky(StepJudge):
    """Finds most images clear, by their greens; those have potential whose left half is redder. Likes blue tops."""

    def cache_key(self) -> Any:
        return "picky"

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return halves(pixels, 2, 1)

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        return (200 * (halves(pixels, 1, 1) + 0.01)).sigmoid(), (200 * halves(pixels, 0, 2)).sigmoid()


def halves(pixels: Tensor, channel: int, dim: int) -> Tensor:
    """How much more of a colour the first half of images along height (1) or width (2) has than the second, [B]."""
    first, second = pixels[:, channel].mean(3 - dim).chunk(2, 1)
    return first.mean(1) - second.mean(1)


def test_the_papers_parm_picks_the_winner_of_the_whole_run_for_fewer_passes(decoders: Decoders) -> None:
    decoder, sampling, n = decoders["sd3"], PipelineSampling(4, 3.0), 6
    request = Request([*ROWS] * 2, range(6))
    pruned, whole = (
        Potential(sampling, n, "picky", prune=prune).decode(decoder, {"picky": Picky()}, request)
        for prune in (True, False)
    )
    potential = torch.stack([choice.scores for choice in whole.trace[:-1]])[-1]
    survives, stops = (potential >= 0.5).any(1), (potential < 0.5).any(1)
    assert (survives & stops).sum() >= 2
    assert torch.allclose(pruned.tokens[survives], whole.tokens[survives], atol=1e-4)
    assert pruned.cost.decoder_passes < whole.cost.decoder_passes == 6 * n * 4 * 2


class Doubtful(Picky):
    """Gives no image potential but the reddest of those it sees at a time."""

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        red = pixels[:, 0].mean((1, 2))
        return torch.ones_like(red), (red == red.max()).float()


def test_a_path_that_stops_costs_no_further_pass(decoders: Decoders) -> None:
    decoder, strategy = decoders["sd3"], Potential(PipelineSampling(5, 3.0), 4, "doubtful")
    with rows_seen(decoder) as seen:
        made = strategy.decode(decoder, {"doubtful": Doubtful()}, Request(ROWS[:1], [3]))
    # Before the first verdict a pass at the noise and one at the first latents; the last step needs none.
    assert seen == [8, 8, 2, 2, 2] and made.cost.decoder_passes == sum(seen)


def test_particles_and_candidates_are_judged_by_previews(decoders: Decoders) -> None:
    judges = {"picky": Picky()}
    for name in ("sd3", "sdxl"):
        decoder, sampling = decoders[name], PipelineSampling(4, 1.0, "ddim", 1.0)
        request = Request(ROWS, range(3))
        particles = Particles(sampling, 4, 2, "picky").decode(decoder, judges, request)
        assert particles.cost.decoder_passes == 3 * 4 * 4 and particles.cost.verifier_calls == 3 * 4 * 2
        assert particles.cost.image_decodes == 3 * 4 * 2  # a preview a call
        verified = Verified(sampling, k=3, verifier="picky").decode(decoder, judges, request)
        assert verified.cost.decoder_passes == 3 * (1 + 3 * 3)
        assert not torch.allclose(verified.tokens, Sample(sampling).decode(decoder, {}, request).tokens, atol=1e-2)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_stays_is_held_while_the_rest_begins_at_a_lower_level(decoders: Decoders, name: str) -> None:
    decoder, tokens = decoders[name], decoders[name].num_tokens
    old = Sample(PipelineSampling(3)).decode(decoder, {}, Request(ROWS, range(3))).tokens
    fixed = (torch.arange(tokens) < tokens // 2).expand(3, -1)
    sampling = PipelineSampling(3, 1.0, start=0.6)
    levels = decoder.levels(sampling)
    assert levels.sigmas[0] == pytest.approx(0.6) and levels.sigmas[-1] == 0 and levels.steps == 3
    assert sorted(levels.sigmas, reverse=True) == levels.sigmas
    new = Sample(sampling).decode(decoder, {}, Request(ROWS, range(10, 13), old, fixed)).tokens
    assert torch.equal(new[fixed], old[fixed])
    assert (new - old)[~fixed].abs().max() > 0.1


def test_the_autoencoder_takes_pixels_to_tokens_and_back(decoders: Decoders) -> None:
    tokenizer = decoders["sd3"].image_tokenizer
    given = torch.rand(2, 3, SIZE, SIZE)
    tokens = tokenizer.encode(given)
    assert tokens.shape == (2, 64, 16)
    vae = tokenizer.vae
    latents = vae.encode(2 * given - 1).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(tokens, pack(latents, 2), atol=1e-6)
    expected = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.allclose(tokenizer.decode(tokens), (0.5 + 0.5 * expected).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_half_precision_is_that_of_the_network_alone(decoders: Decoders, tmp_path: Path, name: str) -> None:
    without = WITHOUT if name == "sd3" else ()
    decoder = PipelineDecoder(MAKERS[name](tmp_path / name), SIZE, "float16", without)
    made = Sample(PipelineSampling(2, 3.0)).decode(decoder, {}, Request(ROWS, [1, 2, 3]))
    assert made.tokens.dtype == torch.float32
    images = decoder.image_tokenizer.decode(made.tokens)
    assert decoder.image_tokenizer.vae.dtype == torch.float16
    assert (images - pixels(decoders[name], PipelineSampling(2, 3.0), [1, 2, 3])).abs().max() < 0.02


def test_what_cannot_be_run_step_by_step_is_refused(decoders: Decoders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline cannot be run step by step here, as FluxPipeline, "):
        PipelineDecoder(tiny_unet(tmp_path / "sd", distilled=False), SIZE)
    lcm = tiny_sdxl(tmp_path / "lcm", scheduler=LCMScheduler)
    with pytest.raises(ValueError, match=r"the steps of a StableDiffusionXLPipeline with a LCMScheduler are not known"):
        PipelineDecoder(lcm, SIZE, "float32")
    pipeline, family = decoders["sd3"].pipeline, type(decoders["sd3"].family)
    kept, pipeline.scheduler = pipeline.scheduler, FlowMatchHeunDiscreteScheduler()
    try:
        with pytest.raises(ValueError, match=r"with a FlowMatchHeunDiscreteScheduler are not known here; decoder=diff"):
            family(pipeline, SIZE)
    finally:
        pipeline.scheduler = kept
    with pytest.raises(ValueError, match=r"decoder\.size must be a multiple of 4, not 30"):
        PipelineDecoder(MAKERS["sd3"](tmp_path / "sd3"), 30, "float32", WITHOUT)
    with pytest.raises(ValueError, match=r"sampling\.solver: 'sde' is for flows"):
        pixels(decoders["sdxl"], PipelineSampling(2, 1.0, "sde", 0.5), [1], ROWS[:1])
    with pytest.raises(ValueError, match=r"sampling\.solver: 'sde' is for flows"):  # before any image is made
        Sample(PipelineSampling(2, 1.0, "sde", 0.5)).check_decoder(decoders["sdxl"])


def test_a_negative_prompt_leads_images_away_or_is_refused(decoders: Decoders) -> None:
    plain, negative = (PipelineSampling(2, 3.5, negative_prompt=text) for text in ("", "blurry"))
    for name in ("sd3", "sdxl", "schnell", "sana", "qwen"):
        decoder = decoders[name]
        assert (pixels(decoder, plain, [1, 2, 3]) - pixels(decoder, negative, [1, 2, 3])).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"negative_prompt='blurry' has no effect: FluxPipeline makes no pass that"):
        pixels(decoders["flux"], negative, [1, 2, 3])
    with pytest.raises(ValueError, match=r"has no effect: guidance must be above 1"):
        pixels(decoders["sd3"], PipelineSampling(2, 1.0, negative_prompt="blurry"), [1, 2, 3])
