"""Pipelines of diffusers step by step: what the tiny random ones make equals what they make by themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.pipelines.decoder import PipelineDecoder, PipelineSampling
from lightning_modules.backbone.pipelines.family import unpack
from lightning_modules.backbone.tiny_pipeline import save_tiny_sd3
from lightning_modules.decoding.sample import Sample
from tests.helpers.overrides import WITHOUT
from tests.helpers.pipelines import tiny_flux, tiny_sdxl

ROWS = [{"prompt": f"a photo of a {name}"} for name in ("dog", "red cup", "star")]
SIZE = 32
MAKERS: dict[str, Callable[[Path], str]] = {
    "sd3": lambda folder: save_tiny_sd3(str(folder)),
    "sdxl": tiny_sdxl,
    "sdxl_v": lambda folder: tiny_sdxl(folder, "v_prediction"),
    "flux": tiny_flux,
    "schnell": lambda folder: tiny_flux(folder, distilled=False),
}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PipelineDecoder]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        name: PipelineDecoder(make(folder / name), SIZE, "float32", WITHOUT if name == "sd3" else ())
        for name, make in MAKERS.items()
    }


def by_itself(decoder: PipelineDecoder, row: Any, latents: Tensor, sampling: PipelineSampling) -> Tensor:
    """The image that a pipeline makes of a prompt and initial latents [1, T, D], pixels [1, 3, H, W]."""
    packed = "Flux" in type(decoder.pipeline).__name__
    guided: dict[str, Any] = {"guidance_scale": sampling.guidance}
    if packed and not decoder.family.is_distilled and sampling.guidance > 1:
        guided = {"true_cfg_scale": sampling.guidance, "negative_prompt": ""}
    given = latents if packed else unpack(latents, decoder.family.patch)
    return decoder.pipeline(
        prompt=row["prompt"], num_inference_steps=sampling.steps, height=SIZE, width=SIZE, latents=given,
        output_type="pt", **guided,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", MAKERS)
def test_an_image_is_what_the_pipeline_makes(
    decoders: dict[str, PipelineDecoder], name: str, guidance: float
) -> None:
    decoder, sampling = decoders[name], PipelineSampling(3, guidance)
    state = decoder.begin(Request(ROWS, [1, 2, 3]), sampling)
    decoded = Sample(sampling).decode(decoder, {}, Request(ROWS, [1, 2, 3]))
    pixels = decoder.image_tokenizer.decode(decoded.tokens)
    for i, row in enumerate(ROWS):
        expected = by_itself(decoder, row, state.latents[i : i + 1], sampling)
        assert expected.std() > 0.01
        assert torch.allclose(pixels[i : i + 1], expected, atol=1e-4), (pixels[i] - expected).abs().max()
    two = guidance > 1 and name != "flux"
    assert decoded.cost.decoder_passes == 3 * 3 * (2 if two else 1)
