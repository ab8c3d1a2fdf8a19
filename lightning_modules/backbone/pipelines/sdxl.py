"""Stable Diffusion XL."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.backbone.denoising_sampling import Levels
from lightning_modules.backbone.denoising_state import Prediction
from lightning_modules.backbone.pipelines.family import Arguments, Family, pack, unpack


class SDXL(Family):
    """`StableDiffusionXLPipeline`; a token is a latent.

    Whatever its scheduler, the levels and the deterministic steps are those of the Euler scheduler with its settings.
    """

    network_name = "unet"

    def __init__(self, pipeline: Any, size: int) -> None:
        from diffusers import EulerDiscreteScheduler

        super().__init__(pipeline, size)
        config = pipeline.scheduler.config
        self.predicts_v = config.get("prediction_type") == "v_prediction"  # else the noise
        is_consistency = "original_inference_steps" in config  # LCM, TCD: their steps need a network of their own
        is_known = EulerDiscreteScheduler in pipeline.scheduler.compatibles and not is_consistency
        if not is_known or config["prediction_type"] not in ("epsilon", "v_prediction"):
            self.refuse_scheduler()
        self.scheduler = EulerDiscreteScheduler.from_config(config, final_sigmas_type="zero")

    @property
    def width(self) -> int:
        return self.network.config.block_out_channels[0]

    def levels(self, steps: int, tokens: int, start: float) -> Levels:
        """Those of the Euler scheduler, whose latents x_0 + sigma noise are read divided by sqrt(1 + sigma²)."""
        self.scheduler.set_timesteps(steps)
        times, sigmas = (part.double().numpy() for part in (self.scheduler.timesteps, self.scheduler.sigmas))
        if start < 1:
            products = self.scheduler.alphas_cumprod.double().numpy()
            trained = np.sqrt((1 - products) / products)
            numbers = np.arange(len(trained))
            times = times / times[0] * np.interp(start / np.sqrt(1 - start**2), trained, numbers)
            sigmas = np.append(np.interp(times, numbers, trained), 0.0)
        norms = np.sqrt(1 + sigmas**2)
        return Levels([*times.tolist(), 0.0], (1 / norms).tolist(), (sigmas / norms).tolist())

    def encode(self, prompts: list[str], device: Any) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        sizes = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], dtype=hidden.dtype, device=device)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": sizes.repeat(len(prompts), 1)}

    def encode_away(self, prompt: str, device: Any) -> dict[str, Tensor]:
        """Encode a negative prompt; an empty one becomes zeros if the pipeline's config says so."""
        read = self.encode([prompt], device)
        if not prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            read |= {name: torch.zeros_like(read[name]) for name in ("encoder_hidden_states", "text_embeds")}
        return read

    def denoise(self, latents: Tensor, time: float, read: Arguments, guidance: float) -> Tensor:
        hidden, added = read["encoder_hidden_states"], {name: read[name] for name in ("text_embeds", "time_ids")}
        times = torch.full((len(latents),), time, device=latents.device)
        maps = unpack(latents, self.patch)
        return pack(self.network(maps, times, hidden, added_cond_kwargs=added, return_dict=False)[0], self.patch)

    def prediction(self, latents: Tensor, answer: Tensor, levels: Levels, step: int) -> Prediction:
        alpha, sigma = levels.alphas[step], levels.sigmas[step]
        if self.predicts_v:  # arXiv 2202.00512, appendix D
            return Prediction(alpha * latents - sigma * answer, sigma * latents + alpha * answer)
        return Prediction.of_noise(latents, answer, alpha, sigma)
