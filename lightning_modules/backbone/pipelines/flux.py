"""FLUX.1."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.backbone.pipelines.family import Arguments, FlowFamily


class Flux(FlowFamily):
    """`FluxPipeline`; a token is 2x2 latents. That of FLUX.1-dev is distilled to be guided, that of schnell is not."""

    patch = 2

    @property
    def width(self) -> int:
        return self.network.inner_dim

    def plan(self, steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    def encode(self, prompts: list[str], device: Any) -> dict[str, Tensor]:
        hidden, pooled, _ = self.pipeline.encode_prompt(prompts, prompt_2=None, device=device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def denoise(self, latents: Tensor, time: float, read: Arguments, guidance: float) -> Tensor:
        rows, tokens = latents.shape[:2]
        scale = torch.full((rows,), guidance, device=latents.device) if self.is_distilled else None
        places = torch.arange(tokens, device=latents.device)
        grid = round(tokens**0.5)
        return self.network(
            hidden_states=latents,
            timestep=torch.full((rows,), time, device=latents.device, dtype=latents.dtype) / 1000,
            guidance=scale,
            txt_ids=latents.new_zeros(read["encoder_hidden_states"].shape[1], 3),
            img_ids=torch.stack([torch.zeros_like(places), places // grid, places % grid], 1).to(latents.dtype),
            **read,
            return_dict=False,
        )[0]
