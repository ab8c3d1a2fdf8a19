"""Pipelines of diffusers as denoising decoders: their parts are driven step by step, so that every strategy works."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.decoder import Cost
from lightning_modules.backbone.denoising import DenoisingDecoder
from lightning_modules.backbone.denoising_sampling import DenoisingSampling, GaussianNoise, Levels
from lightning_modules.backbone.denoising_state import Prediction
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.pipelines.family import Family, pack
from lightning_modules.backbone.pipelines.flux import Flux
from lightning_modules.backbone.pipelines.latent_images import LatentImages
from lightning_modules.backbone.pipelines.loading import load_pipeline, networks, pipeline_key
from lightning_modules.backbone.pipelines.qwen_image import QwenImage
from lightning_modules.backbone.pipelines.sana import Sana
from lightning_modules.backbone.pipelines.sd3 import SD3
from lightning_modules.backbone.pipelines.sdxl import SDXL
from lightning_modules.cache_key import class_name

FAMILIES: Mapping[str, type[Family]] = {  # by the class of the pipeline
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "SanaPipeline": Sana,
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionXLPipeline": SDXL,
}
_MAPS = 12  # of the network's width, that a pass keeps at a time of each token


@dataclass(frozen=True)
class PipelineSampling(DenoisingSampling):
    """How a pipeline is run, at its own levels of noise.

    Pipelines that are distilled to be guided (FLUX.1-dev) read `guidance` as a number in one pass; others take a pass
    with the prompt and one without.
    """

    guidance: float = 1.0  # scale of guidance as diffusers counts it: 1 is none
    negative_prompt: str = ""  # what guidance leads away from


@dataclass
class Embeddings:
    """What passes read of B prompts, and of what guidance leads away from."""

    prompt: Tensor  # no features, [B, 0, 0]
    read: Mapping[str, Tensor]  # by the network, [B, ...]
    away: Mapping[str, Tensor] | None  # the same of the negative prompt, for all rows, [1, ...]; None: one pass

    def select(self, rows: Tensor) -> "Embeddings":
        return replace(self, prompt=self.prompt[rows], read={name: part[rows] for name, part in self.read.items()})

    def stacked(self) -> Mapping[str, Tensor]:
        """What all rows of a pass read, those without the prompt first."""
        if self.away is None:
            return self.read
        return {name: _stacked(self.away[name], part) for name, part in self.read.items()}


def _stacked(away: Tensor, read: Tensor) -> Tensor:
    """Rows [1, L, ...] and [B, L', ...] -> [2 B, ...]; of unequal lengths the shorter ends with zeros."""
    longest = max(away.shape[1], read.shape[1])
    away, read = (F.pad(part, [0, 0] * (part.ndim - 2) + [0, longest - part.shape[1]]) for part in (away, read))
    return torch.cat([away.expand_as(read), read])


class PipelineDecoder(DenoisingDecoder):
    """A text-to-image pipeline of diffusers of a family that is known here.

    The noise of an image with seed s is what the pipeline draws from `torch.Generator().manual_seed(s)` in single
    precision. Latents stay in single precision.

    Args:
        checkpoint, dtype, without: see `load_pipeline`.
        size: pixels along each side of an image.

    Raises:
        ImportError, FileNotFoundError: see `load_pipeline`.
        ValueError: the pipeline's class, its scheduler or the size cannot be run step by step.
    """

    sampling_type = PipelineSampling
    image_tokenizer: LatentImages

    def __init__(self, checkpoint: str, size: int, dtype: str = "float16", without: Sequence[str] = ()) -> None:
        super().__init__()
        self.pipeline: Any = load_pipeline(checkpoint, dtype, without, FAMILIES)
        self.family = FAMILIES[type(self.pipeline).__name__](self.pipeline, size)
        self.image_tokenizer = LatentImages(self.pipeline.vae, size, self.pipeline.vae_scale_factor, self.family.patch)
        parts = {name: part for name, part in networks(self.pipeline).items() if name != "vae"}
        self.networks = nn.ModuleDict(parts)  # moved, and told apart, with this module
        self.eval().requires_grad_(False)

    def cache_key(self) -> dict[str, Any]:
        size = self.image_tokenizer.image_size
        return {"class": class_name(self), "weights": fingerprint(self), "size": size, **pipeline_key(self.pipeline)}

    def latent_shape(self, sampling: PipelineSampling) -> tuple[int, int]:
        return self.num_tokens, self.image_tokenizer.channels * self.family.patch**2

    def levels(self, sampling: PipelineSampling) -> Levels:
        return self.family.levels(sampling.steps, self.num_tokens, sampling.start)

    def noise(self, seeds: Sequence[int], k: int, sampling: PipelineSampling) -> GaussianNoise:
        """Noise as the pipeline lays it out; anew, its latents begin with pure noise, whatever their first level."""
        drawn, side = super().noise(seeds, k, sampling), self.image_tokenizer.grid * self.family.patch
        initial = pack(drawn.initial.reshape(len(seeds), -1, side, side), self.family.patch)
        return replace(drawn, initial=initial / self.levels(sampling).sigmas[0] if sampling.start == 1 else initial)

    def encode(self, prompts: Sequence[str], sampling: PipelineSampling) -> Embeddings:
        """Encode prompts, equal ones once; raises ValueError if nothing would read the negative one."""
        device, texts, away = self.family.network.device, list(dict.fromkeys(prompts)), None
        if sampling.guidance > 1 and not self.family.is_distilled:
            away = self.family.encode_away(sampling.negative_prompt, device)
        elif sampling.negative_prompt:
            kind = type(self.pipeline).__name__
            why = "guidance must be above 1" if sampling.guidance <= 1 else f"{kind} makes no pass that would read it"
            raise ValueError(f"sampling.negative_prompt={sampling.negative_prompt!r} has no effect: {why}")
        encoded = Embeddings(torch.zeros(len(texts), 0, 0, device=device), self.family.encode(texts, device), away)
        return encoded.select(torch.tensor([texts.index(prompt) for prompt in prompts], device=device))

    def predict(
        self, latents: Tensor, levels: Levels, step: int, condition: Embeddings, sampling: PipelineSampling, cost: Cost
    ) -> Prediction:
        family, passes = self.family, 1 if condition.away is None else 2
        rows = latents.to(family.network.dtype).repeat(passes, 1, 1)
        cost.count_pass(len(rows), self.num_tokens)
        answer = family.denoise(rows, levels.times[step], condition.stacked(), sampling.guidance).float()
        if passes == 2:
            away, toward = answer.chunk(2)
            answer = family.guide(away, toward, sampling.guidance)
        return family.prediction(latents, answer, levels, step)

    def decoding_bytes(self, images: int, size: int) -> float:
        passes = 2 * images * self.num_tokens * self.family.width * _MAPS
        return passes * size + self.image_tokenizer.decoding_bytes(size)
